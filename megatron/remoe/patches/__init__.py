"""Every change to Megatron outside the CPU room, for places that no public hook reaches.

`PATCHES` lists what each one changes, what it provides, and what ends it. Each has a test that fails once Megatron no
longer needs it.
"""

import importlib.metadata
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from megatron.remoe.patches.checkpoints import (
    check_loaded_weights,
    keep_saving_possible,
    load_objects_unexecuted,
    save_durably,
    tell_why_writing_fails,
    verify_loaded_bytes,
)
from megatron.remoe.patches.fusions import (
    enable_torch_weight_gradient_fusion,
    use_fla_cross_entropy,
    use_rotary_kernel,
)
from megatron.remoe.patches.log_lines import forward_figures
from megatron.remoe.patches.optimizer import enable_torch_adam_resume, use_fused_adam
from megatron.remoe.patches.start import count_warmup_flops, use_shipped_helpers
from megatron.remoe.patches.time_left import print_time_left
from megatron.remoe.patches.waits import keep_norms_on_device, skip_single_rank_reductions, validate_once_per_step

VERSIONS = ("0.19.0", "0.19.1", "0.19.2")  # of megatron-core; the patched code is the same in all of them


@dataclass(frozen=True)
class Patch:
    """One change to Megatron.

    Attributes:
        apply: applies it; may be called more than once.
        changes: file and function of Megatron.
        provides: what a user loses without it.
        ends: the change in Megatron that makes it unnecessary.
        for_saving: needed only if the training saves checkpoints.
    """

    apply: Callable[[], None]
    changes: str
    provides: str
    ends: str
    for_saving: bool = False


PATCHES = (
    Patch(
        use_shipped_helpers,
        "core/datasets/utils.py: compile_helpers",
        "a start without Megatron's Makefile, which is missing from the wheel",
        "compile_helpers uses the compiled helpers, or the wheel contains the Makefile",
    ),
    Patch(
        enable_torch_adam_resume,
        "core/optimizer/distrib_optimizer.py: DistributedOptimizer's state_dict, load_state_dict and "
        "_set_main_param_and_optimizer_states",
        "resuming the distributed optimizer without Transformer Engine or apex",
        "a distributed torch.optim.AdamW resumes",
    ),
    Patch(
        use_fused_adam,
        "core/optimizer/distrib_optimizer.py: DistributedOptimizer.__init__",
        "a fused Adam on GPUs without Transformer Engine or apex",
        "Megatron creates PyTorch's Adam with fused=True",
    ),
    Patch(
        keep_norms_on_device,
        "core/optimizer/clip_grads.py: l2_norm_impl",
        "one host wait for the gradient norm instead of one per tensor, on GPUs without Transformer Engine or apex",
        "local_multi_tensor_l2_norm in core/utils.py reads no value on the host",
    ),
    Patch(
        validate_once_per_step,
        "core/rerun_state_machine.py: RerunStateMachine's validate_result and should_run_forward_backward",
        "one host wait per step for the NaN and Inf checks instead of two per loss and gradient bucket",
        "validate_result reads no value on the host",
    ),
    Patch(
        skip_single_rank_reductions,
        "training/training.py: reduce_max_stat_across_model_parallel_group, logical_and_across_model_parallel_group",
        "a step without five host waits for a model parallel group of one rank",
        "both return immediately in a group of one rank",
    ),
    Patch(
        enable_torch_weight_gradient_fusion,
        "core/tensor_parallel/layers.py: fused_weight_gradient_mlp_cuda",
        "--gradient-accumulation-fusion on GPUs without apex",
        "linear layers accumulate weight gradients without apex's module",
    ),
    Patch(
        use_fla_cross_entropy,
        "core/models/common/language_module/language_module.py: fused_vocab_parallel_cross_entropy",
        "a cross entropy that reads the logits once in each direction, without Transformer Engine",
        "the native fusion reads bf16 logits once forward and once backward",
    ),
    Patch(
        use_rotary_kernel,
        "core/models/common/embeddings/rope_utils.py: fused_apply_rotary_pos_emb",
        "rotary embedding in one kernel, without Transformer Engine",
        "rope fusion has a kernel that needs no Transformer Engine",
    ),
    Patch(
        count_warmup_flops,
        "training/training.py: num_floating_point_operations",
        "the right FLOPs for the steps of --moe-warmup-topk",
        "the FLOPs count receives the experts per token of the step",
    ),
    Patch(
        print_time_left,
        "training/training.py: print_rank_last",
        "the time left in each line of the log",
        "Megatron prints it",
    ),
    Patch(
        forward_figures,
        "training/training.py: training_log, evaluate_and_print_results and save_checkpoint",
        "losses and evaluations in SAVE/metrics.jsonl",
        "Megatron hands the figures of a log interval to a writer of the caller's",
        for_saving=True,
    ),
    Patch(
        load_objects_unexecuted,
        "core/dist_checkpointing/strategies/torch.py: MCoreLoadPlanner.load_bytes",
        "protection from code in a checkpoint's objects",
        "load_bytes unpickles with weights_only=True",
    ),
    Patch(
        verify_loaded_bytes,
        "core/dist_checkpointing/strategies/torch.py: FileSystemReader and TorchDistLoadShardedStrategy.load",
        "changed bits in a checkpoint's tensors are found",
        "PyTorch compares records with their CRC-32 when it loads, and Megatron lets ranks fail together",
    ),
    Patch(
        check_loaded_weights,
        "training/training.py: load_checkpoint",
        "going back where a checkpoint is damaged; an error where it cannot be loaded or its weights are not finite",
        "Megatron has a hook after loading, and no sys.exit() in checkpointing.py",
    ),
    Patch(
        save_durably,
        "training/checkpointing.py: maybe_msc",
        "checkpoints that survive a power cut from the moment they are reported as saved",
        "save_checkpoint calls fsync for metadata.json, the folder and the tracker",
        for_saving=True,
    ),
    Patch(
        keep_saving_possible,
        "core/dist_checkpointing/strategies/filesystem_async.py: _results_queue",
        "the checkpoint that is saved at SIGTERM where the signal goes to all processes, as Slurm's does",
        "the queue's process ignores SIGTERM, or there is none",
        for_saving=True,
    ),
    Patch(
        tell_why_writing_fails,
        "core/dist_checkpointing/strategies/filesystem_async.py: FileSystemWriterAsync.write_preloaded_data",
        "the file and the reason where a checkpoint cannot be written",
        "the error of a failed write reaches the caller whole",
        for_saving=True,
    ),
)


def apply_patches(saves: bool = True) -> None:
    """Apply the patches. With another version of Megatron, apply none and warn about what is missing.

    The environment variable REMOE_TRY_MEGATRON applies them to any version.

    Args:
        saves: whether the training writes checkpoints.
    """
    patches = [patch for patch in PATCHES if saves or not patch.for_saving]
    version = importlib.metadata.version("megatron-core")
    if version in VERSIONS or os.environ.get("REMOE_TRY_MEGATRON"):
        for patch in patches:
            patch.apply()
    elif os.environ.get("RANK", "0") == "0":
        missing = "".join(f"\n- {patch.provides} ({patch.changes})" for patch in patches)
        warnings.warn(
            f"megatron-core {version} is untested, so no patch is applied (tested: {', '.join(VERSIONS)}). "
            f"You lose:{missing}",
            stacklevel=2,
        )
