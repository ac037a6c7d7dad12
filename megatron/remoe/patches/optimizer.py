"""PyTorch's Adam in the distributed optimizer, used if neither Transformer Engine nor apex is installed."""

from functools import wraps
from typing import Any

import torch

from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def enable_torch_adam_resume() -> None:
    """Resume the distributed optimizer without Transformer Engine and apex.

    Megatron has four faults here. It reads the step count from an optimizer state that PyTorch's Adam does not have
    before its first step. It copies into views of fp32 parameters with gradients enabled. It shares one step counter
    among all parameters and then overwrites it with zero. The fully reshardable format asks for a counter that is not
    saved.
    """
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(state_dict, "__wrapped__"):
        return

    @wraps(state_dict)
    def state_dict_with_steps(self: DistributedOptimizer) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state and isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
                    state["step"] = _step(0.0, group, parameter)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state_dict(self)

    @wraps(load_state_dict)
    @torch.no_grad()
    def load_state_dict_with_steps(self: DistributedOptimizer, loaded: Any) -> None:
        load_state_dict(self, loaded)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if "step" in (state := self.optimizer.state[parameter]):
                    state["step"] = _step(group["step"], group, parameter)

    @wraps(set_states)
    def set_states_but_steps(self: DistributedOptimizer, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, {"step": None} | tensors)  # Megatron skips values that are not tensors

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_steps
    DistributedOptimizer.state_dict = state_dict_with_steps
    DistributedOptimizer.load_state_dict = load_state_dict_with_steps


def _step(number: float, group: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """Return PyTorch's step counter: on the device for a fused or capturable optimizer, else on the host."""
    return torch.tensor(float(number), device=parameter.device if group["fused"] or group["capturable"] else "cpu")


def use_fused_adam() -> None:
    """Use PyTorch's fused Adam in the distributed optimizer without Transformer Engine and apex.

    Megatron creates the default one, which passes over memory about ten times.
    """
    initialize = DistributedOptimizer.__init__
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(initialize, "__wrapped__"):
        return

    @wraps(initialize)
    def initialize_fused(self: DistributedOptimizer, *arguments: Any, **options: Any) -> None:
        initialize(self, *arguments, **options)
        if isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for group in self.optimizer.param_groups:
                group["fused"] = True

    DistributedOptimizer.__init__ = initialize_fused
