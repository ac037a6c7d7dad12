"""Train towards a frozen teacher: add KL(teacher ‖ student) of the next token to the loss (--teacher)."""

import argparse
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model
from megatron.remoe.files.errors import UsageError
from megatron.remoe.routing.refusals import flag, shown
from megatron.remoe.start.checkpoint_files import check_is_whole, iteration_folder
from megatron.remoe.start.checkpoint_fit import check_is_finite
from megatron.remoe.start.compared_settings import RESULT_OF_EXPERTS, RESULT_OF_RELU, differences, picked, shape
from megatron.remoe.training.hooks import ModelConfig, build_model

# The whole teacher runs on each rank, on the student's tokens: no setting may split, reorder or capture the model.
REFUSED = {
    **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "mtp_num_layers": None},
    **{"overlap_moe_expert_parallel_comm": False, "cuda_graph_impl": "none", "hybrid_layer_pattern": None},
    **{"use_megatron_fsdp": False, "use_torch_fsdp2": False, "init_model_with_meta_device": False},
}


def with_teacher(
    args: argparse.Namespace, model_cfg: ModelConfig, forward_step: Callable[..., Any]
) -> Callable[..., Any]:
    """Return `forward_step`, whose loss then has weight · KL(teacher ‖ student) added in training.

    Without --teacher it is returned unchanged.

    Args:
        args: Megatron's arguments, validated.
        model_cfg: the configuration that the student will be built from.
        forward_step: as Megatron's loop takes it; its loss function returns the sum of the losses, the number of
            tokens, and a report.

    Raises:
        UsageError: the teacher cannot be read, is another kind of model, or does not work with a setting.
    """
    if args.teacher is None:
        return forward_step
    teacher = Teacher(args)
    model_cfg.post_wrap_hooks.append(teacher.watch)

    @wraps(forward_step)
    def step(*arguments: Any, **options: Any) -> tuple[Any, Callable[..., Any]]:
        output, loss_func = forward_step(*arguments, **options)
        return output, partial(teacher.add_loss, loss_func)

    return step


class Teacher:
    """A frozen model of the student's shape, and its divergence from the student on the current micro-batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder = iteration_folder(Path(args.teacher))
        if folder is None:
            raise UsageError(f"--teacher {args.teacher}: there is no checkpoint.", "REMOE-E404")
        self._folder, saved = str(folder), check_is_whole(folder).get("args")
        if saved is None:
            raise UsageError(f"--teacher {args.teacher}: holds no arguments of its training.", "REMOE-E212")
        wrong = [name for name, value in REFUSED.items() if getattr(args, name, value) != value]
        if wrong:
            flags = ", ".join(f"{flag(name)} {shown(getattr(args, name))}" for name in wrong)
            raise UsageError(f"{flags}: does not work with --teacher. Leave it out.", "REMOE-E212")
        if different := differences(args, saved, shape):
            raise UsageError(
                f"--teacher {args.teacher}: is a model of another shape: {different}. Give the checkpoint that the "
                "model in training was made from.",
                "REMOE-E212",
            )
        routing = {"moe_relu_routing": False} | picked(saved, [*RESULT_OF_EXPERTS, *RESULT_OF_RELU, "moe_relu_routing"])
        unused = {"moe_warmup_topk": None, "perform_initialization": False}
        self._args = argparse.Namespace(**(vars(args) | routing | unused))
        self._weight = args.teacher_weight
        self._logits: torch.Tensor | None = None
        self._divergence: torch.Tensor | None = None
        self._mask = torch.empty(0)

    def watch(self, model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Load the teacher, and follow the forward passes of the student, which is the only chunk."""
        teacher = self._load()
        student = get_attr_wrapped_model(model_chunks[0], "output_layer", return_model_obj=True)

        def ask_teacher(_student: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            self._divergence = None
            if torch.is_grad_enabled():
                with torch.no_grad():
                    self._logits = teacher(*inputs[:3])
                self._mask = options["loss_mask"]

        def compare(_layer: Any, _inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
            # Here, because Megatron's cross entropy writes into the logits.
            if self._logits is not None:
                kl_BS = divergence(self._logits, output[0].transpose(0, 1))
                self._divergence, self._logits = (kl_BS * self._mask).sum(), None

        student.register_forward_pre_hook(ask_teacher, with_kwargs=True)
        student.output_layer.register_forward_hook(compare)
        return model_chunks

    def add_loss(
        self, loss_func: Callable[..., Any], output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return what `loss_func` returns, with the divergence in the loss and, as "teacher kl", in the report."""
        loss, num_tokens, report = loss_func(output)
        kl, self._divergence = self._divergence, None
        if kl is None:
            return loss, num_tokens, report
        return loss + self._weight * kl, num_tokens, report | {"teacher kl": torch.stack([kl.detach(), num_tokens])}

    def _load(self) -> torch.nn.Module:
        model = build_model(self._args).cuda()
        metadata = (dist_checkpointing.load_content_metadata(self._folder) or {}) | {
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)
        }
        # Objects are Transformer Engine's state for FP8.
        _, wanted = extract_matching_values(
            model.sharded_state_dict(metadata=metadata), lambda value: isinstance(value, ShardedObject)
        )
        loaded = dist_checkpointing.load({"model": wanted}, self._folder, validate_access_integrity=False)
        model.load_state_dict(loaded["model"], strict=False)
        check_is_finite(f"--teacher {self._args.teacher}", model)
        if self._args.bf16 or self._args.fp16:
            model = Float16Module(model.config, model)
        return model.eval().requires_grad_(False)


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) = Σ p (log p - log q) in nats, `[...]`, from logits `[..., vocabulary]`."""
    log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
