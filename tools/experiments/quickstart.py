"""Train a dense, a top-k MoE and a ReMoE language model of equal active size on real text, and compare them."""

import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..console.display import print_table, say
from ..console.errors import ToolError
from ..console.files import lock, write_json
from ..console.flags import tool_parser, whole_number
from ..console.places import LOG, home, interpreter, short, tool
from ..recipes import tiny
from ..runs.figure_reader import read_figures
from ..runs.run_figures import TOTALS, RunFigures
from ..runs.running import make_main
from ..text.corpora import dataset
from .execute import execute
from .quickstart_picture import draw
from .results import read_result
from .run import Run, Text
from .run_folders import Grid, RunFolder, make_run_folder

ARMS = {"dense": "dense", "moe": "moe", "remoe": "remoe-capped"}  # name of the folder → arm
SIZE, EXPERTS = tiny.SIZES[tiny.QUICKSTART], 32
ITERATIONS, WARMUP = 900, 300  # steps


def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """Parse the command line."""
    parser = tool_parser("quickstart", __doc__)
    add = parser.add_argument
    text = "mixed: code, documents, drama, 15 MB; technical: web services, 43 MB; broad: both, and Python, 225 MB"
    add("--corpus", choices=dataset.CORPORA, default=dataset.MIXED, help=f"{text} (default: %(default)s)")
    text = f"folder for all files (default: {' or '.join(map(str, dataset.FOLDERS.values()))} in the project's folder)"
    add("--output-dir", type=Path, metavar="FOLDER", help=text)
    text = "optimizer steps of each run (default: %(default)s)"
    add("--train-iters", type=whole_number(10), default=ITERATIONS, dest="iterations", metavar="N", help=text)
    add("--seed", type=whole_number(1), default=tiny.SEED, metavar="N", help="seed of the runs (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.output_dir = (args.output_dir or home() / dataset.FOLDERS[args.corpus]).expanduser().resolve()
    return args


def run(args: Namespace) -> None:
    """Run the quickstart; each step reuses the results of an earlier call.

    Raises:
        ToolError: a run failed; the display has shown the end of its log.
    """
    console, output = Console(), args.output_dir
    runs = output if args.iterations == ITERATIONS else output / f"iterations-{args.iterations}"
    runs = runs if args.seed == tiny.SEED else runs / f"seed-{args.seed}"
    with lock(output, "quickstart") as held:
        title = f"Dense, top-k MoE and ReMoE of equal active size: {args.iterations} iterations each, side by side"
        say(console, f"{title}, in {short(output)}")
        tokens, warmup = dataset.SUBWORDS, min(WARMUP, args.iterations // 2)
        text = Text.read(dataset.make_text(output, args.corpus, tokens))
        for line in dataset.missing_domains(output):
            say(console, f"  {line}")
        domains = ", ".join(f"{name} {number:,}" for name, number in text.train_tokens.items())
        say(console, f"  training text in subword tokens: {domains}")
        grid = Grid(runs, text)
        base = Run("dense", args.seed, args.iterations, tiny.QUICKSTART, warmup=warmup, tokens=tokens)
        runs_by_name = {name: replace(base, arm=arm, experts=EXPERTS, topk=1) for name, arm in ARMS.items()}
        folders = [make_run_folder(each, grid, name) for name, each in runs_by_name.items()]
        if execute(console, grid, folders, len(folders), held):
            raise ToolError("A run failed; see above. Fix the cause and run the same command: it continues.")
        metrics = {folder.run.routing: read_figures(folder.path) for folder in folders}
        summary = summarize(folders, metrics) | {"seed": args.seed, "corpus": args.corpus}
        write_json(runs / "summary.json", summary)
        draw(runs / "report.png", metrics, summary)
    print_summary(summary)
    print_next_steps(console, output, runs, [*text.train_tokens][-1])


def summarize(folders: Sequence[RunFolder], runs: Mapping[str, RunFigures]) -> dict[str, Any]:
    """Return the results of the three models; losses are in nats per byte of text."""
    iterations, experts, size = folders[0].run.steps, folders[-1].run.experts, SIZE
    summary: dict[str, Any] = {"iterations": iterations, "experts": experts}
    for folder, (model, metrics) in zip(folders, runs.items(), strict=True):
        result, total = read_result(folder.path), metrics.parameters or 0
        assert result is not None
        unused = (experts - folder.run.topk) * size.layers * 3 * size.hidden * size.ffn if folder.run.experts else 0
        summary[model] = {
            "val_loss": result.loss,
            "val_loss_by_domain": result.losses,
            "tokens_per_second": metrics.tokens_per_second,
            "active_params": total - unused,
            "total_params": total,
        }
    remoe = runs["remoe"]
    summary["remoe"]["sparsity_target"] = remoe.target_sparsity
    summary["remoe"]["sparsity_last_quarter"] = late_sparsity(remoe, iterations, experts)
    return summary


def late_sparsity(metrics: RunFigures, last: int, experts: int) -> float:
    """Return the sparsity of the computed pairs over the last quarter of `last` iterations, from the running sums."""
    iterations = metrics.curve(TOTALS[0]).iterations
    ends = np.append(iterations[iterations <= 0.75 * last][-1:], iterations[-1])
    return float(1 - metrics.experts_per_token(ends)[-1] / experts)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the comparison, a column for each model."""
    models = [summary[model] for model in tiny.NAMES]

    dense = models[0]["val_loss"]
    rows = [
        ["validation loss (nats/byte)", *(f"{each['val_loss']:.3f}" for each in models)],
        ["  against dense", "", *(f"{each['val_loss'] - dense:+.3f}" for each in models[1:])],
    ]
    for domain in models[0]["val_loss_by_domain"]:
        rows.append([f"  on {domain}", *(f"{each['val_loss_by_domain'][domain]:.3f}" for each in models)])
    for title, key, form in (
        ("active parameters", "active_params", ","),
        ("total parameters", "total_params", ","),
        ("tokens per second", "tokens_per_second", ",.0f"),
        ("computed sparsity, last quarter", "sparsity_last_quarter", ".3f"),
        ("  target", "sparsity_target", ".3f"),
    ):
        rows.append([title, *(format(each[key], form) if key in each else "" for each in models)])
    print()
    print_table(["", *tiny.NAMES.values()], rows, text=1)


def print_next_steps(console: Console, output: Path, runs: Path, domain: str) -> None:
    """Print the paths of all files, and commands to try next; `runs` is the folder of these runs."""
    tensorboard, output, runs = short(Path(interpreter()).with_name("tensorboard")), short(output), short(runs)
    each = runs / f"{{{','.join(tiny.NAMES)}}}"
    say(console, f"\n  picture     {runs / 'report.png'}\n  numbers     {runs / 'summary.json'}")
    say(console, f"  logs        {each / LOG}\n  checkpoints {each / 'checkpoints'}")
    say(console, f"  TensorBoard {tensorboard} --logdir {runs}")
    say(console, "\nTo try next, with the ReMoE model (README.md, After training):")
    checkpoints = ["--load", str(runs / "remoe" / "checkpoints")]
    held_out = dataset.data_prefix(output / dataset.TOKENS[dataset.SUBWORDS], "heldout", domain)
    for words in (
        [*tool("generate"), *checkpoints, "--prompt", "My lord,"],
        [*tool("evaluate"), *checkpoints, "--data-path", held_out],
        [*tool("export"), *checkpoints, "--save", str(runs / "remoe" / "hf")],
    ):
        say(console, f"  {shlex.join(words)}")


main = make_main("quickstart", parse_arguments, run, "stopped. The same command continues from here")
