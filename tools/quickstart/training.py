"""Runs one training as a process: its log to a file, its progress to the display; one that was cut off goes on."""

import os
import re
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import stages
from display import TrainingDisplay, Work

from megatron.remoe.log_reader import read_log

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")
EVALUATING = re.compile(r"^Evaluating iter (\d+)/(\d+)")
EVALUATED = re.compile(r"^ validation-\S+ loss at iteration (\d+) on validation set")
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
        stages.write_json(self.folder / "inputs.json", {"inputs": self.inputs})
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
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that Ctrl-C reaches it through `_stop` alone, which lets it save
            pass_fds=(keep_open.fileno(),),
        )
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
    stages.write_json(training.folder / "done.json", {"inputs": training.inputs})


def _follow(
    output: IO[str], log: IO[str], tail: deque[str], training: Training, display: TrainingDisplay, work: Work
) -> int:
    """Copy the output to the log and show its progress; returns the number of held-out sets evaluated at the end."""
    evaluated, lines_logged = 0, 0
    for line in output:
        log.write(line)
        tail.append(line)
        if loaded := LOADED.search(line):
            display.resume(work, int(loaded[1]))
        elif evaluating := EVALUATING.match(line):
            if int(evaluating[1]) % 50 == 0:
                display.evaluate(work, (evaluated + int(evaluating[1]) / int(evaluating[2])) / training.evaluations)
        elif done := EVALUATED.match(line):
            evaluated += int(done[1]) == training.iterations
            log.flush()
        else:
            for iteration, fields in read_log(line).items():
                lines_logged += 1
                if lines_logged > 1 or training.iterations == iteration:  # the first one includes warming up
                    milliseconds = float(fields["elapsed time per iteration (ms)"])
                    display.iterate(work, iteration, float(fields["lm loss"]), milliseconds / 1000)
                log.flush()
    return evaluated


def _stop(process: subprocess.Popen[str], log: IO[str]) -> None:
    """Have the process save a checkpoint and end; kill it if it does not."""
    process.send_signal(signal.SIGTERM)
    try:
        rest, _ = process.communicate(timeout=SECONDS_TO_SAVE)
        log.write(rest)
    except subprocess.TimeoutExpired:
        log.write(f"Killed: it did not end within {SECONDS_TO_SAVE} s.\n")
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()
