"""Parse the command lines of generate, evaluate, analyze, convert and export, without importing torch."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..console.flags import tool_parser, whole_number

FOLDER: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
NUMBER: dict[str, Any] = {"type": whole_number(1), "metavar": "N"}
ONLY_FOR_REMOE = "num_experts moe_router_topk moe_relu_normalize data_path tokens loss_bound".split()
SEED = 1234  # Megatron's default
FIT_TOKENS = 32768


def _parser(parse: Callable[[Sequence[str]], argparse.Namespace]) -> argparse.ArgumentParser:
    """Return a parser with the function's name and description."""
    return tool_parser(parse.__name__.removeprefix("parse_"), inspect.getdoc(parse))


def _add_models(add: Callable[..., Any], **number: Any) -> None:
    """Add the flags that name trained models."""
    text = "runs (on the CPU; export for a GPU) or exported folders"
    add("--load", **FOLDER, **number, required=True, help=text)
    add("--ckpt-step", type=int, metavar="N", help="iteration of a run (default: the newest)")
    add("--tokenizer-model", **FOLDER, help="use a different tokenizer than the model's")


def _add_sequences(add: Callable[..., Any]) -> None:
    """Add the flags that choose the sequences of data sets."""
    add("--seq-length", **NUMBER, help="tokens per sequence (default: the run's; for a folder, its context)")
    add("--sequences", **NUMBER, help="read at most N sequences per data set (default: all)")


def parse_generate(arguments: Sequence[str]) -> argparse.Namespace:
    """Continue a text with a trained model: a run's checkpoint, or a folder that remoe export wrote.

    remoe generate --load RUN --prompt "Once upon a time"
    remoe generate --load FOLDER                             # reads a text from each line of standard input
    """
    parser = _parser(parse_generate)
    add = parser.add_argument
    _add_models(add)
    add("--prompt", metavar="TEXT", help="text to continue")
    add("--max-new-tokens", **NUMBER, default=200, help="generate at most N tokens (default: %(default)s)")
    add("--temperature", type=float, default=1.0, metavar="X", help="divide logits by X; 0: no sampling (default: 1)")
    add("--seed", type=int, default=SEED, help="random seed for sampling (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.temperature < 0:
        parser.error("--temperature must not be negative.")
    return args


def parse_evaluate(arguments: Sequence[str]) -> argparse.Namespace:
    """Evaluate trained models: runs' checkpoints, or folders that remoe export wrote.

    remoe evaluate --load RUN --data-path SET                                # loss, loss of repeats, experts per token
    remoe evaluate --load RUN --data-path SET --max-experts-per-token 1 2 3  # loss with only the K largest gates
    remoe evaluate --load DENSE MOE REMOE --data-path SET                    # side by side
    """
    parser = _parser(parse_evaluate)
    _add_models(parser.add_argument, nargs="+")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results to this file, as JSON")
    add = parser.add_argument
    add("--data-path", nargs="+", required=True, metavar="PREFIX", help="data sets")
    _add_sequences(add)
    text = "random seed for the order of the text (default: the run's; for several models with --sequences: 1234)"
    add("--seed", type=int, metavar="N", help=text)
    text = "also evaluate with only the K largest gates"
    add("--max-experts-per-token", type=int, nargs="+", default=[], metavar="K", help=text)
    args = parser.parse_args(arguments)
    if args.sequences and len(args.load) > 1 and args.seed is None:
        args.seed = SEED  # the models must read the same text
    return args


def parse_analyze(arguments: Sequence[str]) -> argparse.Namespace:
    """Show how a model routes held-out text: figures 7 to 12 and table 12 of the paper.

    remoe analyze --load RUN --data-path SET [SET...]            # RUN: a run, or a folder of remoe export
    remoe analyze --load RUN --data-path SET [SET...] --flips    # RUN: a run with --save-interval 1

    Each data set is one domain. Writes a .json of each analysis, and two pictures.
    """
    parser = _parser(parse_analyze)
    add = parser.add_argument
    _add_models(add)
    add("--data-path", nargs="+", required=True, metavar="PREFIX", help="data sets, one for each domain")
    add("--output-dir", **FOLDER, help="folder to write (default: analysis/ in the folder of --load)")
    _add_sequences(add)
    add("--seed", type=int, default=SEED, help="random seed for the order of the sequences (default: %(default)s)")
    text = "only write flips.json: the routing decisions that change between consecutive checkpoints (figure 10)"
    add("--flips", action="store_true", help=text)
    args = parser.parse_args(arguments)
    if args.flips and (args.ckpt_step is not None or args.tokenizer_model):
        parser.error("--flips reads all checkpoints, without a tokenizer: leave out --ckpt-step and --tokenizer-model.")
    args.output_dir = args.output_dir or args.load / "analysis"
    return args


def parse_convert(arguments: Sequence[str]) -> argparse.Namespace:
    """Start a ReMoE from a dense or top-k MoE checkpoint, convert a checkpoint, or change the model's class.

    dense: remoe convert --load DENSE --save OUT --num-experts 8
    top-k: remoe convert --load MOE --save OUT
    fork:  remoe convert --from-fork --load RUN --save OUT
    class: remoe convert --load RUN --save OUT --model hybrid|gpt

    The shape of a ReMoE, and the text that its routers are fitted to, come from the arguments in the checkpoint.
    Nothing is written if the loss grows by more than a bound. Then train it like any ReMoE, with
    --pretrained-checkpoint OUT.

    --from-fork and --model keep the optimizer state, for any routing: continue the run with --load OUT. The whole
    checkpoint must fit into memory.
    """
    parser = _parser(parse_convert)
    parser.add_argument("--load", **FOLDER, required=True, help="checkpoints of a run (its --save)")
    parser.add_argument("--save", **FOLDER, required=True, help="folder to write")
    text = "iteration to convert (default: the newest)"
    parser.add_argument("--ckpt-step", type=whole_number(0), metavar="N", help=text)
    add = parser.add_mutually_exclusive_group().add_argument
    text = "convert a checkpoint of the authors' fork (github.com/thu-ml/ReMoE)"
    add("--from-fork", action="store_true", help=text)
    text = "only change Megatron's model class; nothing is fitted or measured"
    add("--model", choices=("gpt", "hybrid"), help=text)
    add = parser.add_argument_group("shape of a ReMoE from a dense checkpoint").add_argument
    add("--num-experts", type=whole_number(2), metavar="E", help="experts, each as large as the dense layer")
    add("--moe-router-topk", type=int, metavar="K", help="k of the target sparsity (default: 1)")
    parser.add_argument("--moe-relu-normalize", action="store_true", default=None, help="normalize the gates")
    add = parser.add_argument_group("fit").add_argument
    add("--data-path", nargs="+", metavar="WORD", help="text, as in Megatron (default: the run's)")
    text = f"tokens to fit the routers to, and as many again to measure the loss (default: {FIT_TOKENS})"
    add("--tokens", **NUMBER, help=text)
    text = "largest relative growth of the loss (default: 0.01 from dense, 0.05 from top-k)"
    add("--loss-bound", type=float, metavar="X", help=text)
    add("--seed", type=int, default=SEED, help="random seed for the text and the fit (default: %(default)s)")
    args = parser.parse_args(arguments)
    refused = [f"--{name.replace('_', '-')}" for name in ONLY_FOR_REMOE if getattr(args, name) is not None]
    if refused and (args.from_fork or args.model):
        parser.error(f"only a conversion to a ReMoE takes {', '.join(refused)}: leave it out, and convert the result.")
    args.tokens = args.tokens or FIT_TOKENS
    return args


def parse_export(arguments: Sequence[str]) -> argparse.Namespace:
    """Export a checkpoint to Hugging Face transformers, or make a checkpoint from an exported folder.

    remoe export --load RUN --save FOLDER               # a dense, top-k or ReMoE checkpoint → a folder
    remoe export --load RUN --save FOLDER --max-experts-per-token 4     # a ReMoE for vLLM
    remoe export --reverse --load FOLDER --save OUT     # a folder, fine-tuned or not → a checkpoint

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) loads it, with torch and transformers only.
    Both directions compare the logits of the two models on random tokens. If they differ, nothing is written.
    """
    parser = _parser(parse_export)
    add = parser.add_argument
    add("--load", **FOLDER, required=True, help="checkpoints of a run (its --save)")
    add("--save", **FOLDER, required=True, help="folder to write")
    add("--reverse", action="store_true", help="--load is an exported folder, --save a checkpoint")
    add("--ckpt-step", type=int, metavar="N", help="iteration to export (default: the newest)")
    add("--tokenizer-model", **FOLDER, help="a Hugging Face tokenizer (default: the run's)")
    text = "export a ReMoE with only the N largest gates: servers compute the same number of experts for each token"
    add("--max-experts-per-token", **NUMBER, help=text)
    args = parser.parse_args(arguments)
    if args.reverse and (args.ckpt_step is not None or args.max_experts_per_token):
        parser.error("--reverse reads a folder: leave out --ckpt-step and --max-experts-per-token.")
    return args
