"""Collect the runs in a sweep's folder into results.csv, results.md and results.png."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from megatron.remoe.files.files import write_aside, write_text

from ...console.markdown import table
from ...console.places import LOG
from ...console.units import duration
from . import scaling_picture
from .plan import ROUTINGS, SIZES, Run
from .run_log import Outcome, read_outcome
from .settings import mixed_settings

HEADER = ("run", "validation loss", "sparsity (target)", "tokens/s", "training")
NOTE = """
Validation loss in nats per token, after the last iteration; sparsity as in the log's last line; tokens/s over all
processes, the median of the log's lines; training is the time of the iterations alone. results.csv has more. The size
in a name is that of the launch script; flags after -- may change it.
"""
Row = tuple[Run, Outcome | None]  # None: not started


def rows_of(output: Path, planned: Iterable[Run]) -> list[Row]:
    """Return the runs in `output` and the planned runs that are missing, ordered for comparison."""
    folders = {path.parent for name in ("command.sh", LOG) for path in output.glob(f"*/{name}")}
    found = filter(None, (Run.from_name(path.name) for path in folders))
    runs = sorted(
        {*found, *planned},
        key=lambda run: (
            *(SIZES.index(run.size), run.granularity or 0, run.experts or 0, run.expansion),
            *(ROUTINGS.index(run.routing), run.protocol, run.axis, run.value),
        ),
    )
    return [(run, read_outcome(output / run.name)) for run in runs]


def collect(output: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the table as CSV and Markdown, and the picture if a run is finished. Return the files."""
    losses = [(run, outcome.validation_loss) for run, outcome in rows if outcome is not None]
    points = [(run, loss) for run, loss in losses if loss is not None]
    written = [output / name for name in ("results.csv", "results.md", "results.png")]
    if points:
        scaling_picture.draw(written[2], points)
    else:
        written.pop().unlink(missing_ok=True)
    write_aside(written[0], lambda aside: _write_csv(aside, rows))
    parts = ["# Sweep\n", *table(HEADER, map(cells, rows), text=1), NOTE]
    parts += [f"**{warning}**\n" for warning in warnings(output, rows)]
    parts += ["![Validation loss along each axis](results.png)\n"] if points else []
    write_text(written[1], "\n".join(parts))
    return written


def warnings(output: Path, rows: Sequence[Row]) -> list[str]:
    """Return a warning for each reason why losses of runs in `output` do not compare."""
    found = [text] if (text := mixed_settings(output, {})) else []
    tokens = {outcome.tokens for _, outcome in rows if outcome is not None and outcome.finished}
    if len(tokens) < 2:
        return found
    seen = ", ".join("unknown" if number is None else f"{number:,}" for number in sorted(tokens, key=lambda n: n or 0))
    return [*found, f"These runs were trained on different numbers of tokens ({seen}): their losses do not compare."]


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = ["run", "state", *(field.name for field in (*fields(Run), *fields(Outcome)))]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for run, outcome in rows:
            state = "not started" if outcome is None else "finished" if outcome.finished else "unfinished"
            found = {} if outcome is None else asdict(outcome)
            value = run.value if run.axis else None
            writer.writerow({"run": run.name, "state": state} | asdict(run) | {"value": value} | found)


def cells(row: Row) -> list[str]:
    """Return a row of the table under `HEADER`."""
    run, of = row
    if of is None:
        return [run.name, "not started", "", "", ""]
    loss = f"at {of.iterations}/{of.train_iters}" if of.validation_loss is None else f"{of.validation_loss:.4f}"
    sparsity = "" if of.sparsity is None else f"{of.sparsity:.4f} ({of.target_sparsity or 0:.4f})"
    speed = "" if of.tokens_per_second is None else f"{of.tokens_per_second:,.0f}"
    return [run.name, loss, sparsity, speed, "" if of.training_seconds is None else duration(of.training_seconds)]
