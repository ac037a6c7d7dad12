"""Pass the figures that Megatron computes for its printed lines to the run's log, as numbers."""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any

import torch

from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.remoe.patches.patch import patch, replace
from megatron.training import get_args, get_timers, training

COUNTERS = ("advanced iterations", "skipped iterations", "nan iterations")


def run_logger() -> logging.Logger:
    """Return the logger for the run's log. Its records are dicts, and are dropped unless INFO is enabled."""
    logger = logging.getLogger("megatron.remoe.run")
    logger.propagate = False
    return logger


class _Sums(dict[str, Any]):
    """Keep the values of `total_loss_dict` that `training_log` sets to zero after printing.

    Attributes:
        before: name → the value before it was last set.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.before: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.before[name] = self.get(name)
        super().__setitem__(name, value)


@patch(
    changes={
        "training.training:training_log": "5e34a182",
        "training.training:evaluate_and_print_results": "699dfbe6",
        "training.training:save_checkpoint": "b652984c",
    },
    provides="losses and evaluations in SAVE/metrics.jsonl; a finished run that does not save again when restarted",
    ends="Megatron hands the figures of a log interval to a writer of the caller's, and saves only after training",
    for_saving=True,
    is_needed=True,
)
def forward_figures() -> None:
    """Send records of log intervals, evaluations and checkpoints to `run_logger`.

    Megatron computes the mean loss and the time of a log interval inside `training_log` and only prints them;
    TensorBoard's writer gets the loss of one step. If nothing was trained, the loaded checkpoint is not saved again.
    """
    names = signature(training.training_log)
    since, samples = 0.0, 0  # seconds on the timer, and consumed samples, when the interval began

    @replace(training, "training_log")
    def log(stock: Any, loss_dict: Any, total_loss_dict: dict[str, Any], *others: Any, **options: Any) -> bool:
        nonlocal since, samples
        bound, sums = names.bind(loss_dict, total_loss_dict, *others, **options), _Sums(total_loss_dict)
        bound.apply_defaults()
        given = bound.arguments
        report_memory_flag: bool = stock(loss_dict, sums, *others, **options)
        total_loss_dict.update(sums)
        if _is_wanted() and (given["is_first_iteration"] or given["iteration"] % get_args().log_interval == 0):
            active, consumed = get_timers()("interval-time").active_time(), get_args().consumed_train_samples
            is_first = given["is_first_iteration"]
            samples = consumed - get_current_running_global_batch_size() if is_first else samples
            figures = _figures(given, sums if is_first else sums.before, active - since, consumed - samples)
            run_logger().info({"kind": "log", "iteration": given["iteration"]} | figures)
            if not is_first:  # the first iteration is printed, but its interval continues
                since, samples = active, consumed
        return report_memory_flag

    @replace(training, "evaluate_and_print_results")
    def evaluate(
        stock: Any, prefix: str, forward_step: Any, data: Any, model: Any, iteration: int, *others: Any, **options: Any
    ) -> None:
        evaluate_one = training.evaluate
        training.evaluate = _forwarding(evaluate_one, prefix, iteration)  # called once for each set
        try:
            stock(prefix, forward_step, data, model, iteration, *others, **options)
        finally:
            training.evaluate = evaluate_one

    @replace(training, "save_checkpoint")
    def save(stock: Any, iteration: int, *others: Any, **options: Any) -> Any:
        args = get_args()
        is_there = args.resume_folder and Path(args.resume_folder).parent.resolve() == Path(args.save).resolve()
        if is_there and iteration == args.iteration >= args.train_iters:
            return None  # writing in place could destroy the run's last checkpoint
        # Megatron's own tracker has no totals.
        totals: dict[str, int] = getattr(get_moe_metrics_tracker(), "totals", dict)() if _is_wanted() else {}
        if totals:
            run_logger().info({"kind": "checkpoint", "iteration": iteration} | totals)
        return stock(iteration, *others, **options)


def _is_wanted() -> bool:
    return run_logger().isEnabledFor(logging.INFO)


def _figures(given: Mapping[str, Any], sums: Mapping[str, Any], seconds: float, samples: int) -> dict[str, float]:
    """Return the figures of a log interval: means over its steps, and the last step's norms and rates.

    Args:
        given: the arguments of `training_log`.
        sums: `total_loss_dict` before its reset.
        seconds: duration of the interval.
        samples: sequences of the interval.
    """
    args = get_args()
    advanced, skipped, not_finite = (sums[name] for name in COUNTERS)
    figures = {_key(name): float(sums[name]) / advanced for name in sums if advanced and name not in COUNTERS}
    last_step = {name: given[name] for name in ("learning_rate", "loss_scale", "grad_norm", "params_norm")}
    last_step["num_zeros"] = given["num_zeros_in_grad"]
    return figures | {
        "consumed_samples": args.consumed_train_samples,
        "global_batch_size": get_current_running_global_batch_size(),
        "seconds_per_iteration": seconds / max(1, advanced + skipped),
        "tokens_per_second": round(samples * args.seq_length / max(seconds, 1e-4), 1),
        "number_of_skipped_iterations": skipped,
        "number_of_nan_iterations": not_finite,
        **{
            name: value.item() if isinstance(value, torch.Tensor) else value
            for name, value in last_step.items()
            if value is not None
        },
    }


def _key(name: str) -> str:
    return name.replace(" ", "_").lower()


def _forwarding(evaluate: Callable[..., Any], prefix: str, iteration: int) -> Callable[..., Any]:
    """Return Megatron's `evaluate`, extended to send a record of each set to `run_logger`."""
    args = get_args()
    names = _set_names(args, prefix)
    is_whole = args.full_validation and not prefix.endswith("on test set")
    sequences = iter(args.validation_samples if is_whole else ())

    def evaluate_and_forward(*arguments: Any, **options: Any) -> Any:
        result = evaluate(*arguments, **options)
        name, losses = next(names), result[0]
        if result[2]:  # At the time limit, Megatron leaves the timer running, and the test set would start it again.
            get_timers()("evaluate").stop()
        if losses and _is_wanted():  # after the time limit there are no losses
            record: dict[str, Any] = {"kind": "validation", "iteration": iteration}
            record |= {"set": name} if name else {}
            record |= {"final": True} if prefix.endswith(" set") else {}
            drawn = options.get("eval_iters", 0) * args.eval_global_batch_size
            record["tokens"] = args.seq_length * (next(sequences) if is_whole else drawn)
            run_logger().info(record | {_key(name): float(loss) for name, loss in losses.items()})
        return result

    return evaluate_and_forward


def _set_names(args: argparse.Namespace, prefix: str) -> Iterator[str]:
    """Yield the name of each evaluated set: "test", a name or number of several validation sets, or "" for one."""
    if args.multiple_validation_sets:
        yield from args.validation_set_names or map(str, count())
    while True:
        yield "test" if prefix.endswith("on test set") else ""
