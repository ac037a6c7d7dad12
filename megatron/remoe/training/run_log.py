"""Write and read `SAVE/metrics.jsonl`, a run's log with one JSON object per line (docs/run_log.md)."""

import argparse
import itertools
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron.remoe
from megatron.remoe.files.files import write_atomically

FILE = "metrics.jsonl"
TOTALS = ("total_active_pairs", "total_layer_tokens")
LARGEST = 2**53  # largest whole number that is accepted

Record = dict[str, Any]


@contextmanager
def write_run_log(args: argparse.Namespace) -> Iterator[None]:
    """Write the log of a training run on the last rank, which has the loss. Do nothing without training or saving."""
    if args.skip_train or not args.save or "://" in args.save or args.rank != args.world_size - 1:
        yield
        return
    from megatron.remoe.patches.log_lines import run_logger  # imports Megatron, which tools that only read do not need

    logger, log = run_logger(), RunLog(args)
    logger.setLevel(logging.INFO)  # enables the records
    logger.addHandler(log)
    try:
        yield
    finally:
        logger.removeHandler(log)


class RunLog(logging.Handler):
    """Write the records of `run_logger`.

    A record is a dict. With a `kind` it becomes a line; without one its figures are added to the next `log` line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.path = Path(args.save, FILE)
        self._args = args  # loading a checkpoint sets `iteration`, so it is read at the first record
        self._started = round(time.time(), 3)
        self._has_begun = False
        self._figures: Record = {}  # for the next line
        self._totals_before: Record | None = None  # running sums at the start; None if they are unknown

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record. If that fails, warn and continue."""
        try:
            assert isinstance(record.msg, dict)
            self._take(record.msg)
        except Exception as error:
            warnings.warn(f"{self.path}: {error}. Training continues without this line of the log.", stacklevel=1)

    def _take(self, record: Record) -> None:
        if "kind" not in record:
            self._figures |= record
        elif self._args.iteration >= self._args.train_iters:
            # Nothing is trained. If the last evaluation was interrupted, its result is still missing.
            if record["kind"] == "validation" and not self._has(record):
                self._append(record)
        else:
            if not self._has_begun:
                self._begin()
                self._has_begun = True
            if record["kind"] == "log":
                record = {"kind": "log", "time": round(time.time(), 3)} | record | self._figures
                self._figures = {}
            self._append(self._with_all_totals(record))

    def _has(self, validation: Record) -> bool:
        names = ("kind", "iteration", "set", "final")
        wanted = [validation.get(name) for name in names]
        return any([record.get(name) for name in names] == wanted for record in read_run_log(self.path))

    def _with_all_totals(self, record: Record) -> Record:
        """Add the sums of earlier sessions to a record's running sums; drop these if the earlier ones are unknown."""
        if self._totals_before is None:
            return {name: value for name, value in record.items() if name not in TOTALS}
        return record | {name: record[name] + self._totals_before[name] for name in TOTALS if name in record}

    def _begin(self) -> None:
        """Add a `start` line. First remove lines after the loaded checkpoint, or rename the log of an older run."""
        iteration = self._args.iteration
        if iteration:
            self._cut(iteration)
        elif self._totals_before is None:  # else the log is renamed already, and writing the line failed
            if self.path.exists():
                names = itertools.chain([".old.jsonl"], (f".old.{number}.jsonl" for number in itertools.count(1)))
                self.path.rename(next(old for name in names if not (old := self.path.with_suffix(name)).exists()))
            self._totals_before = dict.fromkeys(TOTALS, 0)
        versions = {"version": megatron.remoe.__version__, "megatron_core": megatron.remoe.megatron_version()}
        arguments = {name: value for name, value in sorted(vars(self._args).items()) if _is_json(value)}
        self._append({"kind": "start", "time": self._started, "iteration": iteration, **versions, "args": arguments})

    def _cut(self, iteration: int) -> None:
        def write(aside: Path) -> None:
            with aside.open("w", encoding="utf-8") as file:
                for record in read_run_log(self.path):
                    if record["iteration"] <= iteration:
                        file.write(json.dumps(record) + "\n")
                    if record["iteration"] == iteration and all(isinstance(record.get(name), int) for name in TOTALS):
                        self._totals_before = {name: record[name] for name in TOTALS}

        write_atomically(self.path, write)

    def _append(self, record: Record) -> None:
        """Write one line. Leave out values that are not finite or that JSON cannot hold."""
        line = json.dumps({name: value for name, value in record.items() if _is_json(value)}) + "\n"
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the last line was cut off
                    line = "\n" + line
            file.write(line.encode())


def read_run_log(path: Path, unread: Callable[[str], object] = lambda line: None) -> Iterator[Record]:
    """Yield the records of a run's log, in order; nothing if there is no file.

    Args:
        path: `SAVE/metrics.jsonl`.
        unread: called with each line that is not a record, except blank lines and a last line that was cut off.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            is_record = isinstance(record, dict) and isinstance(record.get("kind"), str)
            if is_record and as_whole_number(record.get("iteration")) is not None:
                yield record
            elif line.endswith("\n") and not line.isspace():
                unread(line)


def as_whole_number(value: Any) -> int | None:
    """Return a value if it is a whole number from 0 to `LARGEST`, else None."""
    return value if type(value) is int and 0 <= value <= LARGEST else None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
