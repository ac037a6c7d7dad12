"""Run training processes and show their progress: bars on a terminal, otherwise a few plain lines."""

import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock
from time import monotonic
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..console.display import duration, say
from .log_reader import MILLISECONDS, RESUMED, read_log

PLAIN_LINES = 4  # per run, without a terminal
SHOWN = 15  # last lines of the output to show if a run fails


@dataclass
class ShownTraining:
    """A training run on the display; `cost` is its expected time, relative to the other runs."""

    name: str
    iterations: int
    tokens_per_iteration: int
    cost: float
    done: int = 0  # iterations
    next_line: float = 0.0  # iteration of the next plain line
    title: str = ""  # its number and name, as in "3/12 dense"


class TrainingDisplay:
    """Run training processes; show their progress and the time left for all. Ctrl-C reaches only this process."""

    def __init__(self, console: Console, trainings: Sequence[ShownTraining], keep_open: IO[str]) -> None:
        """Prepare the bars without showing them.

        Args:
            console: to print to.
            trainings: all runs.
            keep_open: a file whose lock the processes hold too.
        """
        for number, shown in enumerate(trainings, 1):
            shown.title = f"{number}/{len(trainings)} {shown.name}"
        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._plain: Callable[[str], None] = (lambda _: None) if console.is_terminal else self.say
        self._trainings, self._keep_open = trainings, keep_open
        add_bar = partial(self._progress.add_task, note="", visible=False)
        self._bars = {shown.title: add_bar(shown.title, total=shown.iterations) for shown in trainings}
        self._bars["all"] = add_bar("all", total=1)
        self._began, self._worked = monotonic(), 0.0  # start, and cost of the iterations that were trained since then
        self._started: list[subprocess.Popen[str]] = []
        self._stopped, self._starting = False, Lock()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._bars["all"], visible=False)
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars. Runs go on if nobody reads it; rich exits at a broken pipe."""
        with suppress(OSError, SystemExit):
            say(self._progress.console, f"  {line}")

    def finish(self, shown: ShownTraining, result: str) -> None:
        """Show the result of a run that has ended."""
        shown.done = shown.iterations
        self.say(f"{shown.title}: {result}")

    def run_all(self, jobs: Iterable[Callable[[], None]], at_once: int) -> None:
        """Call the jobs, several at once; each calls `run`.

        KeyboardInterrupt, or an exception of a job, stops the runs of the others after a last checkpoint.
        """
        with ThreadPoolExecutor(at_once) as threads:
            try:
                for job in as_completed([threads.submit(job) for job in jobs]):
                    job.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise

    def run(
        self, shown: ShownTraining, command: Sequence[str], environment: Mapping[str, str], log: IO[str]
    ) -> tuple[int, str]:
        """Train a run to its end. Its output also goes to `log`.

        Returns:
            Its exit code, and the last lines of its output.

        Raises:
            KeyboardInterrupt: all runs were stopped.
        """
        shown.next_line = shown.iterations / PLAIN_LINES
        bar = self._bars[shown.title]
        self._progress.update(bar, note="starting", visible=True)
        self._progress.update(self._bars["all"], visible=True)
        self._plain(f"{shown.title}: starting")
        tail: deque[str] = deque(maxlen=SHOWN)
        try:
            with self._start(command, {**environment, "PYTHONUNBUFFERED": "1"}) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    tail.append(line)
                    log.write(line)
                    self._show(shown, line)
        finally:
            self._progress.update(bar, visible=False)
        if self._stopped:
            raise KeyboardInterrupt
        return process.returncode, "".join(tail).rstrip()

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        with self._starting:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                pass_fds=(self._keep_open.fileno(),),
            )
            self._started.append(process)
        return process

    def _stop(self) -> None:
        """Let all runs save a checkpoint and end; Ctrl-C meanwhile ends them at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(KeyboardInterrupt):
                with self._starting:
                    self._stopped = True
                if number == signal.SIGTERM and any(process.poll() is None for process in self._started):
                    self.say("Each run is saving a checkpoint; Ctrl-C now ends them at once, without one.")
                for process in self._started:
                    process.send_signal(number)
                for process in self._started:
                    process.wait()

    def _show(self, shown: ShownTraining, line: str) -> None:
        """Show the figures of a line of Megatron's output."""
        if resumed := RESUMED.search(line):
            shown.done = int(resumed[1])
            self._plain(f"{shown.title}: continues from iteration {shown.done}")
        for iteration, fields in read_log(line).items():
            self._worked += shown.cost * (iteration - shown.done) / shown.iterations
            shown.done = iteration
            speed = shown.tokens_per_iteration / max(float(fields[MILLISECONDS]), 1e-6)  # thousands of tokens a second
            loss = f"loss {float(fields['lm loss']):.3f}  " if "lm loss" in fields else ""
            note = f"{iteration}/{shown.iterations}  {loss}{speed:,.1f}k tokens/s"
            total = sum(run.cost for run in self._trainings)
            done = sum(run.cost * run.done / run.iterations for run in self._trainings)
            left = f"{duration((total - done) * (monotonic() - self._began) / max(self._worked, 1e-9))} left"
            self._progress.update(self._bars[shown.title], completed=iteration, note=note)
            self._progress.update(self._bars["all"], completed=done / total, note=left)
            if iteration >= min(shown.next_line, shown.iterations):
                shown.next_line = iteration + shown.iterations / PLAIN_LINES
                self._plain(f"{shown.title}: {note}  all: {left}")
