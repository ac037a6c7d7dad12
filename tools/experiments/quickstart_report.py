"""Compare the three models: the summary, the table, and the last lines of the quickstart."""

import importlib.metadata
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from megatron.remoe import megatron_version

from ..console.display import say
from ..console.places import LOG, interpreter, short, tool
from ..recipes import tiny
from ..runs.run_figures import TOTALS, RunFigures
from ..text.corpora.corpus import SOURCES
from ..text.corpora.dataset import MIXED, data_prefix

# Standard deviation of the validation loss after 1200 iterations, from docs/experiments.md, "Quickstart, six seeds".
SEEDS, SPREAD_ITERATIONS = 6, 1200
SPREAD = {"dense": 0.0196, "moe": 0.0189, "remoe": 0.0169}
LAST_PART = 0.75  # the last quarter starts here


def is_late(iterations: NDArray[np.int64], last: int) -> NDArray[np.bool_]:
    """Return which iterations are in the last quarter of a training of `last` iterations."""
    return iterations > LAST_PART * last


def late_sparsity(figures: RunFigures, last: int, experts: int) -> float:
    """Return S over all steps of the last quarter, from the running sums."""
    sums = []
    for name in TOTALS:
        iterations, values = figures.curve(name)
        before = values[~is_late(iterations, last)]
        sums.append(values[-1] - (before[-1] if len(before) else 0))
    pairs, tokens = sums
    return float(1 - pairs / (tokens * experts))


def summarize(runs: Mapping[str, RunFigures], iterations: int, seed: int, corpus: str) -> dict[str, Any]:
    """Return the content of summary.json."""
    summary: dict[str, Any] = {}
    size = tiny.SIZE
    for model, run in runs.items():
        total = run.parameters or 0
        unused = (size.experts - size.topk) * size.layers * 3 * size.hidden * size.ffn if run.num_experts else 0
        summary[model] = {
            "val_loss": run.validation_loss,
            "val_loss_by_domain": {domain: evaluations[-1].loss for domain, evaluations in run.evaluations.items()},
            "train_tokens": iterations * size.tokens_per_iteration,
            "tokens_per_second": run.tokens_per_second,
            "active_params": total - unused,
            "total_params": total,
        }
    remoe = runs["remoe"]
    summary["remoe"] |= {
        "sparsity_target": remoe.target_sparsity,
        "sparsity_last_quarter": late_sparsity(remoe, iterations, size.experts),
        "coefficient_final": remoe.newest("l1_coefficient"),
    }
    versions = {"torch": importlib.metadata.version("torch"), "megatron-core": megatron_version()}
    versions["python"] = platform.python_version()
    return summary | {"iterations": iterations, "seed": seed, "corpus": corpus, "versions": versions}


def has_spread(summary: dict[str, Any]) -> bool:
    """Return whether `SPREAD` is that of these trainings: on all domains of the mixed text."""
    is_whole = summary["dense"]["val_loss_by_domain"].keys() == SOURCES.keys()
    return is_whole and (summary["iterations"], summary["corpus"]) == (SPREAD_ITERATIONS, MIXED)


def table(summary: dict[str, Any]) -> Table:
    """Return the comparison, a column for each model."""
    grid = Table(box=None, header_style="bold", padding=(0, 2), pad_edge=False)
    grid.add_column("")
    for title in tiny.NAMES.values():
        grid.add_column(title, justify="right")

    def row(name: str, key: str, form: str = ",") -> None:
        grid.add_row(name, *(format(each[key], form) if key in each else "" for each in of_models))

    of_models = [summary[model] for model in tiny.NAMES]
    dense, *others = [each["val_loss"] for each in of_models]
    around = [f" ± {SPREAD[model]:.3f}" if has_spread(summary) else "" for model in tiny.NAMES]
    losses = (f"[bold]{each['val_loss']:.3f}[/bold]{more}" for each, more in zip(of_models, around, strict=True))
    grid.add_row("validation loss (nats/byte)", *losses)
    grid.add_row("  against dense", "", *(f"{other - dense:+.3f}" for other in others))
    for domain in summary["dense"]["val_loss_by_domain"]:
        grid.add_row(f"  on {domain}", *(f"{each['val_loss_by_domain'][domain]:.3f}" for each in of_models))
    row("active parameters", "active_params")
    row("total parameters", "total_params")
    row("training tokens (bytes)", "train_tokens")
    row("tokens per second", "tokens_per_second", ",.0f")
    row("sparsity, last quarter", "sparsity_last_quarter", ".3f")
    row("  target", "sparsity_target", ".3f")
    return grid


def show(console: Console, summary: dict[str, Any], output: Path, runs: Path) -> None:
    """Print the table, the paths of all files (those of these trainings are in `runs`), and commands to try next."""
    console.print()
    console.print(table(summary))
    if has_spread(summary):
        say(console, f"± spread over {SEEDS} seeds, docs/experiments.md", "dim")
    say(console, "MoE (top-k) is the paper's baseline; stronger ones, tuned: docs/paper.md", "dim")
    console.print()
    binaries, output, runs = short(Path(interpreter()).parent), short(output), short(runs)
    each = runs / f"{{{','.join(tiny.NAMES)}}}"
    for name, place in (
        ("picture", runs / "report.png"),
        ("figures", runs / "summary.json"),
        ("logs", each / LOG),
        ("checkpoints", each / "checkpoints"),
        ("TensorBoard", f"{binaries / 'tensorboard'} --logdir {runs}"),
    ):
        say(console, f"  {name:<12}{place}")
    checkpoints = ["--load", str(runs / "remoe" / "checkpoints")]
    held_out = data_prefix(output / "data", "heldout", list(summary["remoe"]["val_loss_by_domain"])[-1])
    console.print("\nTo try next, with the ReMoE (README.md, After training):")
    for words in (
        [*tool("generate"), *checkpoints, "--prompt", "My lord, "],
        [*tool("evaluate"), *checkpoints, "--data-path", held_out],
        [*tool("export"), *checkpoints, "--save", str(runs / "remoe" / "hf")],
    ):
        say(console, f"  {shlex.join(words)}")
