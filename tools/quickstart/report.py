"""The comparison: figures from the TensorBoard files, as a summary, a table and the lines that end the quickstart."""

import importlib.metadata
import json
import platform
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import models

SPREAD_FILE = Path(__file__).with_name("spread.json")
LAST_PART = 0.75  # means over the last quarter start here


@dataclass(frozen=True)
class Series:
    """A scalar over the iterations at which it was written."""

    steps: list[int]
    values: list[float]

    def last_quarter(self, iterations: int) -> float:
        """Mean of what was written in the last quarter of the training."""
        late = [value for step, value in zip(self.steps, self.values, strict=True) if step > LAST_PART * iterations]
        return statistics.fmean(late)


def read_scalars(folder: Path) -> dict[str, Series]:
    """All scalars of a TensorBoard folder; where a resumed training wrote an iteration again, the newer value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest: dict[str, dict[int, float]] = {}
    # A folder is read in the order of its files; each is read by itself, since reading them as one drops points.
    for file in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            newest.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return {tag: Series(sorted(values), [values[step] for step in sorted(values)]) for tag, values in newest.items()}


def expert_load(scalars: dict[str, Series], iterations: int) -> dict[int, list[float]]:
    """Layer → share of the tokens that each expert got, over the last quarter of the training."""
    loads: dict[int, dict[int, float]] = {}
    for tag, series in scalars.items():
        if tag.startswith("moe_relu/tokens_per_expert_layer_"):
            layer, expert = tag.removeprefix("moe_relu/tokens_per_expert_layer_").split("_expert_")
            loads.setdefault(int(layer), {})[int(expert)] = series.last_quarter(iterations)
    return {layer: [by_expert[e] for e in sorted(by_expert)] for layer, by_expert in sorted(loads.items())}


def summarize(
    scalars: dict[str, dict[str, Series]], held_out: dict[str, int], iterations: int, seed: int, size: models.Size
) -> dict[str, Any]:
    """What summary.json holds.

    Args:
        scalars: model → tag → what was written.
        held_out: domain → number of tokens predicted in its evaluation, the weight of its loss.
        iterations: of each training.
        seed: of each training.
        size: of the models.
    """
    summary: dict[str, Any] = {}
    for model, tags in scalars.items():
        by_domain = {domain: tags[f"lm loss validation-{domain}"].values[-1] for domain in held_out}
        seconds = tags["iteration-time"].values
        active, total = models.parameters(model, size)
        summary[model] = {
            "val_loss": sum(by_domain[domain] * n for domain, n in held_out.items()) / sum(held_out.values()),
            "val_loss_by_domain": by_domain,
            "train_tokens": iterations * size.tokens_per_iteration,
            # Without the first interval, in which the process warms up.
            "tokens_per_second": size.tokens_per_iteration / statistics.median(seconds[1:] or seconds),
            "active_params": active,
            "total_params": total,
        }
    summary["remoe"] |= {
        "sparsity_target": scalars["remoe"]["moe_relu/sparsity_target"].values[-1],
        "sparsity_last_quarter": scalars["remoe"]["moe_relu/sparsity"].last_quarter(iterations),
        "coefficient_final": scalars["remoe"]["moe_relu/l1_reg_coeff"].values[-1],
    }
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    summary |= {"iterations": iterations, "seed": seed, "versions": versions | {"python": platform.python_version()}}
    return summary


def read_spread(iterations: int) -> dict[str, Any] | None:
    """The measured spread of the validation loss between seeds, if it was measured for this number of iterations.

    The file holds "iterations", "seeds" (their number) and "val_loss_std" (model → standard deviation).
    """
    if not SPREAD_FILE.exists():
        return None
    spread = json.loads(SPREAD_FILE.read_text(encoding="utf-8"))
    return spread if spread["iterations"] == iterations else None


def table(summary: dict[str, Any], spread: dict[str, Any] | None) -> Table:
    """The comparison, a column for each model."""
    grid = Table(box=None, header_style="bold", padding=(0, 2), pad_edge=False)
    grid.add_column("")
    for title in models.NAMES.values():
        grid.add_column(title, justify="right")

    def row(name: str, cell: Any) -> None:
        grid.add_row(name, *(cell(model, summary[model]) for model in models.NAMES))

    row(
        "validation loss (nats per byte)",
        lambda model, of: f"[bold]{of['val_loss']:.3f}[/bold]" + _around(spread, model),
    )
    dense = summary["dense"]["val_loss"]
    row("  against dense", lambda model, of: "" if model == "dense" else f"{of['val_loss'] - dense:+.3f}")
    for domain in summary["dense"]["val_loss_by_domain"]:
        row(f"  on {domain}", lambda _, of, domain=domain: f"{of['val_loss_by_domain'][domain]:.3f}")
    row("active parameters", lambda _, of: f"{of['active_params']:,}")
    row("total parameters", lambda _, of: f"{of['total_params']:,}")
    row("training tokens (bytes)", lambda _, of: f"{of['train_tokens']:,}")
    row("tokens per second", lambda _, of: f"{of['tokens_per_second']:,.0f}")
    row("sparsity, last quarter", lambda _, of: f"{of['sparsity_last_quarter']:.3f}" if "sparsity_target" in of else "")
    row("  target", lambda _, of: f"{of['sparsity_target']:.3f}" if "sparsity_target" in of else "")
    return grid


def _around(spread: dict[str, Any] | None, model: str) -> str:
    return "" if spread is None else f" ± {spread['val_loss_std'][model]:.3f}"


def show(console: Console, summary: dict[str, Any], output: Path, runs: Path) -> None:
    """Print the table, where everything is, and what to try next.

    Args:
        console: where to print.
        summary: see `summarize`.
        output: folder of the picture and the summary.
        runs: folder of the trainings.
    """
    spread = read_spread(summary["iterations"])
    console.print()
    console.print(table(summary, spread))
    if spread is not None:
        console.print(f"[dim]± spread over {spread['seeds']} seeds, docs/experiments.md[/dim]", highlight=False)
    baseline = "MoE (top-k) is the paper's baseline; stronger ones, tuned: docs/paper.md"
    console.print(f"[dim]{baseline}[/dim]", highlight=False, soft_wrap=True)
    models_in_braces = "{" + ",".join(models.NAMES) + "}"
    console.print()
    for name, place in (
        ("picture", output / "report.png"),
        ("figures", output / "summary.json"),
        ("logs", runs / models_in_braces / "train.log"),
        ("checkpoints", runs / models_in_braces / "checkpoints"),
        ("TensorBoard", f".venv/bin/tensorboard --logdir {runs}"),
    ):
        console.print(f"  {name:<12}{place}", highlight=False, soft_wrap=True, markup=False)
    checkpoints = ["--load", str(runs / "remoe" / "checkpoints")]
    held_out = models.data_prefix(output / "data", "heldout", list(summary["remoe"]["val_loss_by_domain"])[-1])
    console.print("\nTo try next, with the ReMoE (README.md, After training):")
    for words in (
        ["tools/generate", *checkpoints, "--prompt", "My lord, "],
        ["tools/evaluate", *checkpoints, "--data-path", held_out],
        ["tools/export_hf", *checkpoints, "--save", str(runs / "remoe" / "hf")],
    ):
        line = shlex.join([".venv/bin/python", *words])
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
