"""Collect the runs in a sweep's folder into results.csv, results.md and results.png."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron.remoe.data.files import write_aside, write_text

from ..common.markdown import table
from ..common.units import duration
from . import scaling_picture
from .plan import AXES, MATCHED, ROUTINGS, SIZES, Run
from .run_log import Outcome, is_finished, read_outcome
from .settings import is_resized, processes
from .stages import training_flops

TITLES = {"dense": "dense", "moe": "MoE", "remoe": "ReMoE"}
COLUMNS = """
run size routing experts granularity state iterations train_iters tokens protocol axis value validation_loss perplexity
test_loss sparsity target_sparsity first_near settled flip_rate flip_count changed_tokens total_parameters processes
tokens_per_second training_seconds flops
""".split()
WHOLE = ["size", "routing", "E", "G", "validation loss", "perplexity", "sparsity (target)", "settled"]
WHOLE += ["total parameters", "tokens", "tokens/s", "training"]
SHORT = ("validation loss", "sparsity (target)", "tokens/s", "training")


@dataclass(frozen=True)
class Row:
    """A run and its results.

    Attributes:
        run: the run.
        outcome: None if it was not started.
        processes: 0 if unknown.
        resized: whether flags changed the model's size, so that the run's name does not have it.
        flops: of the whole training, with the experts that were computed; None if unknown.
    """

    run: Run
    outcome: Outcome | None
    processes: int
    resized: bool
    flops: float | None = None

    @property
    def state(self) -> str:
        """Return finished, unfinished or not started."""
        if self.outcome is None:
            return "not started"
        return "finished" if self.outcome.finished else "unfinished"


def rows_of(output: Path, planned: Iterable[Run]) -> list[Row]:
    """Return the runs in `output` and the planned runs that are missing, ordered for comparison."""
    folders = {path.parent for name in ("command.sh", "train.log") for path in output.glob(f"*/{name}")}
    found = filter(None, (Run.from_name(path.name) for path in folders))
    order = {size: place for place, size in enumerate(SIZES)}
    runs = sorted(
        {*found, *planned},
        key=lambda run: (
            *(order[run.size], run.granularity or 0, run.experts or 0, run.expansion, ROUTINGS.index(run.routing)),
            *(run.protocol, run.axis, run.value),
        ),
    )
    return [
        Row(run, read_outcome(at), processes(at), is_resized(at), training_flops(at))
        for run in runs
        for at in [output / run.name]
    ]


def collect(output: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the table as CSV and Markdown, and the picture if a run is finished. Return the files."""
    written = [output / "results.csv", output / "results.md"]
    losses = [(row.run, row.outcome.validation_loss) for row in rows if row.outcome is not None]
    points = [(run, loss) for run, loss in losses if loss is not None]
    picture, resized = output / "results.png", any(row.resized for row in rows)
    if points:
        write_aside(picture, lambda aside: scaling_picture.draw(aside, points, resized))
        written.append(picture)
    else:
        picture.unlink(missing_ok=True)
    write_aside(written[0], lambda aside: _write_csv(aside, rows))
    markdown = "\n".join(_markdown(rows, bool(points))) + "\n"
    write_text(written[1], markdown)
    return written


def unequal(rows: Sequence[Row]) -> str:
    """Return a warning if finished runs were trained on different numbers of tokens, else an empty text."""
    equal = [row for row in rows if row.run.kind != MATCHED]
    tokens = {row.outcome.tokens for row in equal if is_finished(row.outcome)}
    if len(tokens) < 2:
        return ""
    told = ", ".join("unknown" if number is None else f"{number:,}" for number in sorted(tokens, key=lambda n: n or 0))
    return f"These runs were trained on different numbers of tokens ({told}): their losses do not compare."


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print a short table."""
    grid = Table(box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    grid.add_column("run", no_wrap=True)
    for name in SHORT:
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = _cells(row)
        grid.add_row(row.run.name, *(cells.get(name, "") for name in SHORT))
    console.print(grid)


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            of: dict[str, Any] = {} if row.outcome is None else vars(row.outcome)
            started = {"processes": row.processes or None, "flops": row.flops}
            value = {} if row.run.axis else {"value": None}
            writer.writerow({"run": row.run.name, "state": row.state} | vars(row.run) | value | of | started)


def _markdown(rows: Sequence[Row], pictured: bool) -> Iterable[str]:
    yield "# Sweep"
    yield ""
    yield from table(WHOLE, ([_cells(row).get(name, "") for name in WHOLE] for row in rows), text=2)
    yield ""
    yield "Validation loss in nats per token, after the last iteration; sparsity as in the log's last line; settled:"
    yield "the first logged iteration from which it stays within 1 % of its target; tokens/s"
    yield "over all processes, the median of the log's lines; training is the time of the iterations alone."
    if any(row.resized for row in rows):
        yield ""
        yield "Flags after -- changed the dimensions of these models: the size is the one in their launch scripts."
    if warning := unequal(rows):
        yield ""
        yield f"**{warning}**"
    if pictured:
        yield ""
        yield "![Validation loss along each axis](results.png)"


def _cells(row: Row) -> dict[str, str]:
    """Return title → cell; what a run does not have is left out."""
    cells = {"size": row.run.size.upper(), "routing": _title(row.run), "validation loss": row.state}
    cells |= {"E": _plain(row.run.experts), "G": _plain(row.run.granularity)}
    if (of := row.outcome) is None:
        return cells
    loss = f"at {of.iterations}/{of.train_iters}" if of.validation_loss is None else f"{of.validation_loss:.4f}"
    cells |= {"validation loss": loss, "perplexity": "" if of.perplexity is None else f"{of.perplexity:.3f}"}
    if of.sparsity is not None:
        target = "" if of.target_sparsity is None else f" ({of.target_sparsity:.4f})"
        cells |= {"sparsity (target)": f"{of.sparsity:.4f}{target}", "settled": _plain(of.settled)}
    cells |= {"total parameters": _plain(of.total_parameters), "tokens": _plain(of.tokens)}
    training = "" if of.training_seconds is None else duration(of.training_seconds)
    return cells | {"tokens/s": _plain(of.tokens_per_second), "training": training}


def _title(run: Run) -> str:
    told = [TITLES[run.routing] + (f" x {run.expansion}" if run.expansion > 1 else ""), run.protocol]
    told += [f"{AXES[run.axis].label} = {run.value:g}"] if run.axis else []
    return ", ".join(filter(None, told))


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"
