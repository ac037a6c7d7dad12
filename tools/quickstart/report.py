"""The comparison of the three models: a summary, a table, and the lines that end the quickstart."""

import importlib.metadata
import platform
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron.remoe.training.run_log import FILE, read_run_log

from . import models

# Standard deviation of the validation loss between the seeds 1234, 1235 and 1236, after so many iterations:
# docs/experiments.md.
SEEDS, SPREAD_ITERATIONS = 3, 1200
SPREAD = {"dense": 0.0461, "moe": 0.0088, "remoe": 0.0249}
LAST_PART = 0.75  # the last quarter starts here


@dataclass(frozen=True)
class Run:
    """Figures of a training, from its metrics.jsonl.

    Attributes:
        start: iteration that its last process continued from.
        lines: the `log` lines.
        losses: held-out set → loss at the end, in nats per token.
    """

    start: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, since: float = 0.0) -> "Run":
        """Read what is there.

        Args:
            folder: of the training.
            since: Unix time; leave out what processes before it wrote.
        """
        start, lines, losses, is_new = 0, [], {}, not since
        for record in read_run_log(folder / "checkpoints" / FILE):
            if record["kind"] == "start":
                start, is_new = record["iteration"], record.get("time", 0.0) >= since
            elif is_new and record["kind"] == "log":
                lines.append(record)
            elif is_new and record["kind"] == "validation" and "lm_loss" in record:
                losses[record.get("set", "")] = record["lm_loss"]
        return cls(start, lines, losses) if is_new else cls()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the iterations that have a figure, and its values."""
        points = {line["iteration"]: line[name] for line in self.lines if name in line}
        return [*points], [*points.values()]

    def last_quarter(self, iterations: int) -> list[dict[str, Any]]:
        """Return the lines of the last quarter of so many iterations."""
        return [line for line in self.lines if line["iteration"] > LAST_PART * iterations]

    def late_sparsity(self, iterations: int, experts: int) -> float:
        """Return S over all steps of the last quarter, from the running sums; without them, the mean of the lines."""
        late = self.last_quarter(iterations)
        before: dict[str, Any] = self.lines[-len(late) - 1] if len(late) < len(self.lines) else {}
        if "total_active_pairs" not in late[-1]:
            return statistics.fmean(line["sparsity"] for line in late)
        pairs, tokens = (late[-1][name] - before.get(name, 0) for name in ("total_active_pairs", "total_layer_tokens"))
        return 1 - pairs / (tokens * experts)

    def expert_load(self, iterations: int) -> dict[int, list[float]]:
        """Return layer → share of its tokens that each expert got, mean over the lines of the last quarter."""
        loads = [line["tokens_per_expert"] for line in self.last_quarter(iterations)]
        return {
            int(layer): [statistics.fmean(shares) for shares in zip(*(load[layer] for load in loads), strict=True)]
            for layer in loads[-1]
        }


def summarize(
    runs: Mapping[str, Run], held_out: dict[str, int], iterations: int, seed: int, size: models.Size
) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        runs: model → its figures.
        held_out: domain → number of tokens predicted in its evaluation, the weight of its loss.
        iterations: of each training.
        seed: of each training.
        size: of the models.
    """
    summary: dict[str, Any] = {}
    for model, run in runs.items():
        # The first intervals are those of a cold process.
        seconds = statistics.median(line["seconds_per_iteration"] for line in run.lines[2:] or run.lines)
        active, total = models.parameters(model, size)
        summary[model] = {
            "val_loss": sum(run.losses[domain] * n for domain, n in held_out.items()) / sum(held_out.values()),
            "val_loss_by_domain": {domain: run.losses[domain] for domain in held_out},
            "train_tokens": iterations * size.tokens_per_iteration,
            "tokens_per_second": size.tokens_per_iteration / seconds,
            "active_params": active,
            "total_params": total,
        }
    remoe = runs["remoe"]
    summary["remoe"] |= {
        "sparsity_target": remoe.lines[-1]["target_sparsity"],
        "sparsity_last_quarter": remoe.late_sparsity(iterations, size.experts),
        "coefficient_final": remoe.lines[-1]["l1_coefficient"],
    }
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    summary |= {"iterations": iterations, "seed": seed, "versions": versions | {"python": platform.python_version()}}
    return summary


def table(summary: dict[str, Any]) -> Table:
    """Return the comparison, a column for each model."""
    grid = Table(box=None, header_style="bold", padding=(0, 2), pad_edge=False)
    grid.add_column("")
    for title in models.NAMES.values():
        grid.add_column(title, justify="right")

    def row(name: str, key: str, form: str = ",") -> None:
        grid.add_row(name, *(format(each[key], form) if key in each else "" for each in of_models))

    of_models = [summary[model] for model in models.NAMES]
    dense, *others = [each["val_loss"] for each in of_models]
    is_known = summary["iterations"] == SPREAD_ITERATIONS
    around = [f" ± {SPREAD[model]:.3f}" if is_known else "" for model in models.NAMES]
    losses = (f"[bold]{each['val_loss']:.3f}[/bold]{more}" for each, more in zip(of_models, around, strict=True))
    grid.add_row("validation loss (nats per byte)", *losses)
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
    """Print the table, the places of all files, and what to try next.

    Args:
        console: where to print.
        summary: see `summarize`.
        output: folder of the picture and the summary.
        runs: folder of the trainings.
    """

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, highlight=False, soft_wrap=True, markup=False)

    console.print()
    console.print(table(summary))
    if summary["iterations"] == SPREAD_ITERATIONS:
        say(f"± spread over {SEEDS} seeds, docs/experiments.md", "dim")
    say("MoE (top-k) is the paper's baseline; stronger ones, tuned: docs/paper.md", "dim")
    models_in_braces = "{" + ",".join(models.NAMES) + "}"
    console.print()
    for name, place in (
        ("picture", output / "report.png"),
        ("figures", output / "summary.json"),
        ("logs", runs / models_in_braces / "train.log"),
        ("checkpoints", runs / models_in_braces / "checkpoints"),
        ("TensorBoard", f".venv/bin/tensorboard --logdir {runs}"),
    ):
        say(f"  {name:<12}{place}")
    checkpoints = ["--load", str(runs / "remoe" / "checkpoints")]
    held_out = models.data_prefix(output / "data", "heldout", list(summary["remoe"]["val_loss_by_domain"])[-1])
    console.print("\nTo try next, with the ReMoE (README.md, After training):")
    for words in (
        ["tools/generate", *checkpoints, "--prompt", "My lord, "],
        ["tools/evaluate", *checkpoints, "--data-path", held_out],
        ["tools/export_hf", *checkpoints, "--save", str(runs / "remoe" / "hf")],
    ):
        say(f"  {shlex.join(['.venv/bin/python', *words])}")
