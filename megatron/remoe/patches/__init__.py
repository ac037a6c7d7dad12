"""Change Megatron where no public hook exists; changes for CPUs are in `megatron/remoe/cpu`.

Each patch states what it changes, what it provides, and which change in Megatron makes it unnecessary. For each patch,
a test fails once Megatron no longer needs it. A patch is applied if the source that it changes is the one that it was
written for, whatever the version.
"""

import os
import warnings

import megatron.remoe
from megatron.remoe.files.errors import UsageError
from megatron.remoe.patches import checkpoints, fusions, log_lines, optimizer, start, validation, waits

TESTED = "0.19.2"  # the version of megatron-core that the tests run with

PATCHES = (
    start.use_shipped_helpers,
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
)


def apply_patches(saves: bool = True) -> None:
    """Apply the patches whose source in Megatron is unchanged. Warn of others that only add comfort or speed.

    With the environment variable REMOE_TRY_MEGATRON, apply all.

    Args:
        saves: whether the run writes checkpoints.

    Raises:
        UsageError: the source of a needed patch has changed.
    """
    lost: dict[bool, str] = {True: "", False: ""}  # by Patch.is_needed
    for patch in PATCHES:
        if patch.for_saving and not saves:
            continue
        if (changed := patch.find_changed()) and not os.environ.get("REMOE_TRY_MEGATRON"):
            lost[patch.is_needed] += f"\n- {patch.provides} (megatron.{', megatron.'.join(changed)})"
        else:
            patch()
    version = megatron.remoe.megatron_version()
    if lost[True]:
        raise UsageError(
            f"megatron-core {version} has changed code that this project patches. Without these patches, results would "
            f"be wrong or checkpoints unsafe:{lost[True]}\nInstall megatron-core {TESTED}, or set REMOE_TRY_MEGATRON=1 "
            "to apply the patches anyway.",
            "REMOE-E104",
        )
    if lost[False] and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"megatron-core {version} has changed code. Features that are off:{lost[False]}", stacklevel=2)
