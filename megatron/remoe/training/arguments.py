"""Add ReMoE's command-line flags to Megatron's parser and translate them into Megatron's arguments."""

import argparse
import os
import sys
from collections.abc import Callable

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.files.errors import UsageError
from megatron.remoe.files.gpt2_files import GPT2_TOKENIZER
from megatron.remoe.kernels.backend import wants_kernels
from megatron.remoe.routing.config import MEGATRON_FIELDS, ReMoEConfig, ReMoEMLAConfig
from megatron.remoe.routing.refusals import as_list, routing_problems, shown
from megatron.remoe.start.checkpoint_files import Resume
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError
from megatron.remoe.start.messages import explain_flag_errors
from megatron.remoe.training.gpt2_tokenizer import use_local_gpt2_files
from megatron.training import arguments as megatron
from megatron.training.argument_utils import ArgumentGroupFactory, gpt_config_from_args, hybrid_config_from_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.models.hybrid import HybridModelConfig

ArgumentsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def add_remoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ReMoE's flags to Megatron's parser: the fields that `ReMoEConfig` adds, and options for training."""
    group = ArgumentGroupFactory(ReMoEConfig, exclude=MEGATRON_FIELDS).build_group(parser, title="ReMoE")
    group.description = "Mixture-of-Experts with ReLU routing (arXiv 2412.14711)"
    group.add_argument(
        "--no-local-layer-fusion",
        action="store_false",
        dest="local_layer_fusion",
        help="With --transformer-impl local: use Megatron's own attention and experts (one small layer per expert) "
        "instead of PyTorch's fused attention and grouped experts.",
    )
    group.add_argument(
        "--no-moe-router-pre-softmax",
        action="store_false",
        dest="moe_router_pre_softmax",
        default=argparse.SUPPRESS,
        help="Undo an earlier --moe-router-pre-softmax (e.g. from a launch script): softmax over the k chosen experts.",
    )
    group.add_argument(
        "--allow-changed-settings",
        action="store_true",
        help="Resume from a checkpoint although the seed, data, batch size, k or other settings that change the "
        "result differ. Without it such a start is refused and the differences are listed.",
    )
    parser.set_defaults(resume_flag="--load", resume_folder="")  # `Resume.apply` sets them
    return parser


def parse_args(extra_args_provider: ArgumentsProvider | None = None) -> argparse.Namespace:
    """Parse the flags without Megatron's validation; apply granularity, defaults and tokenizer files.

    Args:
        extra_args_provider: adds the caller's own flags, as in Megatron.

    Raises:
        ValueError: a flag is wrong, or cannot be used with ReLU routing or granularity.
        DataError: the tokenizer's files are missing or wrong.
    """

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_remoe_arguments(parser)
        # one_logger is not a public package, and Megatron reports its absence at every start.
        parser.set_defaults(enable_one_logger=False, tokenizer_type=GPT2_TOKENIZER)
        # One rank builds the data index while all others wait. After the first step, a hanging rank is found quickly.
        parser.set_defaults(distributed_timeout_minutes=60, distributed_timeout_seconds_after_init=600)
        explain_flag_errors(parser)
        return extra_args_provider(parser) if extra_args_provider is not None else parser

    args = megatron.parse_args(provider)
    apply_granularity(args)
    drop_ignored_fork_flags(args)
    if not args.save and args.rerun_mode == "validate_results":
        # After a NaN loss, Megatron would save a checkpoint for inspection, without a folder to save to.
        args.rerun_mode = "disabled"
    if not args.use_checkpoint_args:
        _check_model(args)
    return args


def load_saved_args(args: argparse.Namespace, resume: Resume | None) -> None:
    """Read the model's shape from the checkpoint with --use-checkpoint-args, and check it. Call it before validation.

    Raises:
        ValueError, DataError: as in `parse_args`; or no complete checkpoint exists (`BrokenCheckpointError`).
    """
    if not args.use_checkpoint_args:
        return
    tokenizer = args.tokenizer_type
    if resume is None:
        problem = "--use-checkpoint-args: there is no checkpoint in --load or --pretrained-checkpoint."
        raise BrokenCheckpointError(problem, "REMOE-E404")
    load_args_from_checkpoint(args, load_arg=resume.flag.removeprefix("--").replace("-", "_"))
    files = getattr(resume.saved, "gpt2_files", None) if args.use_tokenizer_model_from_checkpoint_args else None
    if args.vocab_file:  # this file belongs to the tokenizer of the flags, not to that of the checkpoint
        args.tokenizer_type = tokenizer
    elif files and (all(map(os.path.isfile, files)) or not os.path.isdir(args.tokenizer_model)):
        # Megatron has read the path of a folder made from these files, perhaps on a different machine.
        args.tokenizer_type, (args.vocab_file, args.merge_file) = GPT2_TOKENIZER, files
    _check_model(args)


def _check_model(args: argparse.Namespace) -> None:
    """Check the routing's settings, set implied ones, and find the tokenizer's files."""
    if problems := routing_problems(args):
        raise ValueError("\n".join(problems))
    if args.moe_relu_routing:
        # The L1 term replaces the load-balancing loss. Megatron would still all-reduce and log it, as zero.
        args.moe_router_load_balancing_type = "none"
    use_local_gpt2_files(args)


def drop_ignored_fork_flags(args: argparse.Namespace) -> None:
    """With --moe-relu-routing, drop the top-k settings that the authors' code ignores, and print their names."""
    if not args.moe_relu_routing:
        return
    ignored = []
    types, coefficients = as_list(args.moe_router_load_balancing_type), as_list(args.moe_aux_loss_coeff)
    is_given = any(coefficients) or types not in (["aux_loss"], ["none"])
    if is_given and set(types) <= {"aux_loss", "seq_aux_loss", "sinkhorn", "none"}:  # other types are refused
        coefficient = f" with --moe-aux-loss-coeff {shown(args.moe_aux_loss_coeff)}" if any(coefficients) else ""
        ignored = [f"--moe-router-load-balancing-type {shown(types)}{coefficient}"]
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0
    if args.moe_router_pre_softmax:
        ignored.append("--moe-router-pre-softmax")
        args.moe_router_pre_softmax = False
    if ignored and args.rank == 0:
        print(
            f"With --moe-relu-routing these are ignored, as in the authors' code: {', '.join(ignored)}. "
            "ReLU replaces softmax and top-k; the L1 term replaces the auxiliary loss.",
            file=sys.stderr,
            flush=True,
        )


def apply_granularity(args: argparse.Namespace) -> None:
    """Split each expert into G finer ones: E·G experts, top k·G, hidden size divided by G (paper section 4.3).

    Call this before FLOPs counts, expert-parallel checks and configurations read the arguments, which it changes.

    Raises:
        UsageError: G is below 1, there are no experts, their size is unknown, or G does not divide it.
    """
    granularity = args.moe_granularity
    if granularity == 1:
        return
    size_flag = "--ffn-hidden-size" if args.moe_ffn_hidden_size is None else "--moe-ffn-hidden-size"
    size = args.ffn_hidden_size if args.moe_ffn_hidden_size is None else args.moe_ffn_hidden_size
    given, wrong = f"--moe-granularity {granularity}", ""
    if granularity < 1:
        wrong = f"{given}: must be a whole number of at least 1."
    elif not (args.num_experts or args.use_checkpoint_args):
        wrong = f"{given}: there are no experts to split. Add --num-experts."
    elif not (size or args.use_checkpoint_args):
        wrong = f"{given}: the experts' size is unknown. Add --moe-ffn-hidden-size."
    elif size and size % granularity:
        wrong = f"{size_flag} {size}: not divisible by {given}. Choose a divisor of {size}."
    if wrong:
        raise UsageError(wrong, "REMOE-E205")
    if size:  # otherwise the size comes from the checkpoint, where it is split already
        args.moe_ffn_hidden_size = size // granularity
    for name in ("num_experts", "moe_router_topk", "moe_warmup_topk", "moe_relu_max_experts"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name) * granularity)


def transformer_config_from_args(args: argparse.Namespace) -> TransformerConfig:
    """Build a `ReMoEConfig` if a flag of ReMoE needs it, otherwise Megatron's own configuration."""
    routes = args.moe_relu_routing or args.moe_baseline_router or args.moe_warmup_topk is not None
    ours: type[TransformerConfig] | None = ReMoEConfig if routes or wants_kernels(args) else None
    if ours and args.multi_latent_attention:
        # With this flag set, Megatron would replace the class. Without a rope type, the class's default applies: YaRN.
        ours, rope_type = ReMoEMLAConfig, None if args.rope_type == "yarn" else args.rope_type
        args = argparse.Namespace(**vars(args) | {"multi_latent_attention": False, "rope_type": rope_type})
    return megatron.core_transformer_config_from_args(args, config_class=ours)


def model_config_from_args(args: argparse.Namespace) -> GPTModelConfig | HybridModelConfig:
    """Build the configuration of a HybridModel with --hybrid-layer-pattern, otherwise of a GPTModel."""
    build = gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args
    return build(args, config=transformer_config_from_args(args))
