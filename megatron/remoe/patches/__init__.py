"""Change Megatron where no public hook exists; changes for CPUs are in `megatron/remoe/cpu`.

Each patch states what it changes, what it provides, and which change in Megatron makes it unnecessary. For each patch,
a test fails once Megatron no longer needs it.
"""

import os
import warnings

import megatron.remoe
from megatron.remoe.patches import checkpoints, fsdp, fusions, log_lines, optimizer, start, validation, waits

VERSIONS = ("0.19.2",)  # versions of megatron-core with the same patched code

PATCHES = (
    start.use_shipped_helpers,
    start.print_time_left,
    optimizer.enable_torch_adam_resume,
    optimizer.share_optimizer_steps,
    optimizer.keep_padding_of_buckets,
    optimizer.use_fused_adam,
    waits.keep_norms_on_device,
    waits.validate_once_per_step,
    fusions.enable_torch_weight_gradient_fusion,
    fusions.use_fla_cross_entropy,
    validation.fill_validation_batches,
    validation.seed_data_loaders,
    log_lines.forward_figures,
    checkpoints.refuse_unsafe_objects,
    checkpoints.go_back_from_damage,
    checkpoints.name_relu_routers,
    checkpoints.protect_saving_from_sigterm,
    checkpoints.report_write_errors,
    fsdp.adapt_fsdp_checkpoints,
    fsdp.find_parameters_in_fp32,
    fsdp.keep_loaded_main_weights,
    fsdp.scale_once_per_step,
)


def apply_patches(saves: bool = True) -> None:
    """Apply the patches. With an untested version of Megatron, apply none, and warn with a list of lost features.

    With the environment variable REMOE_TRY_MEGATRON, apply them to any version.

    Args:
        saves: whether the run writes checkpoints.
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
            f"Lost features:{missing}",
            stacklevel=2,
        )
