"""Make the tables of the page, and its headline."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..console.display import duration
from ..recipes.flops import TrainingStage
from ..runs.run_figures import RunFigures

RECENT = 20  # newest lines of the log, whose median rate gives the time left
# Paths and process numbers, which differ between any two runs; then values that Megatron stores with the flags.
LEFT_OUT = frozenset(
    """
    save load tensorboard_dir data_cache_path wandb_project wandb_exp_name wandb_save_dir rank local_rank

    iteration curr_iteration consumed_train_samples consumed_valid_samples skipped_train_samples
    num_floating_point_operations_so_far do_train do_valid do_test world_size data_parallel_size cpu
    transformer_pipeline_model_parallel_size virtual_pipeline_model_parallel_size encoder_num_layers
    encoder_seq_length gtp_weight_remat_size expert_gtp_weight_remat_size use_dist_ckpt
    use_layer_wise_distributed_optimizer variable_seq_lengths
    """.split()
)


@dataclass(frozen=True)
class Table:
    """A table with its heading: titles of the columns, and rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def headline(runs: Sequence[RunFigures]) -> str:
    """Return the result in one line: the losses, best first, and their difference to the dense run's."""
    kind, losses = "validation loss", {run.name: run.validation_loss for run in runs}
    if None in losses.values():
        kind, losses = "training loss", {run.name: run.newest("lm_loss") for run in runs}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    if not known:
        return ""
    dense = [run.name for run in runs if run.routing == "dense" and run.name in known]
    per_byte = {run.name: run.validation_loss_per_byte for run in runs} if kind == "validation loss" else {}
    if not all(per_byte.values()):
        per_byte = {}
    parts = []
    for name, loss in sorted(known.items(), key=lambda item: item[1]):
        difference = f", {loss - known[dense[0]]:+.3f} vs. dense" if len(dense) == 1 and name != dense[0] else ""
        part = f"{name} {loss:.3f}" + (f" ({per_byte[name]:.3f})" if per_byte else "")
        parts.append(part + difference.replace("-", "−"))
    kind += ", nats per token" + " (per byte)" * bool(per_byte)
    return f"{'; '.join(parts)} ({kind})"


def summary(runs: Sequence[RunFigures]) -> Table:
    """Return a row for each figure that any run has, and a column for each run."""
    sets = dict.fromkeys(name for run in runs for name in run.evaluations)
    cells: dict[str, tuple[Callable[[RunFigures], float | None], str]] = {
        "last iteration": (lambda run: run.last, ","),
        "iterations": (lambda run: run.whole("train_iters") or None, ","),
        "training loss, nats per token": (lambda run: run.newest("lm_loss"), ".4f"),
        **{
            f"validation loss {name}".strip() + ", nats per token": (partial(_validation, name), ".4f") for name in sets
        },
        "sparsity S": (lambda run: run.newest("sparsity"), ".4f"),
        "target": (lambda run: run.target_sparsity, ".4f"),
        "first within 1 % of the target, at iteration": (lambda run: run.first_near, ","),
        "within 1 % from then on, at iteration": (lambda run: run.settled, ","),
        "λ": (lambda run: run.newest("l1_coefficient"), ".3e"),
        "parameters": (lambda run: run.parameters, ","),
        "tokens": (lambda run: (run.newest("consumed_samples") or 0) * run.whole("seq_length") or None, ",.0f"),
        "tokens per second": (lambda run: run.tokens_per_second, ",.0f"),
    }
    rows = [["time left", *map(_time_left, runs)]]
    for title, (find, form) in cells.items():
        rows.append([title, *("" if (value := find(run)) is None else format(value, form) for run in runs)])
    return Table("State", ["", *(run.name for run in runs)], [row for row in rows if any(row[1:])])


def _validation(name: str, run: RunFigures) -> float | None:
    return run.evaluations[name][-1].loss if name in run.evaluations else None


def _time_left(run: RunFigures) -> str:
    seconds = run.curve("seconds_per_iteration").values[-RECENT:]
    left = (run.whole("train_iters") - run.last) * float(np.median(seconds)) if len(seconds) else 0.0
    return duration(left) if 0 < left < math.inf else ""


def stages(by_run: Mapping[str, Sequence[TrainingStage]]) -> Table:
    """Return the training stages of each run, by its name, as in table 6 of the paper."""
    rows = [
        [
            run,
            {"way": "on the way"}.get(stage.name, stage.name),
            f"{stage.first:,}–{stage.last:,}",
            f"{stage.experts:.2f}" if stage.experts else "",
            duration(3600 * stage.hours),
            f"{stage.flops:.3g}",
        ]
        for run, parts in by_run.items()
        for stage in parts
    ]
    return Table("Stages", ["run", "stage", "iterations", "experts per token", "time", "FLOPs"], rows)


def differences(runs: Sequence[RunFigures]) -> Table:
    """Return the flags that differ between runs; a flag that is off counts as not given."""
    logged = [run for run in runs if run.args]
    names = sorted({name for run in logged for name in run.args if not name.startswith("_")} - LEFT_OUT)
    rows = []
    for name in names:
        cells = [_format_flag(run, name) for run in logged]
        if len({cell for cell in cells if cell is not None}) > 1:
            rows.append([f"--{name.replace('_', '-')}", *(cell or "" for cell in cells)])
    return Table("Flags that differ", ["", *(run.name for run in logged)], rows)


def _format_flag(run: RunFigures, name: str) -> str | None:
    """Return the value of a flag as text, "" if it is off; None if it has no effect on this run."""
    if name.startswith("moe_") and not run.num_experts:
        return None
    value: Any = run.args.get(name)
    if value is None or value is False:
        return ""
    return "yes" if value is True else str(value)
