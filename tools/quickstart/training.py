"""Runs one training as a process: its log to a file, its progress to the display; one that was cut off goes on."""

import os
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..common.files import write_json
from ..common.log_reader import seconds_per_iteration
from ..common.places import ROOT
from ..common.training_process import Evaluated, Evaluating, Logged, Resumed, end, events, start
from . import stages
from .display import TrainingDisplay, Work

SECONDS_TO_SAVE = 20
TAIL = 15  # lines of the log that are shown if a training fails


@dataclass(frozen=True)
class Training:
    """One model's training: what it runs, where it leaves its files, and what it depends on."""

    model: str
    folder: Path
    flags: list[str]
    iterations: int
    evaluations: int  # number of held-out sets
    inputs: str  # fingerprint of all that decides about the result

    @property
    def log(self) -> Path:
        """Megatron's whole output."""
        return self.folder / "train.log"

    def is_done(self) -> bool:
        """Whether it was trained and evaluated with these inputs."""
        return stages.read_stamp(self.folder / "done.json", self.inputs) is not None

    def prepare(self) -> bool:
        """Keep what a cut-off call with the same inputs left; clear what others left. Returns whether there was any."""
        if stages.read_stamp(self.folder / "inputs.json", self.inputs) is not None:
            return False
        cleared = self.folder.exists()
        stages.fresh_folder(self.folder)
        write_json(self.folder / "inputs.json", {"inputs": self.inputs})
        return cleared


def run(training: Training, display: TrainingDisplay, work: Work, threads: int, keep_open: IO[str]) -> None:
    """Train to the end and stamp it as done; KeyboardInterrupt stops it after a last checkpoint.

    Args:
        training: what to run; see `Training.prepare`.
        display: shows the progress.
        work: the training in the display.
        threads: for the arithmetic.
        keep_open: the folder's lock, which the process holds too.

    Raises:
        stages.QuickstartError: the training failed; the message holds the end of its log.
    """
    display.begin(work, anew=training.prepare())
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *training.flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with training.log.open("a", encoding="utf-8") as log:
        log.write(f"$ OMP_NUM_THREADS={threads} {' '.join(command)}\n")
        process = start(command, environment, keep_open, ROOT)
        assert process.stdout is not None
        tail: deque[str] = deque(maxlen=TAIL)
        try:
            evaluated = _follow(process.stdout, log, tail, training, display, work)
        except BaseException:
            _stop(process, log)
            raise
        code = process.wait()
    if code or evaluated < training.evaluations:
        reason = f"ended with exit code {code}" if code else "ended before its evaluation did"
        raise stages.QuickstartError(
            f"The training of {work.title} {reason}. The end of its log:\n\n{''.join(tail)}\n"
            f"The whole log: {training.log}\nOnce the cause is gone, the same command goes on from the last checkpoint."
        )
    write_json(training.folder / "done.json", {"inputs": training.inputs})


def _follow(
    output: IO[str], log: IO[str], tail: deque[str], training: Training, display: TrainingDisplay, work: Work
) -> int:
    """Copy the output to the log and show its progress; returns the number of held-out sets evaluated at the end."""
    evaluated = 0
    for event in events(output, training.iterations, log.write, tail.append):
        match event:
            case Resumed(iteration):
                display.resume(work, iteration)
            case Evaluating(batch, batches):
                if batch % 50 == 0:
                    display.evaluate(work, (evaluated + batch / batches) / training.evaluations)
            case Evaluated(iteration):
                evaluated += iteration == training.iterations
                log.flush()
            case Logged(iteration, fields, fair):
                if fair:
                    display.iterate(work, iteration, float(fields["lm loss"]), seconds_per_iteration(fields))
                log.flush()
    return evaluated


def _stop(process: subprocess.Popen[str], log: IO[str]) -> None:
    """Have the process save a checkpoint and end; kill it if it does not."""
    rest = end(process, signal.SIGTERM, SECONDS_TO_SAVE)
    log.write(f"Killed: it did not end within {SECONDS_TO_SAVE} s.\n" if rest is None else rest)
