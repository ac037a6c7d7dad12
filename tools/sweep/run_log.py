"""Read a run's progress, final validation loss and rate from the figures in its folder."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from ..common.errors import ToolError
from ..common.figure_reader import LOG, read_figures
from ..common.run_figures import RunFigures
from .plan import Run
from .settings import settings_of, whole

NUMBERS = ("train_iters", "seq_length", "global_batch_size", "num_experts", "moe_router_topk")


@dataclass(frozen=True)
class Outcome:
    """The results of a run so far; None if the log does not have them (yet).

    Attributes:
        iterations: number of logged iterations.
        train_iters: number of iterations that the run was started for.
        tokens: number of tokens trained on so far.
        validation_loss: in nats per token, after the last iteration.
        perplexity: exponential of the validation loss.
        test_loss: in nats per token, on the third part of the split.
        sparsity, target_sparsity: in the last line of the log, for ReMoE.
        first_near: the first logged iteration with S within 1 % of its target.
        settled: the first logged iteration from which S stays there.
        flip_rate, flip_count, changed_tokens: of the routing decisions, median over the log's second half.
        total_parameters: of the whole model.
        tokens_per_second: over all processes, median over the log's lines without the first, which has the warm-up.
        training_seconds: of the iterations only, from the log's time per iteration.
    """

    iterations: int
    train_iters: int
    tokens: int | None = None
    validation_loss: float | None = None
    perplexity: float | None = None
    test_loss: float | None = None
    sparsity: float | None = None
    target_sparsity: float | None = None
    first_near: int | None = None
    settled: int | None = None
    flip_rate: float | None = None
    flip_count: float | None = None
    changed_tokens: float | None = None
    total_parameters: int | None = None
    tokens_per_second: float | None = None
    training_seconds: float | None = None

    @property
    def finished(self) -> bool:
        """Return whether there is a validation loss after all iterations."""
        return self.validation_loss is not None


def is_finished(outcome: Outcome | None) -> TypeGuard[Outcome]:
    """Return whether there is a run, and it is finished."""
    return outcome is not None and outcome.finished


def log_of(folder: Path) -> Path:
    """Return the file of Megatron's output."""
    return folder / LOG


def has_checkpoint(folder: Path) -> bool:
    """Return whether there is a checkpoint to continue from."""
    return (folder / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def read_run_figures(folder: Path) -> RunFigures | None:
    """Return the figures of a run, with the arguments of its command; None if it was not started."""
    settings = settings_of(folder) or {}
    try:
        figures = read_figures(folder)
    except ToolError:  # nothing was logged
        figures = RunFigures()
    if not settings and not figures.last:
        return None
    given = {name: number for name in NUMBERS if (number := whole(settings, f"--{name.replace('_', '-')}"))}
    named = Run.from_name(folder.name)  # the fork's log might lack its arguments
    if named is not None and named.experts:
        given = {"num_experts": named.experts} | given
    if "num_experts" in given:
        granularity = whole(settings, "--moe-granularity") or 1
        given["num_experts"] *= granularity
        given["moe_router_topk"] = given.get("moe_router_topk", 1) * granularity
    figures.args |= given
    return figures


def read_outcome(folder: Path) -> Outcome | None:
    """Return the results of the run in `folder`; None if it was not started."""
    figures = read_run_figures(folder)
    if figures is None:
        return None
    train_iters = figures.whole("train_iters")
    loss, test_loss = _final(figures, "", train_iters), _final(figures, "test", train_iters)
    perplexity = None if loss is None else math.exp(min(20.0, loss))  # as Megatron prints it
    if not figures.last:
        return Outcome(0, train_iters, validation_loss=loss, perplexity=perplexity, test_loss=test_loss)
    unlogged = 0 if loss is None else train_iters - figures.last
    sequence = figures.whole("seq_length")
    [batch] = figures.batches(np.array([figures.last]))
    samples = (figures.newest("consumed_samples") or math.nan) + unlogged * batch
    return Outcome(
        iterations=figures.last + unlogged,
        train_iters=train_iters,
        tokens=None if math.isnan(samples) or not sequence else round(samples) * sequence,
        validation_loss=loss,
        perplexity=perplexity,
        test_loss=test_loss,
        sparsity=figures.newest("sparsity"),
        target_sparsity=figures.target,
        first_near=figures.first_near,
        settled=figures.settled,
        flip_rate=_late_median(figures, "flip_rate"),
        flip_count=_late_median(figures, "flip_count"),
        changed_tokens=_late_median(figures, "changed_tokens"),
        total_parameters=figures.parameters,
        tokens_per_second=_rate(figures, sequence),
        training_seconds=_seconds(figures),
    )


def _final(figures: RunFigures, name: str, train_iters: int) -> float | None:
    """Return the newest loss of a validation set after the training."""
    found = [each.loss for each in figures.evaluations.get(name, ()) if each.final and each.iteration == train_iters]
    return found[-1] if found else None


def _late_median(figures: RunFigures, name: str) -> float | None:
    values = figures.curve(name).values
    return float(np.median(values[len(values) // 2 :])) if len(values) else None


def _rate(figures: RunFigures, sequence: int) -> float | None:
    iterations, seconds = figures.curve("seconds_per_iteration")
    rates = figures.batches(iterations) * sequence / np.maximum(seconds, 1e-4)
    rates = rates[1:] if len(rates) > 1 else rates
    return float(np.median(rates)) if len(rates) and sequence and np.isfinite(rates).all() else None


def _seconds(figures: RunFigures) -> float | None:
    iterations, seconds = figures.curve("seconds_per_iteration")
    return float(np.diff(iterations, prepend=0) @ seconds) if len(seconds) else None
