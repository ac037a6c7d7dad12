"""Turn runs into commands, and stamp each run's folder with the settings that its result depends on."""

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.remoe.files.files import write_text

from ..console.errors import ToolError
from ..console.files import read_json, write_json
from ..console.flags import group_by_flag
from ..console.places import ROOT, entry, is_clone
from ..recipes.data import find_data
from ..recipes.hardware import GPU_FLAGS, PLAIN_PYTORCH, TRITON
from ..recipes.launch import plan
from ..recipes.layout import NAMES, RecipeError
from ..runs.figure_reader import METRICS, STAMP, read_run_log
from .results import Result, read_result
from .run import PLACES, TRAINED, Run, Text

SURPLUS = 1.005  # Megatron takes this multiple of the samples that it needs from each text
SAVES, TRACKER = "checkpoints", "latest_checkpointed_iteration.txt"
LAYOUT = (*NAMES, "NNODES")
# Paths, intervals, layout and hardware do not change the result.
NOT_COMPARED = {
    *group_by_flag([*GPU_FLAGS, *PLAIN_PYTORCH, *TRITON]),
    *"""
    --save --load --save-interval --save-retain-interval --tensorboard-dir --wandb-project --wandb-exp-name
    --wandb-save-dir --data-cache-path --log-interval --exit-interval --exit-duration-in-mins
    --tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size
    --num-virtual-stages-per-pipeline-rank --sequence-parallel
    --moe-grouped-gemm --no-gradient-accumulation-fusion --no-rope-fusion --num-workers --distributed-timeout-minutes
    --expert-tensor-parallel-size --recompute-granularity --recompute-method --recompute-num-layers --recompute-modules
    """.split(),
}


@dataclass(frozen=True)
class Grid:
    """Settings that all runs of a list share.

    Attributes:
        output: folder of the runs' folders.
        flags: Megatron flags for all runs, after the run's own.
        text: text of tiny runs.
        gpus_per_node, micro_batch: arguments of launch scripts.
        sbatch_flags: flags for sbatch; None trains on this machine.
    """

    output: Path
    flags: tuple[str, ...] = ()
    text: Text | None = None
    gpus_per_node: int = 8
    micro_batch: int | None = None
    sbatch_flags: Sequence[str] | None = None


@dataclass(frozen=True)
class Job:
    """A run in its folder.

    Attributes:
        stamp: content of `STAMP`: the run, and the text and the settings that its result depends on.
        words: the command: a program and its arguments.
        environment: variables that the command needs.
    """

    run: Run
    folder: Path
    stamp: Mapping[str, Any]
    words: Sequence[str]
    environment: Mapping[str, str]

    @property
    def differences(self) -> list[str]:
        """Return how the run in the folder differs from this run; an empty list if it does not, or there is none."""
        path = self.folder / STAMP
        if not path.exists():
            return []
        now, then = self.stamp, json.loads(path.read_text(encoding="utf-8"))
        old, new = ({"text": [stamp.get("text")], **stamp["settings"]} for stamp in (then, now))
        return [
            f"{flag} was {_shown(old.get(flag))} and is now {_shown(new.get(flag))}"
            for flag in sorted(old.keys() | new.keys())
            if old.get(flag) != new.get(flag)
        ]

    @property
    def has_checkpoint(self) -> bool:
        """Return whether the folder has a checkpoint to continue from."""
        return (self.folder / SAVES / TRACKER).exists()

    def result(self) -> Result | None:
        """Return the run's result so far; None if it has not begun, or the folder holds a different run."""
        is_this = (self.folder / STAMP).exists() and not self.differences
        return read_result(self.folder) if is_this else None

    @property
    def step_tokens(self) -> int:
        """Return the tokens of an optimizer step."""
        return math.prod(int(self.stamp["settings"][flag][0]) for flag in ("--global-batch-size", "--seq-length"))

    @property
    def loss(self) -> float | None:
        """Return the run's final loss; None until it is done."""
        result = self.result()
        return result.loss if result else None


def _shown(values: Sequence[str | None] | None) -> str:
    return "not given" if values is None else " ".join(map(str, values)) or "given"


def make_job(run: Run, grid: Grid, name: str = "") -> Job:
    """Return the job of a run: its folder, stamp, command and environment.

    Args:
        run: the run to train.
        grid: the settings of all runs.
        name: name of the run's folder (default: the run's name).

    Raises:
        RecipeError: an argument or environment variable of a launch script is wrong.
    """
    folder = grid.output / (name or run.name)
    per_byte = text = None
    if run.is_tiny:
        assert grid.text is not None
        flags = run.tiny_flags(grid.text, grid.flags)
        saves = ["--save", str(folder / SAVES), "--load", str(folder / SAVES)]
        saves += ["--tensorboard-dir", str(folder / "tensorboard")]
        saves += ["--data-cache-path", str(folder / "cache")]  # runs side by side must not read a half-written one
        words, environment = [sys.executable, *entry(), *flags, *saves], {"OMP_NUM_THREADS": "1"}
        text, per_byte = grid.text.inputs, dict(grid.text.per_byte)
    else:
        arguments = run.script_words(grid.gpus_per_node, grid.micro_batch, grid.flags)
        environment = {"OUTPUT_DIR": str(folder)} | run.script_environment(os.environ)
        flags = [*_plan_script(run, arguments, environment, grid)]
        words = ["bash", str(ROOT / "scripts" / f"train_llama_{run.size}_{run.routing}.sh"), *arguments]
    # On a CPU, --bf16 is the user's choice, and changes the result.
    left_out = NOT_COMPARED - {"--bf16"} | PLACES if run.is_tiny else NOT_COMPARED
    groups = {flag: values for flag, values in group_by_flag(flags).items() if flag not in left_out}
    # The stages of --hybrid-layer-pattern, between |, are a layout: they do not change the result.
    settings = {flag: [value.replace("|", "") for value in values] for flag, values in groups.items()}
    stamp = {"run": asdict(run), "per_byte": per_byte, "text": text, "settings": settings}
    return Job(run, folder, stamp, words, environment)


def _plan_script(run: Run, arguments: Sequence[str], environment: Mapping[str, str], grid: Grid) -> Sequence[str]:
    """Return the Megatron flags of a launch script. Raise RecipeError if the script would refuse to start."""
    if not is_clone():
        raise RecipeError("launch scripts need a clone of the project. Run this there, or give --tiny.")
    given = os.environ | environment | {"DRY_RUN": "command"}
    if grid.sbatch_flags is not None:  # the layout is checked where the job starts
        given = {variable: value for variable, value in given.items() if variable not in LAYOUT}
    try:
        find_data(given, planned=False)
        return plan(run.size, run.routing, arguments, given, look_for_packages=False).flags
    except RecipeError as error:
        raise RecipeError(f"{run.name}: {error}") from error


def check_conflicts(jobs: Sequence[Job]) -> None:
    """Refuse runs whose folder holds a result or a checkpoint of other settings.

    Raises:
        RecipeError: names the first such folder, the differences, and the remedy.
    """
    for job in jobs:
        if job.differences and (job.has_checkpoint or read_result(job.folder) is not None):
            raise RecipeError(
                f"{job.folder} holds a run with other settings: {'; '.join(job.differences)}. Give the same settings, "
                "a different --output-dir, or remove the folder to train it again."
            )


def prepare(job: Job, grid: Grid) -> None:
    """Stamp the run's folder, and continue from a shorter run if possible.

    Raises:
        ToolError: the text's folder no longer holds the text that the grid has read.
    """
    if grid.text is not None and read_json(grid.text.folder / "manifest.json").get("inputs") != grid.text.inputs:
        raise ToolError(f"{grid.text.folder}: the text was replaced. Give a different --text-dir and --output-dir.")
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / STAMP, job.stamp)
    if may_continue(job, grid) and not job.has_checkpoint:
        _continue_from_shorter(job, grid)


def may_continue(job: Job, grid: Grid) -> bool:
    """Return whether the run may continue a shorter one: it has a WSD schedule, and reads no text twice.

    Megatron shuffles all passes over a text together, so their order depends on the number of steps.
    """
    if not job.run.is_wsd:
        return False
    assert grid.text is not None
    tokens = sum(grid.text.train_tokens.values()) * (TRAINED if job.run.is_tuning else 1.0)
    return SURPLUS * job.run.steps * job.step_tokens <= tokens


def find_shorter(job: Job, grid: Grid) -> Run | None:
    """Return the finished run that the job can continue the furthest, different only in its steps; None without one."""
    steps = {json.loads(path.read_text(encoding="utf-8"))["run"]["steps"] for path in grid.output.glob(f"*/{STAMP}")}
    runs = [replace(job.run, steps=number) for number in steps]
    runs = [run for run in runs if run.decay_start <= job.run.decay_start and _decay_checkpoint(run, grid).exists()]
    runs = [run for run in runs if make_job(run, grid).loss is not None]
    return max(runs, key=lambda run: run.decay_start, default=None)


def _decay_checkpoint(run: Run, grid: Grid) -> Path:
    return grid.output / run.name / SAVES / f"iter_{run.decay_start:07}"


def _continue_from_shorter(job: Job, grid: Grid) -> None:
    """Copy the checkpoint at which a run that differs only in its steps began its decay.

    Both runs are equal until then. The log is copied too, so that its running sums include all steps.
    """
    if (run := find_shorter(job, grid)) is None:
        return
    saves, original = job.folder / SAVES, _decay_checkpoint(run, grid)
    saves.mkdir(parents=True, exist_ok=True)
    records = (each for each in read_run_log(original.parent / METRICS) if each["iteration"] <= run.decay_start)
    kept = (json.dumps(each) + "\n" for each in records if each["kind"] != "validation")
    write_text(saves / METRICS, "".join(kept))
    copy = saves / original.name
    shutil.rmtree(copy, ignore_errors=True)  # left by an interrupted call, which had not written the tracker
    shutil.copytree(original, copy)
    write_text(saves / TRACKER, str(run.decay_start))
