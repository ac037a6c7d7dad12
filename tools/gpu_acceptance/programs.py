"""Runs the programs of a part, one at a time, until the part's time is over."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ..common.places import ROOT

BEAT = 15.0  # seconds between two lines of progress
LAST_WORDS = 1500  # characters of a program that failed


class PartError(Exception):
    """A part cannot go on; the message is what is recorded."""


class OutOfTime(PartError):
    """Its limit is over."""


class NotRehearsed(PartError):
    """Without a GPU there is nothing to see; the message says why."""


class Programs:
    """Starts Python programs in processes of their own, on the GPU or the one that is not there.

    Attributes:
        log: takes all that they print.
        rehearsal: environment of the CUDA that does nothing; None on a real GPU.
        deadline: of the part, by `time.monotonic`.
        beat: told the seconds that are left, now and then.
    """

    def __init__(self, log: Path, rehearsal: Mapping[str, str] | None, beat: Callable[[float], None]) -> None:
        self.log, self.rehearsal, self.beat = log, rehearsal, beat
        self.deadline = 0.0

    def python(self, *words: str, share: float = 0.0, on_gpu: bool = True, **environment: str) -> str:
        """Run a file, or a module, with its arguments; returns what it printed to stdout and stderr.

        Args:
            words: a path that ends in .py, or a module's name, and arguments.
            share: active share of the pairs, which a rehearsal makes up.
            on_gpu: False: it does without one, and is not rehearsed.
            environment: on top of this process's.

        Raises:
            PartError: it failed; the message holds its last words.
            OutOfTime: it was ended at the deadline.
        """
        command = [*([] if words[0].endswith(".py") else ["-m"]), *words]
        if self.rehearsal is not None and on_gpu:
            through = [str(Path(__file__).with_name("rehearsed.py")), str(share)]
            command = [*through, *words]
            environment |= {**self.rehearsal, "BENCHMARK_THROUGH": shlex.join(through)}
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = self._wait(process)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        with self.log.open("rb") as log:
            log.seek(before)
            printed = log.read().decode(errors="replace")
        if code is None:
            raise OutOfTime(f"{Path(words[0]).name} was ended at the part's limit")
        if code:
            raise PartError(f"{Path(words[0]).name} ended with code {code}:\n{printed[-LAST_WORDS:].strip()}")
        return printed

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        while (left := self.deadline - time.monotonic()) > 0:
            try:
                return process.wait(timeout=min(BEAT, left))
            except subprocess.TimeoutExpired:
                self.beat(self.deadline - time.monotonic())
        return None
