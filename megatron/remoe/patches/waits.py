"""Remove host waits for the GPU from a training step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron.core.optimizer import clip_grads
from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
from megatron.core.utils import local_multi_tensor_l2_norm
from megatron.remoe.patches.patch import patch, replace


@patch(
    changes={"core.utils:local_multi_tensor_l2_norm": "01526c55"},
    provides="one host wait for the gradient norm, not one per tensor, on GPUs without Transformer Engine or apex",
    ends="local_multi_tensor_l2_norm in core/utils.py reads no value on the host",
)
def keep_norms_on_device() -> None:
    """Compute the gradient norm on the GPU. On the CPU, keep Megatron's function, so that results stay the same."""
    if clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm:
        return

    @replace(clip_grads, "l2_norm_impl")
    def norm(stock: Any, chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], *rest: Any) -> Any:
        tensors = [tensor for tensors in tensor_lists for tensor in tensors]
        if all(tensor.is_cuda for tensor in tensors):
            return torch.nn.utils.get_total_norm(tensors).to(torch.float32).reshape(1), None
        return stock(chunk_size, noop_flag, tensor_lists, *rest)


@patch(
    changes={
        "core.rerun_state_machine:RerunStateMachine.validate_result": "d62c830f",
        "core.rerun_state_machine:RerunStateMachine.should_run_forward_backward": "eec0cc6e",
    },
    provides="one host wait per step for the NaN and Inf checks instead of two per loss and gradient bucket",
    ends="validate_result reads no value on the host",
)
def validate_once_per_step() -> None:
    """Check losses and gradients for NaN and Inf once per step.

    The flags stay on the device until the last backward pass has finished. If one is set, Megatron's own validation
    runs for all results, in order and before the optimizer step.
    """

    def waiting(machine: RerunStateMachine) -> list[tuple[torch.Tensor, Callable[[], None]]]:
        return vars(machine).setdefault("remoe_waiting", [])

    @replace(RerunStateMachine, "validate_result")
    def validate(
        stock: Any, self: RerunStateMachine, result: Any, rejection_func: Any, *rest: Any, **options: Any
    ) -> None:
        waits = self.state == RerunState.INITIAL_RUN and self.mode != RerunMode.REPORT_DETERMINISM_STATS
        if not waits or rejection_func not in (torch.isnan, torch.isinf) or self.error_injector.should_inject_errors:
            return stock(self, result, rejection_func, *rest, **options)
        result = result.detach()
        validate_now = partial(stock, self, result, rejection_func, *rest, **options)
        waiting(self).append((rejection_func(result), validate_now))

    @replace(RerunStateMachine, "should_run_forward_backward")
    def run_again(stock: Any, self: RerunStateMachine, data_iterator: Any) -> bool:
        results = waiting(self)[:]
        waiting(self).clear()
        if results and torch.stack([is_rejected for is_rejected, _ in results]).any():
            for _, validate_now in results:
                validate_now()
        return bool(stock(self, data_iterator))
