"""PyTorch's Adam in the distributed optimizer, where neither Transformer Engine nor apex brings another."""

from functools import wraps
from typing import Any

import torch

from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def let_torch_adam_resume() -> None:
    """Let the distributed optimizer go on from a checkpoint where neither Transformer Engine nor apex is installed.

    Before it loads, Megatron reads the number of steps out of the optimizer's state, which PyTorch's Adam does not have
    before its first step. Loading copies into views of fp32 parameters with gradients on, lets all parameters share one
    counter of steps, and then overwrites it with the zero from before; in the fully reshardable format it asks for a
    counter that is not saved.
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
        set_states(self, parameter, {"step": None} | tensors)  # what is no tensor is left alone

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_steps
    DistributedOptimizer.state_dict = state_dict_with_steps
    DistributedOptimizer.load_state_dict = load_state_dict_with_steps


def _step(number: float, group: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """PyTorch's counter of steps: where the kernel that takes all of a parameter's state reads it, or on the host."""
    return torch.tensor(float(number), device=parameter.device if group["fused"] or group["capturable"] else "cpu")


def use_fused_adam() -> None:
    """Let PyTorch's Adam, in the distributed optimizer, pass over memory once where no engine brings another.

    Megatron gives PyTorch no choice, and by default it makes a pass for each of about ten operations.
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
