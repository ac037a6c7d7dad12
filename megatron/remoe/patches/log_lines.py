"""Hand the figures that Megatron computes for its printed lines to the run's log, as numbers."""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from inspect import signature
from itertools import count
from typing import Any

import torch

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
    names = signature(training_log)
    since = 0.0  # seconds on the interval's timer when the interval began

    @wraps(training_log)
    def forwarding(loss_dict: Any, total_loss_dict: dict[str, Any], *others: Any, **options: Any) -> bool:
        nonlocal since
        given, sums = names.bind(loss_dict, total_loss_dict, *others, **options), _Sums(total_loss_dict)
        given.apply_defaults()
        report_memory_flag = training_log(loss_dict, sums, *others, **options)
        total_loss_dict.update(sums)
        is_first, iteration = given.arguments["is_first_iteration"], given.arguments["iteration"]
        if run_logger().isEnabledFor(logging.INFO) and (is_first or iteration % get_args().log_interval == 0):
            active = get_timers()("interval-time").active_time()
            # The first iteration is printed, but its interval goes on.
            seconds, since = (active, 0.0) if is_first else (active - since, active)
            figures = _figures(given.arguments, sums if is_first else sums.before, seconds)
            run_logger().info({"kind": "log", "iteration": iteration} | figures)
        return report_memory_flag

    return forwarding


def _figures(given: Mapping[str, Any], sums: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Return the figures of a log interval: means over its steps, and the last step's norms and rates.

    Args:
        given: the arguments of `training_log`.
        sums: `total_loss_dict` before its reset.
        seconds: time of the interval.
    """
    args, batch = get_args(), get_current_running_global_batch_size()
    advanced, skipped, not_finite = (sums[name] for name in COUNTERS)
    seconds /= max(1, advanced + skipped)
    figures = {_key(name): float(total) / max(1, advanced) for name, total in sums.items() if name not in COUNTERS}
    figures |= {
        "consumed_samples": args.consumed_train_samples,
        "global_batch_size": batch,
        "seconds_per_iteration": seconds,
        "tokens_per_second": round(batch * args.seq_length / max(seconds, 1e-4), 1),
        "number_of_skipped_iterations": skipped,
        "number_of_nan_iterations": not_finite,
    }
    of_step = {name: given[name] for name in ("learning_rate", "loss_scale", "grad_norm", "params_norm")}
    of_step["num_zeros"] = given["num_zeros_in_grad"]
    figures |= {
        name: value.item() if isinstance(value, torch.Tensor) else value
        for name, value in of_step.items()
        if value is not None
    }
    if args.skipped_train_samples > 0:
        figures["skipped_samples"] = args.skipped_train_samples
    if args.log_throughput:
        counted = {name: given[name] for name in ("seqlen_squared_sum_in_batch", "total_real_tokens_in_batch")}
        operations = training.num_floating_point_operations(args, batch, **counted)
        figures["throughput_per_gpu_tflop_s_gpu"] = operations / (max(seconds, 1e-4) * 1e12 * args.world_size)
    return figures


def _key(name: str) -> str:
    return name.replace(" ", "_").lower()


def _forwarding_evaluations(evaluate_and_print_results: Callable[..., None]) -> Callable[..., None]:
    @wraps(evaluate_and_print_results)
    def forwarding(
        prefix: str, forward_step: Any, data: Any, model: Any, iteration: int, *others: Any, **options: Any
    ) -> None:
        args, evaluate = get_args(), training.evaluate
        names = _set_names(args, prefix)

        def evaluate_and_forward(*arguments: Any, **named: Any) -> Any:
            found = evaluate(*arguments, **named)
            name, losses = next(names), found[0]
            if losses and run_logger().isEnabledFor(logging.INFO):  # there are none after the time limit
                record: dict[str, Any] = {"kind": "validation", "iteration": iteration}
                record |= {"set": name} if name else {}
                record |= {"final": True} if prefix.endswith(" set") else {}
                record["tokens"] = named.get("eval_iters", 0) * _evaluated_sequences(args, prefix) * args.seq_length
                record |= {_key(name): float(loss) for name, loss in losses.items()}
                run_logger().info(record)
            return found

        training.evaluate = evaluate_and_forward  # called once for each set
        try:
            evaluate_and_print_results(prefix, forward_step, data, model, iteration, *others, **options)
        finally:
            training.evaluate = evaluate

    return forwarding


def _evaluated_sequences(args: argparse.Namespace, prefix: str) -> int:
    """Return the sequences of an iteration of an evaluation; with --full-validation, a micro-batch is one sequence."""
    is_whole = args.full_validation and not prefix.endswith("on test set")
    return args.eval_global_batch_size // (args.eval_micro_batch_size if is_whole else 1)


def _set_names(args: argparse.Namespace, prefix: str) -> Iterator[str]:
    """Yield the name of each set that an evaluation is of, "" for the only one."""
    if args.multiple_validation_sets:
        yield from args.validation_set_names or map(str, count())
    while True:
        yield "test" if prefix.endswith("on test set") else ""


def _forwarding_checkpoints(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(save_checkpoint)
    def forwarding(iteration: int, *others: Any, **options: Any) -> Any:
        totals: Callable[[], dict[str, int]]
        totals = getattr(get_moe_metrics_tracker(), "totals", dict)  # Megatron's own tracker has none
        if run_logger().isEnabledFor(logging.INFO) and (found := totals()):
            run_logger().info({"kind": "checkpoint", "iteration": iteration} | found)
        return save_checkpoint(iteration, *others, **options)

    return forwarding
