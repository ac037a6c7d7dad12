"""Hand the figures that Megatron computes for its printed lines to the run's log, as numbers."""

import argparse
import logging
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import count
from typing import Any

from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.training import get_args, get_timers, training

COUNTERS = ("advanced iterations", "skipped iterations", "nan iterations")


def run_logger() -> logging.Logger:
    """Return the logger that carries records of the run's log, as dicts; they are made while it is enabled for INFO."""
    logger = logging.getLogger("megatron.remoe.run")
    logger.propagate = False
    return logger


def forward_figures() -> None:
    """Give records of log intervals, evaluations and checkpoints to `run_logger`.

    Megatron computes the mean loss of a log interval and the time that it took inside `training_log`, and gives them
    to the console alone; TensorBoard's writer gets the loss of one step.
    """
    if hasattr(training.training_log, "__wrapped__"):
        return
    training.training_log = _forwarding_log(training.training_log)
    training.evaluate_and_print_results = _forwarding_evaluations(training.evaluate_and_print_results)
    training.save_checkpoint = _forwarding_checkpoints(training.save_checkpoint)


class _Sums(dict[str, Any]):
    """`total_loss_dict`, which also keeps what `training_log` sets to zero after printing.

    Attributes:
        before: name → the value before it was last set.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.before: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.before[name] = self.get(name)
        super().__setitem__(name, value)


def _forwarding_log(training_log: Callable[..., bool]) -> Callable[..., bool]:
    since = 0.0  # the interval's timer when the interval began

    @wraps(training_log)
    def forwarding(
        loss_dict: dict[str, Any],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        grad_norm: float | None,
        params_norm: float | None,
        num_zeros_in_grad: int | None,
        *others: Any,
        is_first_iteration: bool = False,
        **options: Any,
    ) -> bool:
        nonlocal since
        sums = _Sums(total_loss_dict)
        report_memory_flag = training_log(
            loss_dict, sums, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter, grad_norm,
            params_norm, num_zeros_in_grad, *others, is_first_iteration=is_first_iteration, **options,
        )  # fmt: skip
        total_loss_dict.update(sums)
        args = get_args()
        if not (run_logger().isEnabledFor(logging.INFO) and (is_first_iteration or iteration % args.log_interval == 0)):
            return report_memory_flag
        # The first iteration is printed, but its interval goes on.
        of_interval = sums if is_first_iteration else sums.before
        active = get_timers()("interval-time").active_time()
        seconds = active - (0.0 if is_first_iteration else since)
        since = 0.0 if is_first_iteration else active
        norms = {"grad_norm": grad_norm, "params_norm": params_norm, "num_zeros": num_zeros_in_grad}
        run_logger().info(
            {"kind": "log", "iteration": iteration}
            | _figures(args, of_interval, seconds, options)
            | {name: value for name, value in norms.items() if value is not None}
            | ({} if learning_rate is None else {"learning_rate": learning_rate})
            | {"loss_scale": loss_scale}
        )
        return report_memory_flag

    return forwarding


def _figures(
    args: argparse.Namespace, sums: dict[str, Any], seconds: float, options: dict[str, Any]
) -> dict[str, float]:
    """Return means over the steps of an interval, and how fast they were.

    Args:
        args: Megatron's arguments.
        sums: `total_loss_dict` before its reset.
        seconds: that the interval took.
        options: of `training_log`, with what its operations are counted by.
    """
    advanced, skipped, not_finite = (sums[name] for name in COUNTERS)
    seconds /= max(1, advanced + skipped)
    batch = get_current_running_global_batch_size()
    figures = {
        name.replace(" ", "_").lower(): float(total) / max(1, advanced)
        for name, total in sums.items()
        if name not in COUNTERS
    }
    figures |= {
        "consumed_samples": args.consumed_train_samples,
        "global_batch_size": batch,
        "seconds_per_iteration": seconds,
        "tokens_per_second": round(batch * args.seq_length / max(seconds, 1e-4), 1),
        "number_of_skipped_iterations": skipped,
        "number_of_nan_iterations": not_finite,
    }
    if args.skipped_train_samples > 0:
        figures["skipped_samples"] = args.skipped_train_samples
    if args.log_throughput:
        counted = {name: options.get(name) for name in ("seqlen_squared_sum_in_batch", "total_real_tokens_in_batch")}
        operations = training.num_floating_point_operations(args, batch, **counted)
        figures["throughput_per_gpu_tflop_s_gpu"] = operations / (max(seconds, 1e-4) * 1e12 * args.world_size)
    return figures


def _forwarding_evaluations(evaluate_and_print_results: Callable[..., None]) -> Callable[..., None]:
    @wraps(evaluate_and_print_results)
    def forwarding(
        prefix: str, forward_step: Any, data: Any, model: Any, iteration: int, *others: Any, **options: Any
    ) -> None:
        evaluate, names = training.evaluate, _set_names(get_args(), prefix)

        def evaluate_and_forward(*arguments: Any, **named: Any) -> Any:
            found = evaluate(*arguments, **named)
            name, losses = next(names), found[0]
            if losses and run_logger().isEnabledFor(logging.INFO):  # there are none after the time limit
                which = {"set": name} if name else {}
                figures = {name.replace(" ", "_").lower(): float(loss) for name, loss in losses.items()}
                run_logger().info({"kind": "validation", "iteration": iteration} | which | figures)
            return found

        training.evaluate = evaluate_and_forward  # called once for each set
        try:
            evaluate_and_print_results(prefix, forward_step, data, model, iteration, *others, **options)
        finally:
            training.evaluate = evaluate

    return forwarding


def _set_names(args: argparse.Namespace, prefix: str) -> Iterator[str]:
    """Yield the name of each set that an evaluation is of, "" for the only one."""
    if args.multiple_validation_sets:
        yield from args.validation_set_names or map(str, count())
    while True:
        yield "test" if prefix.endswith("on test set") else ""


def _forwarding_checkpoints(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(save_checkpoint)
    def forwarding(iteration: int, *others: Any, **options: Any) -> Any:
        totals = getattr(get_moe_metrics_tracker(), "totals", dict)  # Megatron's own tracker has none
        if run_logger().isEnabledFor(logging.INFO) and (found := totals()):
            run_logger().info({"kind": "checkpoint", "iteration": iteration} | found)
        return save_checkpoint(iteration, *others, **options)

    return forwarding
