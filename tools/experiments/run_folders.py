"""Turn tiny runs into commands, and stamp each run's folder with the settings that its result depends on."""

import json
import math
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
from ..console.places import entry
from ..recipes.layout import RecipeError
from ..runs.figure_reader import METRICS, STAMP, read_run_log
from .results import read_result
from .run import PATH_FLAGS, TRAINED, Run, Text

SURPLUS = 1.005  # Megatron takes this multiple of the samples that it needs from each text
SAVES, TRACKER = "checkpoints", "latest_checkpointed_iteration.txt"
# Paths, intervals and memory do not change the result.
NOT_COMPARED = PATH_FLAGS | {
    "--save", "--load", "--save-interval", "--save-retain-interval", "--tensorboard-dir", "--data-cache-path",
    "--wandb-project", "--wandb-exp-name", "--wandb-save-dir", "--log-interval", "--exit-interval",
    "--exit-duration-in-mins", "--num-workers", "--recompute-granularity", "--recompute-method",
    "--recompute-num-layers", "--recompute-modules",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Settings that all runs of a list share.

    Attributes:
        output: folder of the runs' folders.
        text: text of the runs.
        flags: Megatron flags for all runs, after the run's own.
    """

    output: Path
    text: Text
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """A run and its folder.

    Attributes:
        path: of the folder.
        stamp: content of `STAMP`: the run, and the text and the settings that its result depends on.
        command: a program and its arguments.
    """

    run: Run
    path: Path
    stamp: Mapping[str, Any]
    command: Sequence[str]

    @property
    def step_tokens(self) -> int:
        """Return the tokens of an optimizer step."""
        return math.prod(int(self.stamp["settings"][flag][0]) for flag in ("--global-batch-size", "--seq-length"))

    def read_differences(self) -> list[str]:
        """Return how the run in the folder differs from this run; an empty list if it does not, or there is none."""
        path = self.path / STAMP
        if not path.exists():
            return []
        now, then = self.stamp, json.loads(path.read_text(encoding="utf-8"))
        old, new = ({"text": [stamp.get("text")], **stamp["settings"]} for stamp in (then, now))
        return [
            f"{flag} was {_show(old.get(flag))} and is now {_show(new.get(flag))}"
            for flag in sorted(old.keys() | new.keys())
            if old.get(flag) != new.get(flag)
        ]

    def has_checkpoint(self) -> bool:
        """Return whether the folder has a checkpoint to continue from."""
        return (self.path / SAVES / TRACKER).exists()

    def read_loss(self) -> float | None:
        """Return the run's final loss; None until it is done, or if the folder holds a different run."""
        is_this = (self.path / STAMP).exists() and not self.read_differences()
        result = read_result(self.path) if is_this else None
        return result.loss if result else None


def _show(values: Sequence[str | None] | None) -> str:
    return "not given" if values is None else " ".join(map(str, values)) or "given"


def make_run_folder(run: Run, grid: Grid, name: str = "") -> RunFolder:
    """Return a run with its folder, stamp and command.

    Args:
        run: the run to train.
        grid: the settings of all runs.
        name: name of the run's folder (default: the run's name).
    """
    path = grid.output / (name or run.name)
    flags = run.tiny_flags(grid.text, grid.flags)
    saves = ["--save", str(path / SAVES), "--load", str(path / SAVES)]
    saves += ["--tensorboard-dir", str(path / "tensorboard")]
    saves += ["--data-cache-path", str(path / "cache")]  # runs side by side must not read a half-written one
    settings = {flag: [*values] for flag, values in group_by_flag(flags).items() if flag not in NOT_COMPARED}
    stamp = {"run": asdict(run), "per_byte": dict(grid.text.per_byte), "text": grid.text.inputs, "settings": settings}
    return RunFolder(run, path, stamp, [sys.executable, *entry(), *flags, *saves])


def check_conflicts(folders: Sequence[RunFolder]) -> None:
    """Refuse runs whose folder holds a result or a checkpoint of other settings.

    Raises:
        RecipeError: names the first such folder, the differences, and the remedy.
    """
    for folder in folders:
        differences = folder.read_differences()
        if differences and (folder.has_checkpoint() or read_result(folder.path) is not None):
            raise RecipeError(
                f"{folder.path} holds a run with other settings: {'; '.join(differences)}. Give the same settings, "
                "a different --output-dir, or remove the folder to train it again."
            )


def prepare(folder: RunFolder, grid: Grid) -> None:
    """Stamp the run's folder, and continue from a shorter run if possible.

    Raises:
        ToolError: the text's folder no longer holds the text that the grid has read.
    """
    if read_json(grid.text.folder / "manifest.json").get("inputs") != grid.text.inputs:
        raise ToolError(f"{grid.text.folder}: the text was replaced. Give a different --text-dir and --output-dir.")
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.path / STAMP, folder.stamp)
    if _may_continue(folder, grid) and not folder.has_checkpoint():
        _continue_from_shorter(folder, grid)


def _may_continue(folder: RunFolder, grid: Grid) -> bool:
    """Return whether the run may continue a shorter one: it has a WSD schedule, and reads no text twice.

    Megatron shuffles all passes over a text together, so their order depends on the number of steps.
    """
    if not folder.run.is_wsd:
        return False
    tokens = sum(grid.text.train_tokens.values()) * (TRAINED if folder.run.is_tuning else 1.0)
    return SURPLUS * folder.run.steps * folder.step_tokens <= tokens


def _find_shorter(folder: RunFolder, grid: Grid) -> tuple[Run, Path] | None:
    """Return the finished run that saves the most steps, and its checkpoint; None if there is none.

    It differs from the folder's run only in its steps, and has kept the checkpoint at which it began its decay.
    """
    found = []
    for path in grid.output.glob(f"*/{STAMP}"):
        run = replace(folder.run, steps=read_json(path)["run"]["steps"])
        checkpoint = path.parent / SAVES / f"iter_{run.decay_start:07}"
        is_shorter = path.parent.name == run.name and run.decay_start <= folder.run.decay_start
        if is_shorter and checkpoint.exists() and make_run_folder(run, grid).read_loss() is not None:
            found.append((run, checkpoint))
    return max(found, key=lambda pair: pair[0].decay_start, default=None)


def _continue_from_shorter(folder: RunFolder, grid: Grid) -> None:
    """Copy the checkpoint at which a run that differs only in its steps began its decay.

    Both runs are equal until then. The log is copied too, so that its running sums include all steps.
    """
    if (shorter := _find_shorter(folder, grid)) is None:
        return
    saves, (run, original) = folder.path / SAVES, shorter
    saves.mkdir(parents=True, exist_ok=True)
    records = (each for each in read_run_log(original.parent / METRICS) if each["iteration"] <= run.decay_start)
    kept = (json.dumps(each) + "\n" for each in records if each["kind"] != "validation")
    write_text(saves / METRICS, "".join(kept))
    copy = saves / original.name
    shutil.rmtree(copy, ignore_errors=True)  # left by an interrupted call, which had not written the tracker
    shutil.copytree(original, copy)
    write_text(saves / TRACKER, str(run.decay_start))
