"""What a run's folder says about it: how far it is, its final validation loss, its rate."""

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from ..common.log_reader import read_log, seconds_per_iteration
from .settings import Settings, settings_of, whole

# Evaluations on the way lack "on validation set".
_EVALUATED = re.compile(
    r"validation loss at iteration (\d+) on validation set \| lm loss value: (\S+) \| lm loss PPL: (\S+)"
)
_TESTED = re.compile(r"validation loss at iteration (\d+) on test set \| lm loss value: (\S+)")
_PARAMETERS = re.compile(r"number of parameters on \([^)]*\) model parallel rank \([^)]*\): (\d+)")
WITHIN = 0.01  # of the target: S has settled
Records = Mapping[int, Mapping[str, str]]
_SPLITTING = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size")


@dataclass(frozen=True)
class Outcome:
    """What a run has come to; None is what its log does not tell (yet).

    iterations: trained so far, as far as logged; train_iters: how many it was started for.
    tokens: that it was trained on so far.
    validation_loss: nats per token, from the evaluation after the last iteration; perplexity: its exponential.
    test_loss: the same of the split's third part, where it has one.
    sparsity, target_sparsity: of the last line of the log, for ReMoE; settled: the first logged iteration from which
        S stays within 1 % of its target.
    flip_rate, flip_count: of the routing decisions, median over the log's second half, where they are measured.
    total_parameters: where one process holds the whole model.
    tokens_per_second: over all processes, median over the log's lines but the first, in which the process warms up.
    training_seconds: of the iterations alone, from the log's time per iteration.
    """

    iterations: int
    train_iters: int
    tokens: int | None = None
    validation_loss: float | None = None
    perplexity: float | None = None
    test_loss: float | None = None
    sparsity: float | None = None
    target_sparsity: float | None = None
    settled: int | None = None
    flip_rate: float | None = None
    flip_count: float | None = None
    total_parameters: int | None = None
    tokens_per_second: float | None = None
    training_seconds: float | None = None

    @property
    def finished(self) -> bool:
        """Whether it has the final validation loss of the number of iterations that it was started for."""
        return self.validation_loss is not None


def is_finished(outcome: Outcome | None) -> TypeGuard[Outcome]:
    """Whether there is a run, and it has come to its end."""
    return outcome is not None and outcome.finished


def log_of(folder: Path) -> Path:
    """The file that holds Megatron's whole output."""
    return folder / "train.log"


def has_checkpoint(folder: Path) -> bool:
    """Whether there is something to go on from."""
    return (folder / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def read_outcome(folder: Path) -> Outcome | None:
    """What the run in `folder` has come to; None where it was never started."""
    settings = settings_of(folder)
    if settings is None:
        return None
    log = log_of(folder)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    train_iters = whole(settings, "--train-iters")
    losses = {int(iteration): (float(loss), float(ppl)) for iteration, loss, ppl in _EVALUATED.findall(text)}
    loss, perplexity = losses.get(train_iters, (None, None))
    tests = {int(iteration): float(loss) for iteration, loss in _TESTED.findall(text)}
    # A resumed run may log an iteration again: the newer line counts.
    records = dict(sorted(read_log(text).items()))
    if not records:
        return Outcome(0, train_iters, validation_loss=loss, perplexity=perplexity, test_loss=tests.get(train_iters))
    last, fields = next(reversed(records.items()))
    batch, target = int(fields["global batch size"]), target_sparsity(settings, fields)
    unlogged = train_iters - last if loss is not None else 0
    return Outcome(
        iterations=last + unlogged,
        train_iters=train_iters,
        tokens=(int(fields["consumed samples"]) + unlogged * batch) * whole(settings, "--seq-length"),
        validation_loss=loss,
        perplexity=perplexity,
        test_loss=tests.get(train_iters),
        sparsity=_number(fields, "sparsity"),
        target_sparsity=target,
        settled=None if target is None else settled_at(records, target),
        flip_rate=_late_median(records, "flip rate"),
        flip_count=_late_median(records, "flip count"),
        total_parameters=_parameters(settings, text),
        tokens_per_second=_rate(settings, records),
        training_seconds=_seconds(records),
    )


def target_sparsity(settings: Settings, fields: Mapping[str, str]) -> float | None:
    """Of S, for a ReMoE: as its log tells it, or 1 - k/E, for the authors' fork does not; None for other models."""
    if "sparsity" not in fields:
        return None
    topk, experts = whole(settings, "--moe-router-topk") or 1, whole(settings, "--num-experts")
    return float(fields["target sparsity"]) if "target sparsity" in fields else 1 - topk / experts


def settled_at(records: Records, target: float) -> int | None:
    """The first logged iteration from which S stays within 1 % of its target; None where it does not."""
    found = None
    for iteration, fields in records.items():
        if "sparsity" not in fields:
            continue
        if abs(float(fields["sparsity"]) - target) > WITHIN * target:
            found = None
        elif found is None:
            found = iteration
    return found


def _late_median(records: Records, name: str) -> float | None:
    values = [float(fields[name]) for fields in records.values() if name in fields]
    return statistics.median(values[len(values) // 2 :]) if values else None


def _number(fields: dict[str, str], name: str) -> float | None:
    return float(fields[name]) if name in fields else None


def _parameters(settings: Settings, text: str) -> int | None:
    printed = _PARAMETERS.findall(text)
    split = any(whole(settings, flag) > 1 for flag in _SPLITTING)
    return int(printed[-1]) if printed and not split else None


def _rate(settings: Settings, records: dict[int, dict[str, str]]) -> float:
    sequence = whole(settings, "--seq-length")
    rates = [int(fields["global batch size"]) * sequence / seconds_per_iteration(fields) for fields in records.values()]
    return statistics.median(rates[1:] or rates)


def _seconds(records: dict[int, dict[str, str]]) -> float:
    before = [0, *records]
    return sum(
        (iteration - earlier) * seconds_per_iteration(fields)
        for earlier, (iteration, fields) in zip(before, records.items(), strict=False)
    )
