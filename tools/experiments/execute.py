"""Train the runs of a list that are missing, as processes of this machine."""

import os
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import IO

from rich.console import Console

from megatron.remoe.files.files import write_text

from ..console.display import duration
from ..console.places import LOG
from ..runs.training_display import ShownTraining, TrainingDisplay
from .run import Run
from .run_folders import SAVES, TRACKER, Grid, RunFolder, check_conflicts, prepare

THREADS = {"OMP_NUM_THREADS": "1"}  # of each run


def execute(
    console: Console, grid: Grid, folders: Sequence[RunFolder], processes: int, held: IO[str]
) -> dict[str, int]:
    """Train the runs that are not done.

    Args:
        console: shows their progress.
        grid: settings of all runs.
        folders: WSD runs that differ only in their steps run in turn, shortest first; each continues the one before.
        processes: number of runs at once.
        held: a locked file; the runs keep the lock too.

    Returns:
        Unfinished runs, name → exit code.

    Raises:
        RecipeError: a folder holds a different run.
    """
    check_conflicts(folders)
    failed: dict[str, int] = {}
    lines = {folder.path: _make_line(folder) for folder in folders}
    chains: dict[Run, list[RunFolder]] = {}
    for folder in folders:
        chains.setdefault(replace(folder.run, steps=0) if folder.run.is_wsd else folder.run, []).append(folder)
    for chain in chains.values():
        chain.sort(key=lambda folder: folder.run.steps)
    with TrainingDisplay(console, [*lines.values()], held) as display:

        def train(chain: Sequence[RunFolder]) -> None:
            for index, folder in enumerate(chain):
                line = lines[folder.path]
                if (loss := folder.read_loss()) is not None:
                    display.finish(line, f"reused, validation loss {loss:.4f}")
                    continue
                prepare(folder, grid)
                if (code := _train(folder, line, display)) is not None:
                    failed.update((each.path.name, code) for each in chain[index:])
                    return

        display.run_all([partial(train, chain) for chain in chains.values()], processes)
    return failed


def _make_line(folder: RunFolder) -> ShownTraining:
    """Return the line of the display for a run. The time of a step grows with the number of experts."""
    run = folder.run
    return ShownTraining(folder.path.name, run.steps, folder.step_tokens, run.steps * (1 + run.experts / 32))


def _train(folder: RunFolder, line: ShownTraining, display: TrainingDisplay) -> int | None:
    """Train a run to its end; return its exit code if it has no final loss."""
    began, log_file = time.monotonic(), folder.path / LOG
    with log_file.open("a", encoding="utf-8", buffering=1) as log:
        print(f"$ {command_line(folder)}", file=log)
        code, cause = display.run(line, folder.command, os.environ | THREADS, log)
    loss = folder.read_loss()
    if code == 0 and loss is not None:
        if folder.run.is_wsd:  # longer runs continue from the start of the decay, and nothing needs the end
            shutil.rmtree(folder.path / SAVES / f"iter_{folder.run.steps:07}", ignore_errors=True)
            write_text(folder.path / SAVES / TRACKER, str(folder.run.decay_start))
        display.finish(line, f"validation loss {loss:.4f}, {duration(time.monotonic() - began)}")
        return None
    reason = f"ended at iteration {line.done} of {line.iterations}, without its final evaluation"
    reason = f"failed with exit code {code}" if code else reason
    display.finish(line, f"{reason}. The end of its output:\n{cause}\nThe whole log: {log_file}\n")
    return code


def command_line(folder: RunFolder) -> str:
    """Return the command of a run as a line for a shell."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in THREADS.items()), *folder.command])
