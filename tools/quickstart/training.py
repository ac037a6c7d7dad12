"""Run one training as a process: its output goes to a file, its progress is read from its metrics.jsonl."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..common.files import write_json
from ..common.places import ROOT
from . import stages
from .display import TrainingDisplay, Work
from .report import Run

SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_TO_SAVE = 20
TAIL = 15  # lines of the log that are shown if a training fails


@dataclass(frozen=True)
class Training:
    """One model's training.

    Attributes:
        model: of `models.NAMES`.
        folder: for its files.
        flags: Megatron's.
        iterations: optimizer steps.
        evaluations: number of held-out sets.
        inputs: fingerprint of everything that decides the result.
    """

    model: str
    folder: Path
    flags: list[str]
    iterations: int
    evaluations: int
    inputs: str

    @property
    def log(self) -> Path:
        """Megatron's whole output."""
        return self.folder / "train.log"

    def is_done(self) -> bool:
        """Return whether it was trained and evaluated with these inputs."""
        return stages.read_stamp(self.folder / "done.json", self.inputs) is not None

    def prepare(self) -> bool:
        """Keep the files of a stopped call with the same inputs, and remove those of others.

        Returns:
            Whether files of others were removed.
        """
        if stages.read_stamp(self.folder / "inputs.json", self.inputs) is not None:
            return False
        cleared = self.folder.exists()
        stages.fresh_folder(self.folder)
        write_json(self.folder / "inputs.json", {"inputs": self.inputs})
        return cleared


def run(training: Training, display: TrainingDisplay, work: Work, threads: int, keep_open: IO[str]) -> None:
    """Train to the end and mark it as done; KeyboardInterrupt stops it after a last checkpoint.

    Args:
        training: see `Training.prepare`.
        display: shows the progress.
        work: the training in the display.
        threads: for the arithmetic.
        keep_open: the folder's lock, which the process holds too.

    Raises:
        stages.QuickstartError: the training failed; the message holds the end of its log.
    """
    display.begin(work, anew=training.prepare())
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *training.flags]
    began = time.time()
    with training.log.open("a", encoding="utf-8") as log:
        print(f"$ OMP_NUM_THREADS={threads} {' '.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it as the SIGTERM below, which saves
            pass_fds=(keep_open.fileno(),),
        )
        try:
            while process.poll() is None:
                display.show(work, Run.read(training.folder, since=began))
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except BaseException:
            _stop(process, log)
            raise
    reason = f"ended with exit code {process.returncode}" if process.returncode else "ended before its evaluation did"
    if process.returncode or len(Run.read(training.folder).losses) < training.evaluations:
        with training.log.open(encoding="utf-8", errors="replace") as log:
            tail = "".join(deque(log, maxlen=TAIL))
        raise stages.QuickstartError(
            f"The training of {work.title} {reason}. The end of its log:\n\n{tail}\nThe whole log: {training.log}\n"
            "After you have fixed the cause, the same command continues from the last checkpoint."
        )
    write_json(training.folder / "done.json", {"inputs": training.inputs})


def _stop(process: subprocess.Popen[bytes], log: IO[str]) -> None:
    """Let the process save a checkpoint and end; kill it if it does not."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
        print(f"Killed: it did not end within {SECONDS_TO_SAVE} s.", file=log)
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()
