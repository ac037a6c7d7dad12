"""Hide warnings that the user can do nothing about."""

import logging
import re
import warnings

# These repeat at every start, on every rank. docs/design.md lists the optional packages.
UNHELPFUL_WARNINGS = (
    r".*(Apex|absl\.logging) (is|are) not installed",
    r"Only transformer-engine>=1\.7\.0 supports MoE experts",
    r"MimoModelConfig is experimental",
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"Could not determine rank from torch\.distributed",
    r"torch\.distributed is disabled, unavailable or uninitialized",
    r"The argument order of load has been changed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"`torch\.distributed\.distributed_c10d\._set_pg_timeout` is deprecated",
    r".*invalid escape sequence",  # when Python first compiles Megatron's kv_block_allocator.py
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
)

# logger → pattern of its messages about normal events that are logged as warnings
UNHELPFUL_LOGS = {
    "megatron.core.rerun_state_machine": r"RerunStateMachine initialized|Setting RerunStateMachine|Result validation",
    "megatron.core.tensor_parallel.random": r"CPU RNG state changed within GPU RNG context",
    "megatron.core.models.gpt.gpt_model": r"GPTModel IS DEPRECATED",  # the program prints `GPT_MODEL`
    "megatron.core.dist_checkpointing.strategies.torch": r"MCore's async save is deprecated",
    "torch.utils.cpp_extension": r"No CUDA runtime is found",
}

GPT_MODEL = (
    "This run trains Megatron's GPTModel, which gets no new features. Its successor is HybridModel: set MODEL=hybrid "
    "with a launch script; otherwise replace --num-layers with --hybrid-layer-pattern (per layer '*E' with experts, "
    "'*-' without)."
)


def _is_shown(record: logging.LogRecord) -> bool:
    return not re.search(UNHELPFUL_LOGS[record.name], record.getMessage())


def hide_unhelpful_warnings() -> None:
    """Hide `UNHELPFUL_WARNINGS` and `UNHELPFUL_LOGS`. Call it before Megatron is imported."""
    for message in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in UNHELPFUL_LOGS:
        logging.getLogger(name).addFilter(_is_shown)
