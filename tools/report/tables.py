"""The tables: what the runs have come to, their stages, the flags in which they differ, evaluations."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import localtime, strftime

from ..common import evaluations as measured
from ..common.units import duration
from ..sweep.stages import Stage
from .reading import Run

RECENT = 20  # lines whose rate tells the time that is left
# Where the files of a run and its processes are: different in any two. Then what Megatron notes beside the flags.
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
    """A table with its heading: titles of the columns, and rows of as many cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary(runs: Sequence[Run]) -> Table:
    """A row for each figure that any run has, a column for each run."""
    rows: list[list[str]] = []

    def row(name: str, cell: Callable[[Run], str | None]) -> None:
        cells = [cell(run) or "" for run in runs]
        if any(cells):
            rows.append([name, *cells])

    def newest(key: str, form: str) -> Callable[[Run], str | None]:
        return lambda run: f"{values[-1]:{form}}" if (values := run.series(key)[1]) else None

    row("iteration", lambda run: f"{run.last:,}" + (f" of {end:,}" if (end := run.args.get("train_iters")) else ""))
    row("time left", _time_left)
    row("newest figures", lambda run: strftime("%d %b, %H:%M", localtime(run.written)))
    row("training loss, nats per token", newest("lm_loss", ".4f"))
    for name in dict.fromkeys(name for run in runs for name in run.validation):
        row(f"validation loss {name}".strip(), partial(_validation, name))
    row("sparsity S", newest("sparsity", ".4f"))
    row("target", lambda run: None if run.target is None else f"{run.target:.4f}")
    row("settled within 1 %, at iteration", _settled)
    row("λ", newest("l1_coefficient", ".3e"))
    row("experts per token", lambda run: f"{found[-1]:.3f}" if (found := run.experts_per_token()[1]) else None)
    row("experts, k", lambda run: f"{run.num_experts}, {run.topk}" if run.topk else None)
    row("guarded layers", _guarded)
    row("tokens", _tokens)
    row(
        "tokens per second",
        lambda run: f"{statistics.median(r):,.0f}" if (r := run.series("tokens_per_second")[1]) else None,
    )
    return Table("State", ["", *(run.name for run in runs)], rows)


def _time_left(run: Run) -> str | None:
    seconds, end = run.series("seconds_per_iteration")[1][-RECENT:], run.args.get("train_iters")
    return duration((end - run.last) * statistics.median(seconds)) if seconds and end and end > run.last else None


def _validation(name: str, run: Run) -> str | None:
    losses = run.validation.get(name)
    return f"{run.newest_validation[name]:.4f} at {max(losses):,}" if losses else None


def _settled(run: Run) -> str | None:
    if run.target is None:
        return None
    at = run.settled
    return "not yet" if at is None else f"{at:,}"


def _guarded(run: Run) -> str | None:
    iterations, layers = run.series("guarded_layers")
    if not iterations or run.target is None:
        return None
    now = ", ".join(map(str, layers[-1])) or "none"
    until = max((at for at, found in zip(iterations, layers, strict=True) if found), default=None)
    return now if until is None or layers[-1] else f"none, the last at {until:,}"


def _tokens(run: Run) -> str | None:
    samples, length = run.series("consumed_samples")[1], run.args.get("seq_length")
    return f"{samples[-1] * length:,.0f}" if samples and length else None


def stages(of_runs: Mapping[str, Sequence[Stage]]) -> Table:
    """Of runs by their names; the paper's table 6."""
    rows = [
        [
            *(run, {"way": "on the way"}.get(stage.name, stage.name), f"{stage.first:,}–{stage.last:,}"),
            *(f"{stage.experts:.2f}" if stage.experts else "", f"{stage.hours:.3f}"),
            "" if math.isnan(stage.flops) else f"{stage.flops:.3g}",
        ]
        for run, found in of_runs.items()
        for stage in found
    ]
    columns = ["run", "stage", "iterations", "experts per token", "hours", "FLOPs"]
    return Table("Stages", columns, rows)


def differences(runs: Sequence[Run]) -> Table:
    """Arguments that are not the same in all runs."""
    told = [run for run in runs if run.args]
    names = sorted({name for run in told for name in run.args if not name.startswith("_")} - LEFT_OUT)
    cells = {name: [str(run.args.get(name, "")) for run in told] for name in names}
    rows = [[f"--{name.replace('_', '-')}", *values] for name, values in cells.items() if len(set(values)) > 1]
    return Table("Flags that differ", ["", *(run.name for run in told)], rows)


def evaluations(run: Run) -> Iterator[Table]:
    """What tools/evaluate wrote into the run's folder, a table for each kind of it."""
    for file, held in run.evaluations.items():
        for kind, rows in measured.tables(held):
            yield Table(f"{run.name}, {file}", measured.TITLES[kind], rows)
