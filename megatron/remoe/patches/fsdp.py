"""Train, save and load with Megatron-FSDP (`--ckpt-format fsdp_dtensor`)."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
    GradReducePipeline,
    ParamAndGradBuffer,
    ParameterGroup,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.fsdp_dtensor_checkpoint import handle_experts_in_state_dict
from megatron.core.transformer.module import Float16Module
from megatron.remoe.patches.patch import patch, replace
from megatron.training import checkpointing

FSDP = "core/distributed/fsdp/src/megatron_fsdp"
OPTIMIZER = "core/optimizer/distrib_optimizer.py"


@patch(
    changes="training/checkpointing.py: preprocess_fsdp_dtensor_state_dict",
    provides="saving with Megatron-FSDP on several ranks, which hangs; checkpoints that no program loads as top-k",
    ends="Megatron lists the same optimizer states on all ranks (NVIDIA/Megatron-LM issue 4910) and compares routings",
)
def adapt_fsdp_checkpoints() -> None:
    """Add an empty optimizer state for each parameter without rows on this rank, and rename ReLU routers' weights.

    Ranks exchange the positions of their rows, one tensor at a time. Optimizers keep no state for a parameter without
    rows, so ranks would wait for each other forever, or exchange positions of different tensors. A ReLU router's weight
    is stored as `relu_weight`; `name_relu_routers` does the same in Megatron's own format.
    """

    @replace(checkpointing, "preprocess_fsdp_dtensor_state_dict")
    def preprocess(stock: Any, args: Any, state: dict[str, Any], model: torch.nn.Module) -> Any:
        if "optimizer" in state:
            parameters = handle_experts_in_state_dict(dict(model.named_parameters()), args.num_experts)
            state = state | {"optimizer": _with_all_states(state["optimizer"], parameters)}
        state = stock(args, state, model)
        routers = [key.removesuffix("l1_exponent") for key in state["model"] if key.endswith(".router.l1_exponent")]
        for router in routers:
            state["model"][f"{router}relu_weight"] = state["model"].pop(f"{router}weight")
        return state


def _with_all_states(optimizer: dict[str, Any], parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the optimizer's state with an entry for each parameter, in the same order on all ranks."""
    states = optimizer["state"]
    mine: dict[str, torch.Tensor] = next(iter(states.values()), {})  # a rank may have none
    dtypes: list[dict[str, torch.dtype]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        dtypes, {name: value.dtype for name, value in mine.items() if isinstance(value, DTensor)}
    )

    def empty(name: str) -> dict[str, torch.Tensor]:
        parameter = parameters[name.removeprefix("module.")]
        return {key: torch.zeros_like(parameter, dtype=dtype) for key, dtype in max(dtypes, key=len).items()}

    return optimizer | {"state": {name: states.get(name) or empty(name) for name in optimizer["param_to_group_meta"]}}


@patch(
    changes="training/checkpointing.py: handle_swiglu_in_state_dict",
    provides="saving SwiGLU layers with Megatron-FSDP in fp32: it ends with an error",
    ends="handle_swiglu_in_state_dict finds parameters without Float16Module",
)
def find_parameters_in_fp32() -> None:
    """Find a model's parameters by name if Megatron-FSDP wraps it without a Float16Module in between."""

    @replace(checkpointing, "handle_swiglu_in_state_dict")
    def split(stock: Any, model: torch.nn.Module, *states: Any) -> Any:
        if not isinstance(model.module, Float16Module):
            find = type(model).get_parameter
            model.get_parameter = lambda target: find(  # type: ignore[method-assign]
                model, target.replace("module.module.", "module.", 1)
            )
        return stock(model, *states)


@patch(
    changes=f"{OPTIMIZER}: DistributedOptimizer._copy_model_params_to_main_params",
    provides="--finetune and --no-load-optim with Megatron-FSDP in half precision: they end with an error",
    ends="reload_model_params does nothing with Megatron-FSDP",
)
def keep_loaded_main_weights() -> None:
    """Do not overwrite Megatron-FSDP's main weights with the model's: checkpoints are loaded into the main weights."""

    @replace(DistributedOptimizer, "_copy_model_params_to_main_params")
    def copy(stock: Any, self: DistributedOptimizer, *arguments: Any, **options: Any) -> None:
        if not self.ddp_config.use_megatron_fsdp:
            stock(self, *arguments, **options)


@patch(
    changes=f"{FSDP}/param_and_grad_buffer.py: GradReducePipeline._bucket_group_gradient_reduce",
    provides="right gradients of experts with Megatron-FSDP if each is on one rank and gradients are accumulated",
    ends="a buffer of one rank is reduced once per step (NVIDIA/Megatron-LM issue 6660)",
)
def scale_once_per_step() -> None:
    """Scale gradients held by a single rank once per step.

    After each micro-batch, Megatron divides such a buffer, with the sums of earlier micro-batches in it, by the number
    of data parallel ranks. With a different dtype for communication, it even adds the buffer to itself.
    """

    @replace(GradReducePipeline, "_bucket_group_gradient_reduce")
    def reduce(stock: Any, self: GradReducePipeline, buckets: list[int], *rest: Any, **options: Any) -> bool:
        if not all(_is_on_one_rank(self.buffer, self.buffer.parameter_groups[bucket]) for bucket in buckets):
            return bool(stock(self, buckets, *rest, **options))
        for bucket in buckets:
            self.bucket_grad_ready_params[bucket] = set()
        return True

    @replace(MegatronFSDP, "attach_grad_to_optimizer_state")
    def attach(stock: Any, self: MegatronFSDP) -> None:
        for group in self.param_and_grad_buffer.parameter_groups:
            if _is_on_one_rank(self.param_and_grad_buffer, group):
                factor = group.main_grad_buffer.gradient_scaling_factor
                group.main_grad_buffer.data.mul_(1.0 if factor is None else factor)
        stock(self)


def _is_on_one_rank(buffer: ParamAndGradBuffer, group: ParameterGroup) -> bool:
    """Return whether one rank has all of a group's gradients, and Megatron reduces them after each micro-batch."""
    reduces_each_time = buffer.ddp_config.data_parallel_sharding_strategy in ("optim_grads", "optim_grads_params")
    gradients = group.main_grad_buffer
    is_alone = gradients is not None and gradients.data_parallel_group.size() == 1
    return is_alone and reduces_each_time and not buffer.dist_index.use_hybrid_fsdp
