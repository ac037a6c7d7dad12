"""Read what tools/analyze found about the routers of compared trainings, and make a table of it."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..common.markdown import table
from ..sweep.plan import Run
from .recipes import reference_of, title
from .table import Result, Results, format_mean

SEQUENCES = 1024  # of each held-out set, at most
BITS = "domain bits"
COLUMNS = ("experts per token", "tokens without", "for a tenfold frequency", "imbalance")

Figures = dict[str, list[float | None]]  # name → a value for each MoE layer


def is_analyzed(run: Run) -> bool:
    """Return whether tools/analyze supports the routing of a run; dense models have none."""
    return run.routing != "dense" and not {"expert_choice", "random"}.intersection(run.flags({}))


def has_analysis(run: Path) -> bool:
    """Return whether the run's newest checkpoint has been analyzed."""
    last, newest = run / "analysis" / "gates.json", run / "checkpoints" / "latest_checkpointed_iteration.txt"
    return last.exists() and last.stat().st_mtime >= newest.stat().st_mtime


def read(folder: Path) -> Figures:
    """Read the files of tools/analyze; a slope is None if all tokens have the same experts."""
    experts, load, balance = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("experts_per_token", "load", "balance")
    )
    slopes, layers = experts["by_frequency"].get("slopes", {}), [*experts["layers"]]
    return {
        "experts per token": [experts["layers"][layer]["mean"] for layer in layers],
        "tokens without": [experts["layers"][layer]["none"] for layer in layers],
        "for a tenfold frequency": [slopes[layer]["slope"] if slopes else None for layer in layers],
        "imbalance": [balance["layers"][layer]["imbalance"] for layer in layers],
        "inactive": [len(balance["layers"][layer]["inactive"]) for layer in layers],
        BITS: [load["specialization"][layer]["bits"] for layer in layers],
    }


def markdown(results: Results) -> str:
    """Return a table with a row for each MoE layer: means with intervals, and inactive experts by seed."""
    header = ["", "layer", *COLUMNS, BITS, "above ReMoE", "inactive experts"]
    rows = []
    for row, of in results.items():
        reference = results.get(reference_of(row), {}) if row != reference_of(row) else {}
        for place in range(max(len(result.routing.get(BITS, ())) for result in of.values())):
            columns = {name: _column(of, name, place) for name in (*COLUMNS, BITS, "inactive")}
            bits, other = columns[BITS], _column(reference, BITS, place)
            cells = [title(row), str(place + 1), *(format_mean([*columns[name].values()]) for name in COLUMNS)]
            cells += [format_mean([*bits.values()], digits=4)]
            cells += [format_mean([bits[seed] - other[seed] for seed in bits if seed in other], "+", digits=4)]
            cells += [", ".join(f"{number:g}" for number in columns["inactive"].values())]
            rows.append(cells)
    return "\n".join(table(header, rows))


def _column(of: Mapping[int, Result], name: str, place: int) -> dict[int, float]:
    """Return seed → a figure of one layer, for the seeds that have it."""
    values = {seed: result.routing[name][place] for seed, result in of.items() if result.routing}
    return {seed: value for seed, value in values.items() if value is not None}
