"""Writes spread.json, the seed-to-seed spread that the quickstart's table names, from the summaries of several seeds.

for seed in 1234 1235 1236; do
  bash scripts/quickstart.sh --seed $seed --output-dir runs/seed-$seed
done
.venv/bin/python tools/quickstart/spread.py runs/seed-*/summary.json
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.files import write_json  # noqa: E402
from tools.common.markdown import table  # noqa: E402
from tools.quickstart import models, report, stages  # noqa: E402


def spread_of(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Standard deviation of each model's validation loss between seeds.

    Raises:
        stages.QuickstartError: fewer than three seeds, a seed twice, or different numbers of iterations.
    """
    seeds = {summary["seed"] for summary in summaries}
    iterations = {summary["iterations"] for summary in summaries}
    if len(seeds) < 3 or len(seeds) < len(summaries):
        raise stages.QuickstartError(f"Seeds {sorted(seeds)}: give the summaries of at least 3 different seeds.")
    if len(iterations) > 1:
        raise stages.QuickstartError(f"Iterations {sorted(iterations)}: give summaries of equally long trainings.")
    losses = {model: [summary[model]["val_loss"] for summary in summaries] for model in models.NAMES}
    return {
        "iterations": iterations.pop(),
        "seeds": len(seeds),
        "val_loss_std": {model: round(statistics.stdev(values), 4) for model, values in losses.items()},
    }


def markdown(summaries: list[dict[str, Any]]) -> str:
    """A row for each seed: the models' validation losses and ReMoE's sparsity over its last quarter."""
    rows = []
    for summary in summaries:
        remoe, losses = summary["remoe"], [f"{summary[model]['val_loss']:.4f}" for model in models.NAMES]
        sparsity = f"{remoe['sparsity_last_quarter']:.4f} ({remoe['sparsity_target']:.3f})"
        rows.append([str(summary["seed"]), *losses, sparsity])
    return "\n".join(table(["seed", *models.NAMES.values(), "sparsity (target)"], rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", type=Path, nargs="+", help="summary.json of quickstarts with different seeds")
    paths = parser.parse_args().summaries
    try:
        summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        spread = spread_of(summaries)
    except (OSError, ValueError, KeyError, stages.QuickstartError) as error:
        print(f"spread.py: {error!r}" if isinstance(error, KeyError) else f"spread.py: {error}", file=sys.stderr)
        return 1
    write_json(report.SPREAD_FILE, spread)
    print(markdown(summaries))
    print(json.dumps(spread))
    return 0


if __name__ == "__main__":
    sys.exit(main())
