"""Change Megatron where no public hook exists; changes for CPUs are in `megatron/remoe/cpu`.

Each patch states what it changes, what it provides, and what ends it. A test for each fails once Megatron no longer
needs it.
"""

import os
import warnings

import megatron.remoe
from megatron.remoe.patches.checkpoints import (
    check_loaded_weights,
    keep_saving_possible,
    load_objects_unexecuted,
    report_write_errors,
    save_durably,
    verify_loaded_bytes,
)
from megatron.remoe.patches.fsdp import (
    find_parameters_in_fp32,
    keep_loaded_main_weights,
    list_all_optimizer_states,
    scale_once_per_step,
)
from megatron.remoe.patches.fusions import (
    enable_torch_weight_gradient_fusion,
    use_fla_cross_entropy,
    use_rotary_kernel,
)
from megatron.remoe.patches.log_lines import forward_figures
from megatron.remoe.patches.optimizer import enable_torch_adam_resume, use_fused_adam
from megatron.remoe.patches.start import print_time_left, use_shipped_helpers
from megatron.remoe.patches.validation import fill_validation_batches
from megatron.remoe.patches.waits import keep_norms_on_device, skip_single_rank_reductions, validate_once_per_step

VERSIONS = ("0.19.0", "0.19.1", "0.19.2")  # of megatron-core; the patched code is the same in all of them

PATCHES = (
    use_shipped_helpers,
    enable_torch_adam_resume,
    use_fused_adam,
    keep_norms_on_device,
    validate_once_per_step,
    skip_single_rank_reductions,
    enable_torch_weight_gradient_fusion,
    use_fla_cross_entropy,
    use_rotary_kernel,
    print_time_left,
    fill_validation_batches,
    forward_figures,
    load_objects_unexecuted,
    verify_loaded_bytes,
    check_loaded_weights,
    save_durably,
    keep_saving_possible,
    report_write_errors,
    list_all_optimizer_states,
    find_parameters_in_fp32,
    keep_loaded_main_weights,
    scale_once_per_step,
)


def apply_patches(saves: bool = True) -> None:
    """Apply the patches. With an untested version of Megatron, apply none, and warn with a list of what is lost.

    The environment variable REMOE_TRY_MEGATRON applies them to any version.

    Args:
        saves: whether the training writes checkpoints.
    """
    patches = [patch for patch in PATCHES if saves or not patch.for_saving]
    version = megatron.remoe.megatron_version()
    if version in VERSIONS or os.environ.get("REMOE_TRY_MEGATRON"):
        for patch in patches:
            patch()
    elif os.environ.get("RANK", "0") == "0":
        missing = "".join(f"\n- {patch.provides} ({patch.changes})" for patch in patches)
        warnings.warn(
            f"megatron-core {version} is untested, so no patch is applied (tested: {', '.join(VERSIONS)}). "
            f"You lose:{missing}",
            stacklevel=2,
        )
