"""Figures of tools/analyze about the routers of compared trainings, and their table."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..common.markdown import table
from ..sweep.plan import Run
from .recipes import reference_of, title
from .table import Result, Results, shown

SEQUENCES = 1024  # of each held-out set, at most
BITS = "domain bits"
COLUMNS = ("experts per token", "tokens without", "for a tenfold frequency", "imbalance")

Figures = dict[str, list[float | None]]  # name → of each MoE layer


def is_analyzed(run: Run) -> bool:
    """Return whether tools/analyze knows the routing of a run; dense models have none."""
    return run.routing != "dense" and not {"expert_choice", "random"}.intersection(run.flags({}))


def is_there(run: Path) -> bool:
    """Return whether there is an analysis of the run's newest checkpoint."""
    last, newest = run / "analysis" / "gates.json", run / "checkpoints" / "latest_checkpointed_iteration.txt"
    return last.exists() and last.stat().st_mtime >= newest.stat().st_mtime


def read(folder: Path) -> Figures:
    """Read what tools/analyze wrote; a slope is None if all tokens have the same experts."""
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
    """Return a row for each MoE layer: means with intervals, and inactive experts seed by seed."""
    header = ["", "layer", *COLUMNS, BITS, "above ReMoE", "inactive experts"]
    rows = []
    for row, of in results.items():
        beside = results.get(reference_of(row), {}) if row != reference_of(row) else {}
        for place in range(max(len(result.routing.get(BITS, ())) for result in of.values())):
            columns = {name: _column(of, name, place) for name in (*COLUMNS, BITS, "inactive")}
            bits, other = columns[BITS], _column(beside, BITS, place)
            cells = [title(row), str(place + 1), *(shown([*columns[name].values()]) for name in COLUMNS)]
            cells += [shown([*bits.values()], digits=4)]
            cells += [shown([bits[seed] - other[seed] for seed in bits if seed in other], "+", digits=4)]
            cells += [", ".join(f"{number:g}" for number in columns["inactive"].values())]
            rows.append(cells)
    return "\n".join(table(header, rows))


def _column(of: Mapping[int, Result], name: str, place: int) -> dict[int, float]:
    """Return seed → a figure of a layer, for the seeds that have it."""
    values = {seed: result.routing[name][place] for seed, result in of.items() if result.routing}
    return {seed: value for seed, value in values.items() if value is not None}
