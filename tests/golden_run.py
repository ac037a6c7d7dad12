"""The golden run: a tiny ReMoE whose loss, sparsity and λ are committed in tests/golden/tiny_remoe.json."""

import json
import math
from pathlib import Path

from tests.data_sets import write_documents
from tests.tiny_model import RELU, TRAINING
from tools.console.places import ROOT
from tools.runs.log_reader import read_log

GOLDEN = ROOT / "tests" / "golden" / "tiny_remoe.json"
FLAGS = [
    *TRAINING,
    *RELU,
    *"--micro-batch-size 4 --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --train-iters 80".split(),
    *"--no-local-layer-fusion --moe-relu-l1-reg-coeff-init 1e-5 --split 100,0,0 --log-interval 5".split(),
]
# Processors round differently. After dozens of steps, S can be above the target on one and below it on another; then λ
# differs by two steps. Tolerances are relative for the loss, absolute for S, and in steps of the multiplier for λ.
EARLY = 25
EXACT = 20  # without `ROUNDING`, the loss changes by 1e-5 until here, and by 1 % until iteration 40
TOLERANCE_EARLY = {"lm loss": 1e-4, "sparsity": 1e-3, "l1 coefficient": 0.5}
TOLERANCE = {"lm loss": 0.005, "sparsity": 0.02, "l1 coefficient": 2.01}  # two steps; printed digits are rounded
# The same rounding on all x86 processors: MKL's reproducible branch, and no AVX-512 in PyTorch's loops or by oneDNN.
ROUNDING = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "avx2"}
Figures = dict[int, dict[str, float]]


def write_data(prefix: Path) -> None:
    """Write the license as a data set, a document per paragraph: the same bytes everywhere."""
    write_documents(prefix, (ROOT / "LICENSE").read_bytes().split(b"\n\n"))


def read_figures(output: str) -> Figures:
    """Return iteration → figure → value from a training run's output."""
    return {step: {name: float(fields[name]) for name in TOLERANCE} for step, fields in read_log(output).items()}


def committed() -> Figures:
    """Return the committed figures."""
    return {int(iteration): figures for iteration, figures in json.loads(GOLDEN.read_text()).items()}


def difference(name: str, actual: float, expected: float) -> float:
    """Return how far a figure is off, in the unit of its tolerance."""
    if name == "sparsity":
        return abs(actual - expected)
    if name == "lm loss":
        return abs(actual / expected - 1)
    return abs(math.log(actual / expected) / math.log(1.2))


def differences(actual: Figures, expected: Figures) -> list[str]:
    """Return the figures out of tolerance, one line each; empty if the runs count as the same."""
    wrong = [] if actual.keys() == expected.keys() else [f"logged iterations: {sorted(actual)}"]
    for iteration in sorted(actual.keys() & expected.keys()):
        allowed = TOLERANCE_EARLY if iteration <= EARLY else TOLERANCE
        for name, value in expected[iteration].items():
            if not difference(name, actual[iteration][name], value) <= allowed[name]:
                wrong.append(f"iteration {iteration}, {name}: {actual[iteration][name]:g} instead of {value:g}")
    return wrong
