"""Runs one training of the comparison and reads what it wrote down; measures how far two of them are apart."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.log_reader import read_log
from .layouts import MODEL, MODELS, ROUTINGS, Layout

TIMEOUT = 300  # seconds for one training
RECORD = Path(__file__).with_name("record.py")


class TrainingFailed(Exception):
    """A training ended with an error; the message holds the end of its log."""


@dataclass(frozen=True)
class Training:
    """What one training said.

    Attributes:
        losses: language loss of every step, in nats.
        sparsities: S of every step; empty with top-k.
        coefficients: λ of every step as printed; empty with top-k.
        exponents: λ's exponent after every step, on every router of every rank.
        counts: layer → tokens per expert and tokens at step 0, summed over ranks.
        gradients: layer → the router weight's gradient at step 0, as every rank that holds the layer has it.
    """

    losses: list[float]
    sparsities: list[float]
    coefficients: list[str]
    exponents: list[list[list[int]]]
    counts: dict[str, list[float]]
    gradients: dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Difference:
    """The largest differences over all steps; None where there is nothing to compare.

    Attributes:
        loss, gradient: relative (the gradient's to its largest element).
        sparsity: absolute.
        counts_equal: whether tokens per expert are the same at step 0.
        exponents_equal: whether λ's exponent is, at every step, on all ranks and the reference.
    """

    loss: float
    gradient: float
    sparsity: float | None
    counts_equal: bool | None
    exponents_equal: bool | None


def by_torchrun(arguments: list[str], processes: int, folder: Path, log: Path) -> int:
    """Train with these arguments and write down what parity is measured by.

    Args:
        folder: where each rank writes its record.
        log: what is printed.

    Returns:
        The exit code, or -1 after `TIMEOUT`.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with log.open("w") as output:
        try:
            return subprocess.run(
                [sys.executable, *launcher, str(RECORD), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PARITY_RECORD": str(folder)},
                timeout=TIMEOUT,
            ).returncode
        except subprocess.TimeoutExpired:
            return -1


def train(
    folder: Path,
    data: Path,
    layout: Layout,
    routing: str,
    variant: str,
    *flags: str,
    model: str = "gpt",
    launch: Callable[[list[str], int, Path, Path], int] = by_torchrun,
) -> Training:
    """Run a training of a model class, or read it where `folder` holds a finished one.

    Raises:
        TrainingFailed: it ended with an error or took longer than `TIMEOUT`.
    """
    log, done = folder / "log", folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        split = [*MODELS[model](layout, variant), *layout.flags]
        settings = [*MODEL, *ROUTINGS[routing], *split, "--data-path", str(data), *flags]
        code = launch(settings, layout.processes, folder, log)
        if code:
            raise TrainingFailed(
                f"exit code {code}; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-8:])
            )
        done.touch()
    return _read(folder, layout.processes, 2 if model == "hybrid" else 1)


def _read(folder: Path, processes: int, sublayers: int) -> Training:
    """What a training of so many processes wrote down; layers by GPTModel's numbers."""
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


def compare(found: Training, expected: Training) -> Difference:
    """How far `found` is from `expected`.

    Raises:
        TrainingFailed: one of them is shorter than the other, or lacks a layer.
    """
    if len(found.losses) != len(expected.losses) or found.gradients.keys() != expected.gradients.keys():
        raise TrainingFailed(f"{len(found.losses)} steps of {len(expected.losses)}, layers {sorted(found.gradients)}")
    loss = max(abs(mine / right - 1) for mine, right in zip(found.losses, expected.losses, strict=True))
    gradient = max(
        float((mine - right[0]).abs().max() / right[0].abs().max())
        for layer, right in expected.gradients.items()
        for mine in found.gradients[layer]
    )
    if not expected.sparsities:
        return Difference(loss, gradient, None, None, None)
    exponents = [steps[0] for steps in expected.exponents[0]]
    return Difference(
        loss=loss,
        gradient=gradient,
        sparsity=max(abs(a - b) for a, b in zip(found.sparsities, expected.sparsities, strict=True)),
        counts_equal=found.counts == expected.counts,
        exponents_equal=found.coefficients == expected.coefficients
        and all(set(here) <= {right} for rank in found.exponents for here, right in zip(rank, exponents, strict=True)),
    )
