"""Make PyTorch's Adam fast, and optimizers resumable."""

from typing import Any

import torch

from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.remoe.patches.patch import patch, replace


@patch(
    changes={
        "core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict": "fe621ae6",
        "core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict": "7e5f988b",
        "core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states": "40cab784",
    },
    provides="resuming the distributed optimizer without Transformer Engine or apex",
    ends="a distributed torch.optim.AdamW resumes",
    is_needed=True,
)
def enable_torch_adam_resume() -> None:
    """Resume the distributed optimizer without Transformer Engine and apex.

    Megatron has four faults here:
    - it reads the step count from an optimizer state that PyTorch's Adam does not have before its first step, and never
      has on a rank without experts;
    - it copies into views of fp32 parameters with gradients enabled;
    - it shares one step counter among all parameters and then overwrites it with zero;
    - the fully reshardable format asks for a counter that is not saved.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return

    @replace(DistributedOptimizer, "state_dict")
    def state_dict(stock: Any, self: DistributedOptimizer) -> Any:
        is_adam = isinstance(self.optimizer, torch.optim.Adam)  # or AdamW, a subclass
        if is_adam and not any(group["params"] for group in self.optimizer.param_groups):
            self.optimizer.state["no parameter"] = {"step": torch.zeros(())}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if is_adam and not state:
                    state["step"] = _step(0.0, group, parameter)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
        return stock(self)

    @replace(DistributedOptimizer, "load_state_dict")
    @torch.no_grad()
    def load_state_dict(stock: Any, self: DistributedOptimizer, loaded: Any) -> None:
        stock(self, loaded)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if "step" in (state := self.optimizer.state[parameter]):
                    state["step"] = _step(group["step"], group, parameter)

    @replace(DistributedOptimizer, "_set_main_param_and_optimizer_states")
    def set_states(stock: Any, self: DistributedOptimizer, parameter: Any, tensors: dict[str, Any]) -> None:
        stock(self, parameter, {"step": None} | tensors)  # Megatron skips values that are not tensors


@patch(
    changes={"core.optimizer.optimizer:ChainedOptimizer.load_state_dict": "403774c7"},
    provides="resuming a run whose first pipeline stage has no experts",
    ends="Megatron saves the step count of an optimizer that has no parameters on rank 0",
    is_needed=True,
)
def share_optimizer_steps() -> None:
    """Load the same step count into the optimizers of dense and of expert parameters.

    Only rank 0 saves the counts. If it has no experts, the count of their optimizer is missing or 0.
    """

    @replace(ChainedOptimizer, "load_state_dict")
    def load_state_dict(stock: Any, self: ChainedOptimizer, loaded: Any) -> None:
        if len(self.chained_optimizers) > 1 and isinstance(loaded, dict):
            optimizers = [each.get("optimizer", each) for each in loaded.values()]
            _share_largest("common_step", [each["state"] for each in optimizers if "state" in each])
            _share_largest("step", [group for each in optimizers for group in each.get("param_groups", ())])
        stock(self, loaded)


def _share_largest(name: str, places: list[dict[str, Any]]) -> None:
    if steps := [place[name] for place in places if name in place]:
        for place in places:
            place[name] = max(steps)


@patch(
    changes={
        "core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable": "6df6392a",
    },
    provides="right optimizer states with --dist-ckpt-optim-fully-reshardable if a bucket of gradients is padded",
    ends="the method finds parameters at the same place as its world tensors, which leave the buckets' padding out",
    is_needed=True,
)
def keep_padding_of_buckets() -> None:
    """Save and load buckets with their padding.

    Megatron cuts the padding out, but finds each parameter by its place in the padded buffer. With several buckets, the
    parameters after a padded one get values of their neighbours.
    """

    @replace(DistributedOptimizer, "sharded_param_state_fully_reshardable")
    def save_or_load(stock: Any, self: DistributedOptimizer, *arguments: Any, **options: Any) -> Any:
        sized = [(part, part.numel_unpadded) for buffer in self.buffers for part in (buffer, *buffer.buckets)]
        for part, _ in sized:
            part.numel_unpadded = part.grad_data.numel()
        try:
            return stock(self, *arguments, **options)
        finally:
            for part, unpadded in sized:
                part.numel_unpadded = unpadded


def _step(number: float, group: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """Return PyTorch's step counter, an fp32 scalar: on the device if fused or capturable, else on the host."""
    return torch.tensor(float(number), device=parameter.device if group["fused"] or group["capturable"] else "cpu")


@patch(
    changes={"core.optimizer.optimizer:MegatronOptimizer.__init__": "b70d6135"},
    provides="a fused Adam without Transformer Engine or apex",
    ends="Megatron creates PyTorch's Adam with fused=True",
)
def use_fused_adam() -> None:
    """Use PyTorch's fused Adam. Megatron's default reads and writes the optimizer's memory ten times."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return

    @replace(MegatronOptimizer, "__init__")
    def initialize(stock: Any, self: MegatronOptimizer, *arguments: Any, **options: Any) -> None:
        stock(self, *arguments, **options)
        if isinstance(self.optimizer, torch.optim.Adam):
            for group in self.optimizer.param_groups:
                group["fused"] = True
