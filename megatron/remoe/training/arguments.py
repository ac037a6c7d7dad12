"""Command-line flags of ReMoE on top of Megatron's, and what they do to Megatron's arguments."""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.compatibility import relu_routing_problems
from megatron.remoe.config import ReMoEConfig
from megatron.remoe.data.tokenizer import use_local_gpt2_files
from megatron.remoe.training.checkpoints import choose_checkpoint
from megatron.remoe.training.inputs import (
    check_data,
    check_environment,
    check_output_folders,
    check_required_flags,
    check_vocabulary,
)
from megatron.remoe.training.loading import check_is_data_alone, check_loaded_run
from megatron.remoe.training.patches import (
    keep_saving_possible,
    let_torch_adam_resume,
    load_objects_unexecuted,
    tell_why_writing_fails,
    use_shipped_helpers,
)
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
        "--moe-relu-activation-limit",
        type=float,
        default=2.0,
        help="Memory while routing is dense: a layer holds the activations of at most this many times topk experts per "
        "token; beyond, it works in chunks that the backward pass computes again (default 2; 0: no limit). Exact.",
    )
    group.add_argument(
        "--moe-granularity",
        type=int,
        default=1,
        help="Split every expert into this many finer ones: experts and topk are multiplied by it, the experts' "
        "hidden size is divided by it; FLOPs and target sparsity stay (default 1). For ReLU and top-k routing.",
    )
    group.add_argument(
        "--no-local-layer-fusion",
        action="store_false",
        dest="local_layer_fusion",
        help="With --transformer-impl local: Megatron's own attention and experts, one small layer an expert, instead "
        "of those made of PyTorch's fused and grouped kernels.",
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
    starts_training: bool = True,
) -> argparse.Namespace:
    """Megatron's `parse_and_validate_args` with the flags of ReMoE, and what a training needs before it starts.

    A mistake of the user ends the process with exit code 2 and a message that names flag, value and remedy.

    Args:
        extra_args_provider: adds the caller's own flags, as in Megatron.
        args_defaults: as in Megatron.
        adapt: called with the parsed arguments before they are validated.
        starts_training: False only looks at the settings: data, checkpoints and folders need not be there.

    Returns:
        The arguments, validated and set as Megatron's global ones.
    """

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_remoe_arguments(parser)
        # Megatron's 700 lines of usage would hide the error below them.
        parser.usage = parser.usage or "%(prog)s [--flag [value ...] ...]   (--help lists all)"
        # one_logger is not a public package, and its absence is announced at every start.
        parser.set_defaults(enable_one_logger=False)
        parser.error = partial(_flag_error, parser)  # type: ignore[method-assign]
        _mend_help(parser)
        return extra_args_provider(parser) if extra_args_provider is not None else parser

    defaults = args_defaults or {}
    if starts_training:
        with usage_errors(0):
            check_environment()
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
        if starts_training:
            choose_checkpoint(args)
        if args.use_checkpoint_args:
            check_is_data_alone(args)
            load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
            load_args_from_checkpoint(args)
        if starts_training:
            check_required_flags(args)
        validate_args(args, {})
        if starts_training:
            check_data(args)
            check_loaded_run(args)
            check_output_folders(args)
            if not args.save and args.rerun_mode == "validate_results":
                # At a loss that is not finite Megatron would save a checkpoint to look into it later, to nowhere.
                args.rerun_mode = "disabled"
        set_global_variables(args)
        if starts_training:
            check_vocabulary(args)
    use_shipped_helpers()
    let_torch_adam_resume()
    load_objects_unexecuted()
    if args.save and starts_training:
        keep_saving_possible()
        tell_why_writing_fails()
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
            lines = str(error).strip() or f"Megatron refuses these settings: {_source_line(error)}"
            print(f"pretrain_gpt.py: error: {lines}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Megatron has help texts with a percent sign of their own, at which --help would end with an error."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def _flag_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """`parser.error`, by the first process alone, and with what a misspelled flag was meant to be."""
    if os.environ.get("RANK", "0") == "0":
        parser.print_usage(sys.stderr)
        print(f"pretrain_gpt.py: error: {message}{_suggestion(parser, message)}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _suggestion(parser: argparse.ArgumentParser, message: str) -> str:
    unknown = message.removeprefix("unrecognized arguments: ")
    if unknown == message:
        return ""
    flags = [option for action in parser._actions for option in action.option_strings]
    words = [word.split("=")[0] for word in unknown.split() if word.startswith("--")]
    close = [f"{found[0]} instead of {word}" for word in words if (found := difflib.get_close_matches(word, flags, 1))]
    return f". Did you mean {', '.join(close)}?" if close else ". --help lists all flags."


def _source_line(error: Exception) -> str:
    """The line that raised an error without a message, such as an assertion."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({os.path.basename(frame.filename)}:{frame.lineno})"


def transformer_config_from_args(args: argparse.Namespace) -> TransformerConfig:
    """The transformer's configuration: a `ReMoEConfig` with --moe-relu-routing, otherwise Megatron's own."""
    return core_transformer_config_from_args(args, config_class=ReMoEConfig if args.moe_relu_routing else None)
