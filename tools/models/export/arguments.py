"""Export a checkpoint to Hugging Face transformers, or make a checkpoint from an exported folder.

remoe export --load RUN --save FOLDER               # a dense, top-k or ReMoE checkpoint → a folder
remoe export --reverse --load FOLDER --save OUT     # a folder, trained on or not → a checkpoint

AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) loads it, with torch and transformers only. Both
ways compare the logits of both models. If they differ, nothing is written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...console.flags import tool_parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags. Megatron's flags keep their meaning."""
    parser = tool_parser("export", __doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="FOLDER", help="checkpoints of a run (its --save)")
    add("--save", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add("--reverse", action="store_true", help="--load is an exported folder, --save a checkpoint")
    add("--ckpt-step", type=int, metavar="N", help="iteration to export (default: the newest)")
    text = "a Hugging Face tokenizer (default: the training's own)"
    add("--tokenizer-model", type=Path, metavar="FOLDER", help=text)
    text = "text to compare the models on, as in Megatron (default: the training's, held-out if it names some)"
    add("--data-path", nargs="+", metavar="WORD", help=text)
    text = "with --reverse: layers that will load the checkpoint (default: the installed ones)"
    add("--transformer-impl", choices=("local", "transformer_engine"), help=text)
    args = parser.parse_args(arguments)
    if args.reverse and (args.data_path or args.ckpt_step is not None):
        parser.error("--reverse reads a folder, and compares on random tokens: leave out --ckpt-step and --data-path.")
    return args
