"""`SAVE/metrics.jsonl`: what a training logs, one JSON object a line (docs/run_log.md)."""

import argparse
import importlib.metadata
import itertools
import json
import logging
import re
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron.remoe
from megatron.remoe.patches.log_lines import run_logger

FILE = "metrics.jsonl"
LIMIT_BYTES = 2**25
THINNED = ("log", "flips")
STARTS = 4  # newest ones whose arguments are kept

_STEP = re.compile(r"\] iteration +(\d+)/")
_EVALUATION = re.compile(r" validation(?:-(\S+))? loss at iteration (\d+)(?: on (test|validation) set)? \|")
_FIGURE = re.compile(r" ([a-zA-Z][^:|]*): +(-?\d[\d.E+-]*) \|")


@contextmanager
def keep_run_log(args: argparse.Namespace) -> Iterator[None]:
    """Write the log of the training within, by the last rank, which has the loss; nothing where nothing is saved.

    Args:
        args: Megatron's arguments, validated.
    """
    if args.skip_train or not args.save or "://" in args.save or args.rank != args.world_size - 1:
        yield
        return
    logger, log = run_logger(), RunLog(args)
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    try:
        yield
    finally:
        logger.removeHandler(log)


class RunLog(logging.Handler):
    """Takes the lines that Megatron prints, and the figures of this package, as records of `run_logger`.

    A record is a printed line (str), or a dict: with a `kind` it is written as it is, without one it belongs to the
    next line of the training log.
    """

    def __init__(self, args: argparse.Namespace, limit: int = LIMIT_BYTES) -> None:
        """
        Args:
            args: Megatron's arguments; `iteration`, which is set when a checkpoint is loaded, is read when the first
                line comes.
            limit: bytes above which every second record of `THINNED` is left out, as often as it takes.
        """
        super().__init__()
        self.path = Path(args.save, FILE)
        self._args, self._limit = args, limit
        self._started = _now()
        self._stride = 0
        self._routing: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write what belongs into the file; where that cannot be done, warn once and let the training go on."""
        if self._args.iteration >= self._args.train_iters:
            return  # nothing is trained, and the evaluation is in the file
        try:
            if not isinstance(record.msg, str):
                self._take(record.msg)
            elif step := _STEP.search(record.msg):
                self._write(self._log_record(int(step[1]), _figures(record.msg)))
            elif evaluation := _EVALUATION.match(record.msg):
                self._write(_validation_record(evaluation, _figures(record.msg)))
        except OSError as error:
            warnings.warn(f"{self.path}: {error.strerror}. The training goes on without this log.", stacklevel=1)

    def _take(self, record: dict[str, Any]) -> None:
        if "kind" in record:
            self._write(record)
        else:
            self._routing = record

    def _log_record(self, iteration: int, figures: dict[str, float]) -> dict[str, Any]:
        seconds = figures.pop("elapsed_time_per_iteration_ms") / 1000
        tokens = figures["global_batch_size"] * self._args.seq_length
        record = {"kind": "log", "time": _now(), "iteration": iteration, **figures}
        record |= {"seconds_per_iteration": seconds, "tokens_per_second": round(tokens / max(seconds, 1e-4), 1)}
        return record | self._routing

    def _write(self, record: dict[str, Any]) -> None:
        if not self._stride:
            self._stride = 1
            self._begin()
        if self._is_due(record):
            self._thin(self._append(record))

    def _thin(self, size: int) -> None:
        """Bring a file of so many bytes below the limit, as far as there is something to leave out."""
        while size > self._limit and self._stride <= self._args.train_iters // self._args.log_interval:
            self._stride *= 2
            size = self._write_anew(filter(self._is_due, read_run_log(self.path)))

    def _is_due(self, record: dict[str, Any]) -> bool:
        line, last = record["iteration"] // self._args.log_interval, self._args.train_iters // self._args.log_interval
        return record["kind"] not in THINNED or line % self._stride == 0 or line == last

    def _begin(self) -> None:
        """Take out what came after the checkpoint that this training goes on from, and say how it was started."""
        iteration = self._args.iteration
        if iteration:
            kept = [record for record in read_run_log(self.path) if record["iteration"] <= iteration]
            starts = [record for record in kept if record["kind"] == "start"]
            former = starts[-1].get("args", {}) if starts else {}
            self._stride = _stride_of(kept, former.get("log_interval", self._args.log_interval))
            for record in starts[: 1 - STARTS]:
                record.pop("args", None)
            self._write_anew(kept)
        elif self.path.exists():
            self.path.rename(_free_name(self.path))
        versions = {"version": megatron.remoe.__version__, "megatron_core": importlib.metadata.version("megatron-core")}
        arguments = {name: value for name, value in sorted(vars(self._args).items()) if _is_json(value)}
        self._thin(
            self._append(
                {"kind": "start", "time": self._started, "iteration": iteration, **versions, "args": arguments}
            )
        )

    def _append(self, record: dict[str, Any]) -> int:
        """Write one line, without what is not finite; returns the size of the file in bytes."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: value for name, value in record.items() if _is_json(value)}) + "\n")
            return file.tell()

    def _write_anew(self, records: Iterable[dict[str, Any]]) -> int:
        """Put them aside and in the file's place; returns its size in bytes."""
        aside = self.path.with_suffix(".new")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            size = file.tell()
        aside.replace(self.path)
        return size


def read_run_log(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's log, in order; nothing where there is none, and not a line that was cut off.

    Args:
        path: `SAVE/metrics.jsonl`.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _stride_of(records: Iterable[dict[str, Any]], log_interval: int) -> int:
    """Of the lines of the log that are kept: what lies between most of them, a power of two."""
    lines = [record["iteration"] // log_interval for record in records if record["kind"] == "log"]
    gaps = [after - before for before, after in itertools.pairwise(lines)]
    return 1 << max(1, int(statistics.median(gaps))).bit_length() - 1 if gaps else 1


def _free_name(path: Path) -> Path:
    """metrics.old.jsonl, metrics.old.1.jsonl, ...: the first that is not there."""
    names = itertools.chain([".old.jsonl"], (f".old.{number}.jsonl" for number in itertools.count(1)))
    return next(former for name in names if not (former := path.with_suffix(name)).exists())


def _now() -> float:
    return round(time.time(), 3)


def _figures(line: str) -> dict[str, float]:
    """The finite figures of a printed line, by their names in the file."""
    return {re.sub(r"\W+", "_", name).strip("_").lower(): _number(text) for name, text in _FIGURE.findall(line)}


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def _validation_record(evaluation: re.Match[str], figures: dict[str, float]) -> dict[str, Any]:
    name, iteration, last = evaluation.groups()
    which = name or ("test" if last == "test" else None)
    losses = {name.removesuffix("_value"): value for name, value in figures.items() if name.endswith("_value")}
    return {"kind": "validation", "iteration": int(iteration), **({"set": which} if which else {}), **losses}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
