"""Command-line flags of ReMoE on top of Megatron's, and what they do to Megatron's arguments."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.compatibility import relu_routing_problems
from megatron.remoe.config import ReMoEConfig
from megatron.remoe.data.tokenizer import use_local_gpt2_files
from megatron.remoe.training.checkpoints import choose_checkpoint
from megatron.remoe.training.dataset_helpers import use_shipped_helpers
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables

ArgumentsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def add_remoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of ReMoE to Megatron's parser."""
    group = parser.add_argument_group("ReMoE", "Mixture-of-Experts with ReLU routing (arXiv 2412.14711)")
    group.add_argument(
        "--moe-relu-routing",
        action="store_true",
        help="Route by ReLU(x W) instead of top-k of a softmax: each token takes the experts with a positive gate, "
        "and an adaptive L1 term holds the sparsity at 1 - topk/experts.",
    )
    group.add_argument(
        "--moe-relu-l1-reg-coeff-init",
        type=float,
        default=1e-8,
        help="Initial coefficient of the L1 term (default 1e-8). It is not sensitive: larger settles sooner.",
    )
    group.add_argument(
        "--moe-relu-l1-reg-coeff-multiplier",
        type=float,
        default=1.2,
        help="Factor by which the coefficient grows or shrinks once per step (default 1.2). "
        "Larger settles sooner and swings more.",
    )
    group.add_argument(
        "--moe-relu-layer-floor",
        type=float,
        default=1e-3,
        help="Keep layers alive: where a layer has less than this share of topk active experts per token, it is freed "
        "from the L1 term and its gates are pushed up (default 0.001; 0 turns it off).",
    )
    group.add_argument(
        "--moe-granularity",
        type=int,
        default=1,
        help="Split every expert into this many finer ones: experts and topk are multiplied by it, the experts' "
        "hidden size is divided by it; FLOPs and target sparsity stay (default 1). For ReLU and top-k routing.",
    )
    return parser


def apply_granularity(args: argparse.Namespace) -> None:
    """Turn G into more, smaller experts: E·G experts, top k·G, hidden size /G (paper section 4.3).

    To be called before anything reads the arguments: FLOP counts, expert-parallel checks and configurations do.

    Raises:
        ValueError: there are no experts, their size is not given, or G does not divide it.
    """
    granularity = args.moe_granularity
    if granularity < 1:
        raise ValueError(f"--moe-granularity {granularity} must be a whole number of at least 1.")
    if granularity == 1:
        return
    if not args.num_experts:
        raise ValueError(f"--moe-granularity {granularity} splits experts, and there are none: give --num-experts.")
    size_flag = "--ffn-hidden-size" if args.moe_ffn_hidden_size is None else "--moe-ffn-hidden-size"
    size = args.ffn_hidden_size if args.moe_ffn_hidden_size is None else args.moe_ffn_hidden_size
    if size is None:
        raise ValueError(f"--moe-granularity {granularity} needs the size to split: give --moe-ffn-hidden-size.")
    if size % granularity:
        raise ValueError(
            f"{size_flag} {size} is not divisible by --moe-granularity {granularity}: choose a divisor of {size}."
        )
    args.moe_ffn_hidden_size = size // granularity
    args.num_experts *= granularity
    args.moe_router_topk *= granularity


def parse_and_validate_args(
    extra_args_provider: ArgumentsProvider | None = None,
    args_defaults: dict[str, Any] | None = None,
    adapt: Callable[[argparse.Namespace], None] | None = None,
) -> argparse.Namespace:
    """Megatron's `parse_and_validate_args` with the flags of ReMoE.

    A mistake of the user ends the process with exit code 2 and a message that names flag, value and remedy.

    Args:
        extra_args_provider: adds the caller's own flags, as in Megatron.
        args_defaults: as in Megatron.
        adapt: called with the parsed arguments before they are validated.

    Returns:
        The arguments, validated and set as Megatron's global ones.
    """

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_remoe_arguments(parser)
        # Megatron's 700 lines of usage would hide the error below them.
        parser.usage = parser.usage or "%(prog)s [--flag [value ...] ...]   (--help lists all)"
        # one_logger is not a public package, and its absence is announced at every start.
        parser.set_defaults(enable_one_logger=False)
        return extra_args_provider(parser) if extra_args_provider is not None else parser

    defaults = args_defaults or {}
    args = parse_args(provider)
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    with usage_errors(args.rank):
        apply_granularity(args)
        problems = relu_routing_problems(args)
        if problems:
            raise ValueError("\n".join(problems))
        if args.moe_relu_routing:
            # L1 takes its place; Megatron would all-reduce and log a load-balancing loss of zero.
            args.moe_router_load_balancing_type = "none"
        use_local_gpt2_files(args)
        if adapt is not None:
            adapt(args)
        choose_checkpoint(args)
        if args.use_checkpoint_args:
            load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
            load_args_from_checkpoint(args)
        validate_args(args, {})
        set_global_variables(args)
    use_shipped_helpers()
    return args


@contextmanager
def usage_errors(rank: int) -> Iterator[None]:
    """Where Megatron refuses settings, end the process with exit code 2 and what it says instead of a traceback.

    Args:
        rank: of this process; the first one alone prints.
    """
    try:
        yield
    except (ValueError, AssertionError, OSError) as error:
        if rank == 0:
            lines = str(error).strip() or f"Megatron refuses these arguments ({_location(error)})."
            print(f"pretrain_gpt.py: error: {lines}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def _location(error: Exception) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return (
        f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}" if traceback is not None else "unknown place"
    )


def transformer_config_from_args(args: argparse.Namespace) -> TransformerConfig:
    """The transformer's configuration: a `ReMoEConfig` with --moe-relu-routing, otherwise Megatron's own."""
    return core_transformer_config_from_args(args, config_class=ReMoEConfig if args.moe_relu_routing else None)
