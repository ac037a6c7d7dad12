"""Continue a text with a trained model: a run's checkpoint, or a folder that remoe export wrote.

remoe generate --load RUN --prompt "Once upon a time"
remoe generate --load FOLDER --prompt-file start.txt --max-new-tokens 500
remoe generate --load FOLDER                             # asks for texts
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...console.flags import tool_parser, whole_number


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = tool_parser("generate", __doc__)
    add = parser.add_argument
    where = "checkpoints (on the CPU; export for a GPU) or exported folder"
    add("--load", type=Path, required=True, metavar="FOLDER", help=where)
    add("--ckpt-step", type=int, metavar="N", help="iteration of a run (default: the newest)")
    add("--tokenizer-model", type=Path, metavar="FOLDER", help="use another tokenizer than the model's")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="text to continue")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the text to continue")
    add("--max-new-tokens", type=whole_number(1), default=200, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=1.0, metavar="X", help="0: the likeliest token (default: %(default)s)")
    add("--top-k", type=whole_number(0), default=0, metavar="K", help="sample from K tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling threshold")
    add("--seed", type=int, default=1234, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature must not be negative, and --top-p must be above 0 and at most 1.")
    return args
