"""Evaluate trained models: runs' checkpoints, or folders that tools/export_hf wrote.

python tools/evaluate --load RUN --data-path SET                                # loss, perplexity, experts per token
python tools/evaluate --load RUN --data-path SET --max-experts-per-token 1 2 3  # loss with only the K largest gates
python tools/evaluate --load DENSE MOE REMOE --data-path SET --speed            # tokens per second, side by side
python tools/evaluate --load RUN --tasks                                        # the paper's zero-shot tasks (lm-eval)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import evaluations
from ..common.display import Display, print_table
from ..common.errors import ToolError
from ..common.files import write_json
from ..common.flags import whole_number
from ..common.hf.opening import open_model
from ..common.on_cpu import megatron_on_cpu
from ..common.running import run_once
from .tasks import TASKS, compare_with_paper, score


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="tools/evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


def show(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    for titles, rows in evaluations.tables(results):
        print_table(titles, rows, text=len(titles))
        if evaluations.BY_LAYER in titles and any(row[-1] for row in rows):
            print(evaluations.EXPLAINED)
    if "tasks" in results:
        compared = compare_with_paper(results["tasks"])
        if compared[0] != [""]:
            print("\nAccuracy in %; the paper's: arXiv 2412.14711, table 8, 30B tokens each")
            print_table(*compared, text=1)


def evaluate(args: argparse.Namespace) -> None:
    """Measure, show and write the results; after an error or a stop, those that were finished.

    Raises:
        ToolError: something is wrong with the flags, a model or the data.
        OSError: --output cannot be written.
    """
    results: dict[str, Any] = {}
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Display() as display:
            measure(args, results, display)
    finally:
        show(results)
        if args.output is not None and results:
            write_json(args.output, results)


def measure(args: argparse.Namespace, results: dict[str, Any], display: Display) -> None:
    """Add each kind of result when it is complete; scores of tasks model by model."""
    models = {str(place): open_model(place, args.ckpt_step, args.tokenizer_model) for place in args.load}
    for name, (_, tokenizer, _) in models.items():
        if tokenizer is None and args.tasks is not None:
            raise ToolError(f"--load {name}: has no tokenizer. Give one with --tokenizer-model.", "REMOE-E513")
    if args.data_path:
        megatron_on_cpu()
        from .text import measure_speed, measure_text

        results["text"] = measure_text(args, models, display)
        if args.speed:
            results["speed"] = measure_speed(args, models)
    if args.tasks is not None:
        tasks = args.tasks or [*TASKS]
        for name, (model, tokenizer, _) in models.items():
            assert tokenizer is not None
            scores = score(model, tokenizer, tasks, args.task_data, args.task_cache, args.limit)
            results.setdefault("tasks", {})[name] = scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 1 if something is wrong; 130 if it was stopped."""
    args = parse_arguments(arguments)
    return run_once("evaluate", lambda: evaluate(args))
