"""Turn runs into commands, and keep each in a folder that says what its result depends on."""

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.remoe.files.files import write_text

from ..console.files import fingerprint, make_empty, write_json
from ..console.flags import Settings, parse
from ..console.places import ROOT, entry, is_clone, short
from ..recipes.data import find_data
from ..recipes.hardware import GPU_FLAGS, PLAIN_PYTORCH, TRITON
from ..recipes.launch import plan
from ..recipes.layout import NAMES, RecipeError
from ..runs.figure_reader import METRICS
from .results import STAMP, Result, read_result
from .run import Run, Text

SAVES, TRACKER = "checkpoints", "latest_checkpointed_iteration.txt"
LAYOUT = (*NAMES, "NNODES")
# Places, intervals, layout and hardware, which do not change the result.
NOT_COMPARED = {
    *parse([*GPU_FLAGS, *PLAIN_PYTORCH, *TRITON]),
    *"""
    --save --load --save-interval --save-retain-interval --tensorboard-dir --wandb-project --wandb-exp-name
    --wandb-save-dir --log-interval --exit-interval --exit-duration-in-mins
    --tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size
    --num-virtual-stages-per-pipeline-rank --sequence-parallel
    --moe-grouped-gemm --no-gradient-accumulation-fusion --no-rope-fusion
    """.split(),
}
# A tiny run's text is compared by what it was made from, not by its place.
PLACES = {"--data-path", "--train-data-path", "--valid-data-path", "--vocab-file", "--merge-file", "--data-cache-path"}
SHOWN, NAMED = 4, 5  # differences and runs that a message names


@dataclass(frozen=True)
class Grid:
    """What the runs of a list have in common.

    Attributes:
        output: folder of their folders.
        flags: Megatron's, after those of each run.
        text: of tiny runs.
        code: fingerprint of code and versions, if a change of them makes other results.
        starts_over: rename the folder of a run with other settings, instead of refusing it.
        gpus_per_node, micro_batch: of launch scripts.
        sbatch_flags: for Slurm; None to train on this machine.
    """

    output: Path
    flags: tuple[str, ...] = ()
    text: Text | None = None
    code: str = ""
    starts_over: bool = False
    gpus_per_node: int = 8
    micro_batch: int | None = None
    sbatch_flags: Sequence[str] | None = None


@dataclass(frozen=True)
class Job:
    """A run in its folder.

    Attributes:
        title: on the display.
        stamp: content of `STAMP`: the run, what its result depends on, and the fingerprint of both.
        words: that start it: a program and its arguments.
        environment: variables that it adds.
    """

    run: Run
    folder: Path
    title: str
    stamp: Mapping[str, Any]
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """Return Megatron's flags without those that change no result."""
        return {flag: tuple(values) for flag, values in self.stamp["settings"].items()}

    @property
    def stamped(self) -> dict[str, Any]:
        """Return the stamp of the run that the folder holds; empty without one."""
        path = self.folder / STAMP
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def has_checkpoint(self) -> bool:
        """Return whether the folder has a checkpoint to go on from."""
        return (self.folder / SAVES / TRACKER).exists()

    def result(self) -> Result | None:
        """Return the run's result so far; None if it has not begun, or the folder holds another run."""
        if self.stamped.get("fingerprint") != self.stamp["fingerprint"]:
            return None
        return read_result(self.folder, self.stamp["per_byte"])

    @property
    def is_done(self) -> bool:
        """Return whether the folder's fingerprint matches and the final loss is there."""
        result = self.result()
        return result is not None and result.is_finished


def make_job(run: Run, grid: Grid, folder: str = "", title: str = "") -> Job:
    """Return a run with its command.

    Args:
        run: to train.
        grid: of the list.
        folder: name of the run's folder (default: the run's name).
        title: on the display (default: the run's name).

    Raises:
        RecipeError: an argument or environment variable of a launch script is wrong.
    """
    place = grid.output / (folder or run.name)
    per_byte = None
    if run.is_tiny:
        assert grid.text is not None
        flags = run.tiny_flags(grid.text, grid.flags)
        saves = [*("--save", str(place / SAVES), "--load", str(place / SAVES))]
        saves += ["--tensorboard-dir", str(place / "tensorboard")]
        words, environment = [sys.executable, *entry(), *flags, *saves], {"OMP_NUM_THREADS": "1"}
        depends: dict[str, Any] = {"text": grid.text.inputs, "code": grid.code}
        per_byte = {name: share for name, share in grid.text.per_byte.items() if share != 1} or None
    elif not is_clone():
        raise RecipeError("launch scripts need a clone of the project. Run this there, or give --tiny.")
    else:
        arguments = run.script_words(grid.gpus_per_node, grid.micro_batch, grid.flags)
        environment = {"OUTPUT_DIR": str(place)} | run.script_environment(os.environ)
        given = os.environ | environment | {"DRY_RUN": "command"}
        if grid.sbatch_flags is not None:  # the layout is checked where the job starts
            given = {name: value for name, value in given.items() if name not in LAYOUT}
        try:
            find_data(given, planned=False)
            flags = plan(run.size, run.routing, arguments, given, ask_for_packages=False).flags
        except RecipeError as error:
            raise RecipeError(f"{run.name}: {error}") from error
        words = ["bash", str(ROOT / "scripts" / f"train_llama_{run.size}_{run.routing}.sh"), *arguments]
        depends = {}
    left_out = NOT_COMPARED | (PLACES if run.is_tiny else set())
    settings = {flag: values for flag, values in parse(flags).items() if flag not in left_out}
    depends |= {"settings": settings}
    stamp = {"run": asdict(run), "per_byte": per_byte, "fingerprint": fingerprint(depends), **depends}
    return Job(run, place, title or run.name, stamp, words, environment)


def check_conflicts(jobs: Sequence[Job]) -> None:
    """Refuse runs whose folder holds a result or a checkpoint with other settings.

    Raises:
        RecipeError: names the runs, what differs, and the remedy.
    """
    lines = []
    for job in jobs:
        held = job.stamped
        if held.get("fingerprint") == job.stamp["fingerprint"] or not (job.has_checkpoint or held):
            continue
        if job.has_checkpoint or read_result(job.folder) is not None:
            lines.append(f"  {job.title}: {differences(held, job.stamp)}")
    if lines:
        more = [f"  and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
        head = f"{jobs[0].folder.parent} holds {len(lines)} of these runs with other settings:"
        remedy = "Give the same settings as then or another --output-dir; or remove these folders to train them again."
        raise RecipeError("\n".join([head, *lines[:NAMED], *more, remedy]))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differences between two stamps, in words."""
    old, new = (
        {**each.get("settings", {}), "text": each.get("text"), "code": each.get("code")} for each in (then, now)
    )
    changes = [
        f"{flag} was {_shown(old.get(flag))} and is now {_shown(new.get(flag))}"
        for flag in sorted(old.keys() | new.keys())
        if json.dumps(old.get(flag)) != json.dumps(new.get(flag))
    ]
    return "; ".join(changes[:SHOWN]) + (f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else "")


def _shown(value: Any) -> str:
    return "not given" if value is None else value if isinstance(value, str) else " ".join(value) or "given"


def prepare(job: Job, tell: Callable[[str], None]) -> None:
    """Stamp the run's folder. Keep the files of an earlier start; rename the folder of a run with other settings."""
    if job.stamped.get("fingerprint") == job.stamp["fingerprint"]:
        return
    if job.folder.exists() and any(job.folder.iterdir()):
        names = (job.folder.with_name(f"{job.folder.name}.old{number}") for number in itertools.count(1))
        old = job.folder.rename(next(name for name in names if not name.exists()))
        tell(
            f"{job.title}: settings, code, text or versions have changed; it starts from iteration 0. "
            f"Its earlier files are in {short(old)}."
        )
    write_json(make_empty(job.folder) / STAMP, job.stamp)


def go_on_from_shorter(job: Job, grid: Grid) -> None:
    """Copy the checkpoint at the start of the decay of a run that differs in its steps only: both are equal until then.

    The run's log goes on, too, so that its running sums are those of all steps.
    """
    saves = job.folder / SAVES
    if job.has_checkpoint:
        return
    shorter = {}
    for path in grid.output.glob(f"*/{STAMP}"):
        run = json.loads(path.read_text(encoding="utf-8"))["run"]
        if run == asdict(job.run) | {"steps": run["steps"]} and run["steps"] != job.run.steps:
            start = replace(job.run, steps=run["steps"]).decay_start
            checkpoint = path.parent / SAVES / f"iter_{start:07}"
            other = make_job(replace(job.run, steps=run["steps"]), grid)
            if start <= job.run.decay_start and checkpoint.exists() and other.is_done:
                shorter[start] = checkpoint
    if not shorter:
        return
    start = max(shorter)
    lines = (shorter[start].parent / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    saves.mkdir(parents=True)
    kept = (line for line in lines if json.loads(line)["iteration"] <= start and '"validation"' not in line)
    write_text(saves / METRICS, "".join(kept))
    shutil.copytree(shorter[start], saves / shorter[start].name)
    write_text(saves / TRACKER, str(start))
