"""Read a run's progress, final validation loss and rate from the figures in its folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...console.errors import ToolError
from ...recipes.stages import training_flops
from ...runs.figure_reader import read_figures
from ...runs.run_figures import RunFigures


@dataclass(frozen=True)
class Outcome:
    """The results of a run so far; None if the log does not have them (yet).

    Attributes:
        iterations: number of logged iterations.
        train_iters: number of iterations that the run was started for.
        tokens: number of tokens trained on so far.
        validation_loss: in nats per token, after the last iteration.
        test_loss: in nats per token, on the third part of the split.
        sparsity, target_sparsity: in the last line of the log, for ReMoE.
        first_near: the first logged iteration with S within 1 % of its target.
        settled: the first logged iteration from which S stays there.
        flip_rate, flip_count, changed_tokens: of the routing decisions, median over the log's second half.
        total_parameters: of the whole model.
        tokens_per_second: over all processes, median over the log's lines without the first, which has the warm-up.
        training_seconds: of the iterations only, from the log's time per iteration.
        flops: of the whole training, with the experts that were computed.
    """

    iterations: int
    train_iters: int
    tokens: int | None
    validation_loss: float | None
    test_loss: float | None
    sparsity: float | None
    target_sparsity: float | None
    first_near: int | None
    settled: int | None
    flip_rate: float | None
    flip_count: float | None
    changed_tokens: float | None
    total_parameters: int | None
    tokens_per_second: float | None
    training_seconds: float | None
    flops: float | None

    @property
    def finished(self) -> bool:
        """Return whether there is a validation loss after all iterations."""
        return self.validation_loss is not None


def read_outcome(folder: Path) -> Outcome | None:
    """Return the results of the run in `folder`; None if it has not begun."""
    try:
        figures = read_figures(folder)
    except ToolError:
        return None
    if not figures.args and not figures.last:
        return None
    train_iters = figures.whole("train_iters")
    losses = figures.final_losses(train_iters)
    sequence, samples = figures.whole("seq_length"), figures.newest("consumed_samples")
    unlogged = train_iters - figures.last if "" in losses else 0
    seconds = figures.seconds
    return Outcome(
        iterations=figures.last + unlogged,
        train_iters=train_iters,
        tokens=round(samples + unlogged * figures.whole("global_batch_size")) * sequence if samples else None,
        validation_loss=losses.get(""),
        test_loss=losses.get("test"),
        sparsity=figures.newest("sparsity"),
        target_sparsity=figures.target_sparsity,
        first_near=figures.first_near,
        settled=figures.settled,
        flip_rate=_late_median(figures, "flip_rate"),
        flip_count=_late_median(figures, "flip_count"),
        changed_tokens=_late_median(figures, "changed_tokens"),
        total_parameters=figures.parameters,
        tokens_per_second=figures.tokens_per_second,
        training_seconds=float(seconds.sum()) if len(seconds) else None,
        flops=training_flops(figures),
    )


def _late_median(figures: RunFigures, name: str) -> float | None:
    values = figures.curve(name).values
    return float(np.median(values[len(values) // 2 :])) if len(values) else None
