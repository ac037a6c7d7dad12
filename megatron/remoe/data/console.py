"""What preprocessing shows: a bar on a terminal, a few plain lines elsewhere, and one line at the end."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from megatron.remoe.data.documents import Problem
from megatron.remoe.data.encoding import TextEncoder
from megatron.remoe.data.preprocessing import Job
from megatron.remoe.data.preprocessing import Progress as State

PROBLEMS_SHOWN = 5
FIRST_LINE_AFTER = 10.0  # seconds; the waits between plain lines grow with the time that a run takes
SHARE_BETWEEN_LINES = 0.1


class PreprocessingDisplay:
    """Shows on standard error how far a run is, with its rates and the time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._start = time.monotonic()
        self._next_line = FIRST_LINE_AFTER
        self._task = self._progress.add_task("", total=None, note="starting")
        self._problems = 0

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, state: State) -> None:
        """Some more was done."""
        seconds = time.monotonic() - self._start
        note = f"{state.documents:,} documents  {rates(state, seconds)}{time_left(state, seconds)}"
        self._progress.update(self._task, total=state.total_bytes, completed=state.done_bytes, note=note)
        if not self._console.is_terminal and seconds > self._next_line:
            self._next_line = seconds + max(FIRST_LINE_AFTER, SHARE_BETWEEN_LINES * seconds)
            done = f"{state.done_bytes / state.total_bytes:.0%}, " if state.total_bytes else ""
            self._print(f"{done}{note}")

    def report(self, problem: Problem) -> None:
        """A line was left out; the first few are shown."""
        self._problems += 1
        if self._problems <= PROBLEMS_SHOWN:
            self._print(f"left out: {problem.message}")
        elif self._problems == PROBLEMS_SHOWN + 1:
            self._print("left out: more such lines, which are only counted")

    def summary(self, job: Job, state: State, encoder: TextEncoder) -> str:
        """One line for the end of a run; its time is that since the context was entered."""
        seconds = time.monotonic() - self._start
        outputs = ", ".join(str(job.prefix(key)) for key in job.json_keys)
        empty = f" ({state.empty:,} empty)" if state.empty else ""
        problems = "; ".join(f"{count:,} {kind}" for kind, count in state.problems.most_common())
        left_out = f"; left out {state.problems.total():,} lines ({problems})" if problems else ""
        return (
            f"{outputs}: {state.documents:,} documents{empty}, {state.tokens:,} tokens{left_out}; read back and right; "
            f"{duration(seconds)}, {rates(state, seconds)} with {encoder.engine}"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def rates(state: State, seconds: float) -> str:
    """Megabytes of input text and tokens per second."""
    seconds = max(seconds, 1e-9)
    return f"{state.text_bytes / 1e6 / seconds:.1f} MB/s  {state.tokens / 1e6 / seconds:.2f}M tokens/s"


def time_left(state: State, seconds: float) -> str:
    """How long the rest will take, if that can be told."""
    if not state.total_bytes or not state.done_bytes:
        return ""
    return f"  {duration(seconds * (state.total_bytes - state.done_bytes) / state.done_bytes)} left"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
