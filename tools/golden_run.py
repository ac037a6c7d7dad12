"""Train the tiny ReMoE of the golden run and compare loss, sparsity and λ with the committed ones.

python tools/golden_run.py             compare; exit code 1 where something differs
python tools/golden_run.py --update    write the figures anew, after a change that is meant to change them
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.common.data_sets import write_documents  # noqa: E402
from tools.common.files import write_json  # noqa: E402
from tools.common.log_reader import read_log  # noqa: E402
from tools.common.places import ROOT  # noqa: E402
from tools.common.tiny_model import RELU, TRAINING  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "tiny_remoe.json"
TEXT = ROOT / "LICENSE"  # the same bytes everywhere
FLAGS = [
    *TRAINING,
    *RELU,
    *"--micro-batch-size 4 --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --train-iters 80".split(),
    *"--no-local-layer-fusion --moe-relu-l1-reg-coeff-init 1e-5 --split 100,0,0 --log-interval 5".split(),
]
# Relative for the loss, absolute for sparsity, in steps of the multiplier for λ. Processors round differently, which
# shows after some dozens of steps: whether S is above the target in one step decides about two of λ.
EARLY = 25
TOLERANCE_EARLY = {"lm loss": 1e-4, "sparsity": 1e-3, "l1 coefficient": 0.5}
TOLERANCE = {"lm loss": 0.005, "sparsity": 0.02, "l1 coefficient": 2.01}  # two steps, as far as they are printed
# One way to round on all x86 processors: MKL's reproducible branch, PyTorch's loops without AVX-512, and no oneDNN,
# which takes over only with AVX-512. Other ways lead elsewhere from iteration 30 on.
ROUNDING = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "avx2"}


def train() -> dict[int, dict[str, float]]:
    """Run the training and return the compared figures by iteration.

    Raises:
        SystemExit: the training failed; the end of its output is the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        write_documents(prefix, TEXT.read_bytes().split(b"\n\n"))  # a document for each paragraph
        command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *FLAGS, "--data-path", str(prefix), "--cpu"]
        environment = os.environ | ROUNDING | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"the golden run failed:\n{(result.stdout + result.stderr)[-3000:]}")
    return {
        iteration: {name: float(fields[name]) for name in TOLERANCE}
        for iteration, fields in read_log(result.stdout).items()
    }


def difference(name: str, found: float, expected: float) -> float:
    """How far a figure is off, in the unit of its tolerance."""
    if name == "sparsity":
        return abs(found - expected)
    if name == "lm loss":
        return abs(found / expected - 1)
    return abs(math.log(found / expected) / math.log(1.2))


def compare(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> bool:
    """Print both side by side; whether all figures are within tolerance."""
    same = found.keys() == expected.keys()
    for iteration in sorted(expected):
        for name, value in expected[iteration].items():
            new = found.get(iteration, {}).get(name)
            off = float("inf") if new is None else difference(name, new, value)
            within = off <= (TOLERANCE_EARLY if iteration <= EARLY else TOLERANCE)[name]
            same = same and within
            shown = "missing" if new is None else f"{new:.6g}"
            print(f"{iteration:5d}  {name:16s} {value:12.6g} {shown:>12s}  {'' if within else 'DIFFERS'}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)} anew")
    options = parser.parse_args()
    found = train()
    if options.update:
        write_json(GOLDEN, found)
        print(f"wrote {GOLDEN.relative_to(ROOT)}")
        return 0
    expected = {int(key): value for key, value in json.loads(GOLDEN.read_text()).items()}
    print(f"{'step':>5s}  {'figure':16s} {'committed':>12s} {'now':>12s}")
    same = compare(found, expected)
    print("same as the golden run" if same else "DIFFERENT from the golden run")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
