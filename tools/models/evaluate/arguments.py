"""Evaluate trained models: runs' checkpoints, or folders that remoe export wrote.

remoe evaluate --load RUN --data-path SET                                # loss, perplexity, experts per token
remoe evaluate --load RUN --data-path SET --max-experts-per-token 1 2 3  # loss with only the K largest gates
remoe evaluate --load DENSE MOE REMOE --data-path SET --speed            # tokens per second, side by side
remoe evaluate --load RUN --tasks                                        # the paper's zero-shot tasks (lm-eval)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...console.flags import tool_parser, whole_number

# lm-eval's name → the paper's.
TASKS = {
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "boolq": "BoolQ",
    "hellaswag": "HellaSwag",
    "lambada_openai": "LAMBADA",
    "piqa": "PIQA",
    "race": "RACE",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = tool_parser("evaluate", __doc__)
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    number: dict[str, Any] = {"type": whole_number(1), "metavar": "N"}
    add = parser.add_argument
    add("--load", **folder, nargs="+", required=True, help="runs (on the CPU; export for a GPU) or exported folders")
    add("--ckpt-step", type=int, metavar="N", help="iteration of a run (default: the newest)")
    add("--tokenizer-model", **folder, help="use another tokenizer than the model's")
    add("--output", type=Path, metavar="FILE", help="also write the results to this file, as JSON")
    add = parser.add_argument_group("text").add_argument
    add("--data-path", nargs="+", default=[], metavar="PREFIX", help="data sets")
    add("--seq-length", **number, help="as in training (default: the model's context)")
    add("--seed", type=int, metavar="N", help="order of the text (default: the training's)")
    add("--sequences", **number, help="at most, per data set (default: all)")
    bounds = "also with only the K largest gates"
    add("--max-experts-per-token", type=int, nargs="+", default=[], metavar="K", help=bounds)
    add("--speed", action="store_true", help="also measure tokens per second, on the beginning of the first data set")
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", nargs="*", metavar="TASK", help=f"of lm-eval (default: {', '.join(TASKS)})")
    add("--task-data", **folder, help="further tasks in lm-eval's format (.yaml)")
    add("--task-cache", type=Path, metavar="PREFIX", help="keep each model's answers in files, to resume from")
    add("--limit", **number, help="at most, documents of each task")
    args = parser.parse_args(arguments)
    if not args.data_path and args.tasks is None:
        parser.error("nothing to do: give --data-path or --tasks.")
    if (args.speed or args.max_experts_per_token) and not args.data_path:
        parser.error("--speed and --max-experts-per-token need --data-path.")
    return args
