"""Train the parity model in one layout, and measure the differences between two training runs."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.parity.layouts import LAYOUTS, MODEL, MODELS, ROUTINGS
from tests.training_runs import run
from tools.runs.log_reader import read_log

RECORD = Path(__file__).with_name("record.py")
# For loss and gradient. Layouts add in different orders; with bf16 they also round to 8 bits at different places.
TOLERANCE, TOLERANCE_BF16 = (1e-4, 1e-4), (2e-2, 1e-1)


@dataclass(frozen=True)
class Case:
    """One training run: model class ("gpt" or "hybrid"), routing, variant and layout, all by name."""

    model: str
    routing: str
    variant: str
    layout: str

    def __str__(self) -> str:
        return f"{self.model}, {self.routing}, {self.variant}, {self.layout}"


@dataclass(frozen=True)
class Training:
    """The figures of one training run.

    Attributes:
        losses: language loss of every step, in nats per token.
        sparsities: S of every step; empty with top-k.
        coefficients: λ of every step as printed; empty with top-k.
        exponents: λ's exponent after every step, of every router, by rank.
        counts: layer → each expert's tokens, then all tokens, at step 0, summed over ranks.
        gradients: layer → the router weight's gradient at step 0, one for each rank that holds the layer.
    """

    losses: list[float]
    sparsities: list[float]
    coefficients: list[str]
    exponents: list[list[list[int]]]
    counts: dict[str, list[float]]
    gradients: dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Difference:
    """The largest differences between two training runs.

    Attributes:
        loss, gradient: relative; the gradient's is at step 0, relative to the gradient's largest element.
        sparsity: absolute; 0 with top-k.
        same_counts: whether `Training.counts` are equal.
        same_exponents: whether λ and its exponents equal the reference's at every step, on all ranks.
    """

    loss: float
    gradient: float
    sparsity: float
    same_counts: bool
    same_exponents: bool

    def is_tolerable(self, variant: str) -> bool:
        """Return whether the training runs count as the same."""
        loss, gradient = TOLERANCE_BF16 if variant == "bf16" else TOLERANCE
        close = self.loss < loss and self.gradient < gradient
        return close and (variant == "bf16" or (self.same_counts and self.same_exponents and self.sparsity < 1e-3))


def train(folder: Path, data: Path, case: Case, *flags: str) -> Training:
    """Train with a process per rank and keep the figures in `folder`; if that is done already, only read them."""
    layout, log = LAYOUTS[case.layout], folder / "log"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        split = [*MODELS[case.model](layout, case.variant), *layout.flags.split()]
        words = [str(folder), *MODEL, *ROUTINGS[case.routing], *split, "--data-path", str(data), *flags]
        log.write_text(run(words, layout.processes, script=RECORD))
        (folder / "done").touch()
    return _read(folder, layout.processes, 2 if case.model == "hybrid" else 1)


def _read(folder: Path, processes: int, sublayers: int) -> Training:
    """Read the log and the ranks' records; layers have GPTModel's numbers."""
    lines = [fields for _, fields in sorted(read_log((folder / "log").read_text()).items())]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    counts: dict[str, list[float]] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for rank in ranks:
        for number, seen in rank["first_counts"].items():
            layer = str(int(number) // sublayers)
            counts[layer] = [a + b for a, b in zip(counts.get(layer, [0.0] * len(seen)), seen, strict=True)]
        for number, gradient in rank["router_gradients"].items():
            gradients.setdefault(str(int(number) // sublayers), []).append(torch.tensor(gradient, dtype=torch.float64))
    return Training(
        losses=[float(line["lm loss"]) for line in lines],
        sparsities=[float(line["sparsity"]) for line in lines if "sparsity" in line],
        coefficients=[line["l1 coefficient"] for line in lines if "l1 coefficient" in line],
        exponents=[rank["exponents"] for rank in ranks],
        counts=counts,
        gradients=gradients,
    )


def compare(actual: Training, expected: Training) -> Difference:
    """Return how far `actual` is from `expected`; both must have the same steps and layers."""
    assert len(actual.losses) == len(expected.losses) and actual.gradients.keys() == expected.gradients.keys()
    sparsities = zip(actual.sparsities, expected.sparsities, strict=True)
    reference = [set(step) for step in expected.exponents[0]]
    return Difference(
        loss=max(abs(mine / right - 1) for mine, right in zip(actual.losses, expected.losses, strict=True)),
        gradient=max(
            float((mine - right[0]).abs().max() / right[0].abs().max())
            for layer, right in expected.gradients.items()
            for mine in actual.gradients[layer]
        ),
        sparsity=max((abs(a - b) for a, b in sparsities), default=0.0),
        same_counts=actual.counts == expected.counts,
        same_exponents=actual.coefficients == expected.coefficients
        and all(set(here) <= there for rank in actual.exponents for here, there in zip(rank, reference, strict=True)),
    )
