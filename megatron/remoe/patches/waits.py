"""Fewer host waits for the GPU in a training step."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch

from megatron.core.optimizer import clip_grads
from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
from megatron.core.utils import local_multi_tensor_l2_norm
from megatron.training import training


def keep_norms_on_device() -> None:
    """Compute the gradient norm on the GPU without Transformer Engine and apex.

    Megatron collects the norms of all tensors on the host and waits once per tensor. On the CPU its own function stays,
    so its digits do not change.
    """
    stock = clip_grads.l2_norm_impl
    if stock is not local_multi_tensor_l2_norm:
        return

    @wraps(stock)
    def norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], *rest: Any) -> Any:
        tensors = [tensor for tensors in tensor_lists for tensor in tensors]
        if all(tensor.is_cuda for tensor in tensors):
            return _norm_of_all(tensors), None
        return stock(chunk_size, noop_flag, tensor_lists, *rest)

    clip_grads.l2_norm_impl = norm


def _norm_of_all(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of tensors on one device, fp32 `[1]`."""
    return torch.nn.utils.get_total_norm(tensors).to(torch.float32).reshape(1)


def validate_once_per_step() -> None:
    """Check losses and gradients for NaN and Inf once per step; Megatron waits twice per gradient bucket.

    The flags stay on the device until the last backward pass has finished. If one is set, Megatron's own validation
    runs for all results, in order and before the optimizer step.
    """
    validate, run_again = RerunStateMachine.validate_result, RerunStateMachine.should_run_forward_backward
    if hasattr(validate, "__wrapped__"):
        return

    def waiting(machine: RerunStateMachine) -> list[tuple[torch.Tensor, Callable[[], None]]]:
        # The machine's own: a step that another training of this process did not finish must not reach the next one.
        return vars(machine).setdefault("remoe_waiting", [])

    @wraps(validate)
    def defer_validation(self: RerunStateMachine, result: Any, rejection_func: Any, *rest: Any, **options: Any) -> None:
        waits = self.state == RerunState.INITIAL_RUN and self.mode != RerunMode.REPORT_DETERMINISM_STATS
        if not waits or rejection_func not in (torch.isnan, torch.isinf) or self.error_injector.should_inject_errors:
            return validate(self, result, rejection_func, *rest, **options)
        result = result.detach()
        validate_now = partial(validate, self, result, rejection_func, *rest, **options)
        waiting(self).append((rejection_func(result), validate_now))

    @wraps(run_again)
    def run_again_if_rejected(self: RerunStateMachine, data_iterator: Any) -> bool:
        results = waiting(self)[:]
        waiting(self).clear()
        if results and torch.stack([is_rejected for is_rejected, _ in results]).any():
            for _, validate_now in results:
                validate_now()
        return run_again(self, data_iterator)

    RerunStateMachine.validate_result = defer_validation
    RerunStateMachine.should_run_forward_backward = run_again_if_rejected


def skip_single_rank_reductions() -> None:
    """Skip reductions over a model parallel group of one rank.

    Megatron runs them on the device and waits five times per step.
    """
    for name in ("reduce_max_stat_across_model_parallel_group", "logical_and_across_model_parallel_group"):
        stock = getattr(training, name)
        if not hasattr(stock, "__wrapped__"):
            setattr(training, name, _reduce_if_several(stock))


def _reduce_if_several(stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def reduce(value: Any, group: torch.distributed.ProcessGroup | None = None) -> Any:
        if group is None or group.size() > 1:
            return stock(value, group)
        return value.item() if torch.is_tensor(value) else value  # a tensor with Transformer Engine

    return reduce
