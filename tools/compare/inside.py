"""What tools/analyze finds in the routers of compared trainings, and its table."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..sweep.plan import Run
from .recipes import reference_of, title
from .table import Results, shown

SEQUENCES = 1024  # of each held-out set, at most
BITS = "domain bits"
COLUMNS = ("experts per token", "tokens without", "for a tenfold frequency", "imbalance")

Figures = dict[str, list[float | None]]  # name → of each MoE layer


def is_analyzed(run: Run) -> bool:
    """Whether tools/analyze knows its routing; dense models have none."""
    return run.routing != "dense" and not {"expert_choice", "random"}.intersection(run.flags({}))


def is_there(run: Path) -> bool:
    """Whether an analysis of the run's newest checkpoint is."""
    last, newest = run / "analysis" / "gates.json", run / "checkpoints" / "latest_checkpointed_iteration.txt"
    return last.exists() and last.stat().st_mtime >= newest.stat().st_mtime


def read(folder: Path) -> Figures:
    """Of what tools/analyze wrote for some domains; a slope is None where all tokens have the same experts."""
    experts, load, balance = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("experts_per_token", "load", "balance")
    )
    slopes = experts["by_frequency"].get("slopes", {})
    layers = [*experts["layers"]]
    found: dict[str, Mapping[str, float | None]] = {
        "experts per token": {layer: experts["layers"][layer]["mean"] for layer in layers},
        "tokens without": {layer: experts["layers"][layer]["none"] for layer in layers},
        "for a tenfold frequency": {layer: slopes.get(layer, {}).get("slope") for layer in layers},
        "imbalance": {layer: balance["layers"][layer]["imbalance"] for layer in layers},
        "inactive": {layer: len(balance["layers"][layer]["inactive"]) for layer in layers},
        BITS: {layer: load["specialization"][layer]["bits"] for layer in layers},
    }
    return {name: [of[layer] for layer in layers] for name, of in found.items()}


def markdown(results: Results) -> str:
    """A row for each MoE layer of what was analyzed: means with intervals, and inactive experts seed by seed."""
    header = ["", "layer", *COLUMNS, BITS, "above ReMoE", "inactive experts"]
    lines = [f"| {' | '.join(header)} |".replace("|  |", "| |"), "|---" * len(header) + "|"]
    for row, of in results.items():
        found = {seed: result.routing for seed, result in of.items() if result.routing}
        beside = {seed: result.routing for seed, result in results.get(reference_of(row), {}).items()}
        for place in range(max((len(routing[BITS]) for routing in found.values()), default=0)):

            def column(name: str, of: Mapping[int, Figures], place: int = place) -> dict[int, float]:
                values = {seed: routing[name][place] for seed, routing in of.items() if routing}
                return {seed: value for seed, value in values.items() if value is not None}

            bits, other = column(BITS, found), column(BITS, beside) if row != reference_of(row) else {}
            cells = [title(row), str(place + 1), *(shown([*column(name, found).values()]) for name in COLUMNS)]
            cells += [shown([*bits.values()], digits=4)]
            cells += [shown([bits[seed] - other[seed] for seed in bits if seed in other], "+", digits=4)]
            cells += [", ".join(f"{number:g}" for number in column("inactive", found).values())]
            lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines)
