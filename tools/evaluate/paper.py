"""Compare zero-shot accuracies with the paper's, in per cent (arXiv 2412.14711, table 8)."""

from typing import Any

from rich.table import Table

from .tasks import TASKS

NAMES = dict(zip(TASKS, ("ARC-c", "ARC-e", "BoolQ", "HellaSwag", "LAMBADA", "PIQA", "RACE"), strict=True))
# In the order of `TASKS`.
ROWS = {
    "dense 182M": (19.45, 43.35, 54.40, 28.61, 31.09, 61.97, 28.52),
    "dense 469M": (21.50, 49.12, 56.88, 31.12, 36.74, 64.47, 30.53),
    "dense 978M": (21.93, 50.88, 60.24, 32.42, 41.06, 67.46, 31.77),
    "MoE 182M": (20.82, 45.03, 57.55, 29.84, 31.81, 63.28, 28.42),
    "MoE 469M": (23.63, 52.40, 53.94, 32.43, 43.64, 68.34, 31.48),
    "MoE 978M": (23.81, 52.90, 58.90, 35.01, 44.42, 67.90, 31.48),
    "ReMoE 182M": (20.22, 46.68, 54.16, 30.26, 35.94, 63.55, 29.38),
    "ReMoE 469M": (21.67, 53.16, 58.75, 33.80, 40.66, 67.95, 31.20),
    "ReMoE 978M": (24.06, 55.26, 57.28, 35.93, 44.42, 68.99, 30.43),
}


def compare_with_paper(results: dict[str, list[dict[str, Any]]]) -> Table:
    """Return a table of accuracies in per cent of the scored tasks, and their mean if all seven were scored.

    Args:
        results: model → scores, as `Score` has them.
    """
    measured = {
        name: {one["task"]: 100 * one["value"] for one in scores if one["metric"] == "acc"}
        for name, scores in results.items()
    }
    tasks = [task for task in TASKS if any(task in values for values in measured.values())]
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for title in [NAMES[task] for task in tasks] + ["mean"] * (len(tasks) == len(TASKS)):
        table.add_column(title, justify="right", no_wrap=True)
    papers = {f"paper, {name}": dict(zip(TASKS, row, strict=True)) for name, row in ROWS.items()}
    for name, values in (measured | papers).items():
        cells = [values[task] for task in tasks]
        cells += [sum(cells) / len(cells)] * (len(tasks) == len(TASKS))
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    return table
