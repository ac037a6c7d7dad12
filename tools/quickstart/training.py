"""Run one training as a process that writes its output to a file."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..common.figure_reader import LOG, read_figures
from ..common.files import write_json
from ..common.places import entry, home
from ..common.training_process import end, start
from ..sweep.progress import SweepDisplay, Work
from . import stages

SECONDS_BETWEEN_READS = 0.3
SECONDS_TO_SAVE = 20
TAIL = 15  # lines of the log that are shown if a training fails


@dataclass(frozen=True)
class Training:
    """One model's training.

    Attributes:
        model: key of `models.NAMES`.
        folder: for its files.
        flags: Megatron's.
        evaluations: number of held-out sets.
        inputs: fingerprint of everything that decides the result.
    """

    model: str
    folder: Path
    flags: list[str]
    evaluations: int
    inputs: str

    @property
    def log(self) -> Path:
        """Return the file of Megatron's output."""
        return self.folder / LOG

    def is_done(self) -> bool:
        """Return whether it was trained and evaluated with these inputs."""
        return stages.read_stamp(self.folder / "done.json", self.inputs) is not None

    def prepare(self) -> bool:
        """Keep the files of an interrupted run with the same inputs, and remove all others.

        Returns:
            Whether files were removed.
        """
        if stages.read_stamp(self.folder / "inputs.json", self.inputs) is not None:
            return False
        cleared = self.folder.exists()
        stages.make_empty(self.folder)
        write_json(self.folder / "inputs.json", {"inputs": self.inputs})
        return cleared


def run(training: Training, display: SweepDisplay, work: Work, threads: int, keep_open: IO[str]) -> None:
    """Train to the end and mark the training as done; KeyboardInterrupt stops it after a last checkpoint.

    Args:
        training: what to run.
        display: shows the progress.
        work: the training in the display.
        threads: of the process.
        keep_open: the folder's lock, which the process holds too.

    Raises:
        stages.QuickstartError: the training failed; the message holds the end of its log.
    """
    display.begin(work)
    if training.prepare():
        display.say(f"{work.title}: code, text or versions have changed; it starts from iteration 0.")
    command = [sys.executable, *entry(), *training.flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with training.log.open("a", encoding="utf-8") as log:
        print(f"$ OMP_NUM_THREADS={threads} {' '.join(command)}", file=log, flush=True)
        process = start(command, environment, keep_open, home(), log)
        try:
            display.follow(work, _new_lines(training.log, log.tell(), process))
        except BaseException:
            if end(process, signal.SIGTERM, SECONDS_TO_SAVE) is None:
                print(f"Killed: it did not end within {SECONDS_TO_SAVE} s.", file=log)
            raise
    reason = f"ended with exit code {process.returncode}" if process.returncode else "ended before its evaluation did"
    if process.returncode or len(read_figures(training.folder).evaluations) < training.evaluations:
        with training.log.open(encoding="utf-8", errors="replace") as log:
            tail = "".join(deque(log, maxlen=TAIL))
        raise stages.QuickstartError(
            f"The training of {work.name} {reason}. The end of its log:\n\n{tail}\nThe whole log: {training.log}\n"
            "Fix the cause and run the same command: it continues from the last checkpoint."
        )
    write_json(training.folder / "done.json", {"inputs": training.inputs})


def _new_lines(log: Path, place: int, process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the lines that a process writes to a file after `place`, until it ends."""
    line, is_running = "", True
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(place)
        while is_running:
            is_running = process.poll() is None  # before reading: its last lines are read too
            for part in file:
                line += part
                if line.endswith("\n"):
                    yield line
                    line = ""
            if is_running:
                time.sleep(SECONDS_BETWEEN_READS)
