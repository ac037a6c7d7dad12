"""All that is changed in Megatron outside the CPU part: what runs need to start, to resume and to stop in good order.

No public hook reaches any of them. `PATCHES` says of each what it changes, why, and what ends it; a test of each fails
once Megatron no longer needs it.
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
)
from megatron.remoe.patches.fusions import (
    add_weight_gradients_by_torch,
    fuse_cross_entropy_without_compiler,
    fuse_rotary_embedding_without_engine,
)
from megatron.remoe.patches.log_lines import tell_what_is_printed
from megatron.remoe.patches.optimizer import let_torch_adam_resume, use_fused_adam
from megatron.remoe.patches.start import count_operations_of_warmup, use_shipped_helpers
from megatron.remoe.patches.waits import ask_no_other_rank_if_alone, keep_norms_on_the_device, validate_once_a_step

READ_AGAINST = ("0.19.0", "0.19.1", "0.19.2")  # megatron-core, in which all that is changed here is the same


@dataclass(frozen=True)
class Patch:
    """One change of Megatron.

    Attributes:
        apply: makes it; once or more often.
        changes: file and function of Megatron.
        lacks: what a user has to do without where it is not applied.
        ends: what tells that it is no longer needed.
        for_saving: whether only trainings that save need it.
    """

    apply: Callable[[], None]
    changes: str
    lacks: str
    ends: str
    for_saving: bool = False


PATCHES = (
    Patch(
        use_shipped_helpers,
        "core/datasets/utils.py: compile_helpers",
        "a start without Megatron's Makefile, which the wheel does not hold",
        "compile_helpers takes the compiled helpers, or the wheel holds the Makefile",
    ),
    Patch(
        let_torch_adam_resume,
        "core/optimizer/distrib_optimizer.py: DistributedOptimizer's state_dict, load_state_dict and "
        "_set_main_param_and_optimizer_states",
        "resuming the distributed optimizer without Transformer Engine or apex",
        "a distributed torch.optim.AdamW resumes",
    ),
    Patch(
        use_fused_adam,
        "core/optimizer/distrib_optimizer.py: DistributedOptimizer.__init__",
        "an Adam that passes over memory once, on GPUs without Transformer Engine or apex",
        "Megatron asks PyTorch's Adam to be fused",
    ),
    Patch(
        keep_norms_on_the_device,
        "core/optimizer/clip_grads.py: l2_norm_impl",
        "a gradient norm without a wait a tensor, on GPUs without Transformer Engine or apex",
        "local_multi_tensor_l2_norm in core/utils.py asks for no value on the host",
    ),
    Patch(
        validate_once_a_step,
        "core/rerun_state_machine.py: RerunStateMachine's validate_result and should_run_forward_backward",
        "one wait a step for losses and gradients that are not finite, instead of two for each of them",
        "validate_result asks for no value on the host",
    ),
    Patch(
        ask_no_other_rank_if_alone,
        "training/training.py: reduce_max_stat_across_model_parallel_group, logical_and_across_model_parallel_group",
        "a step without five waits for a model parallel group of one rank",
        "both return at once in a group of one rank",
    ),
    Patch(
        add_weight_gradients_by_torch,
        "core/tensor_parallel/layers.py: fused_weight_gradient_mlp_cuda",
        "weight gradients that are added to the fp32 ones by the product itself, on GPUs without apex",
        "linear layers accumulate weight gradients without apex's module",
    ),
    Patch(
        fuse_cross_entropy_without_compiler,
        "core/models/common/language_module/language_module.py: fused_vocab_parallel_cross_entropy",
        "a cross entropy in one pass forward and one backward, without Transformer Engine",
        "the native fusion reads bf16 logits once forward and once backward",
    ),
    Patch(
        fuse_rotary_embedding_without_engine,
        "core/models/common/embeddings/rope_utils.py: fused_apply_rotary_pos_emb",
        "rotary embedding in one kernel, without Transformer Engine",
        "rope fusion takes a kernel that needs no Transformer Engine",
    ),
    Patch(
        count_operations_of_warmup,
        "training/training.py: num_floating_point_operations",
        "the floating-point operations of --moe-warmup-topk's steps",
        "the count is told the experts per token of a step",
    ),
    Patch(
        tell_what_is_printed,
        "training/training.py: print_rank_last",
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
        check_loaded_weights,
        "training/training.py: load_checkpoint",
        "an error where a checkpoint cannot be loaded or holds weights that are not finite",
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
    """Make the changes; with a version of Megatron that they were not read against none, and warn of what is lacking.

    With REMOE_TRY_MEGATRON in the environment they are made in any version.

    Args:
        saves: whether checkpoints will be written.
    """
    patches = [patch for patch in PATCHES if saves or not patch.for_saving]
    version = importlib.metadata.version("megatron-core")
    if version in READ_AGAINST or os.environ.get("REMOE_TRY_MEGATRON"):
        for patch in patches:
            patch.apply()
    elif os.environ.get("RANK", "0") == "0":
        lacking = "".join(f"\n- {patch.lacks} ({patch.changes})" for patch in patches)
        warnings.warn(
            f"megatron-core {version}: the changes that are made in Megatron otherwise were read against "
            f"{', '.join(READ_AGAINST)} and are left out. You do without:{lacking}",
            stacklevel=2,
        )
