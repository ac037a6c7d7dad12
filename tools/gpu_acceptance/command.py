"""Everything that only a GPU can show, on one of them and without network, in a quarter of an hour at most.

Each part's result is in results.json before the next begins; a second call goes on with the parts that are missing, on
the same card and with the same sources. With REHEARSE=1 it runs over a CUDA that does nothing, where numbers and times
mean nothing: it shows which parts start, their memory, and where the host waits.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common.errors import ToolError
from ..common.files import write_json
from ..common.places import ROOT
from ..common.units import duration
from . import report
from .parts import PARTS, Work
from .programs import NotRehearsed, OutOfTime, PartError, Programs

SOURCES = ("megatron", "tools", "benchmarks", "scripts", "tests")
SLOWER = 4  # times the limits that a rehearsal has: its host does the GPU's work, and costs nothing
PLAYED = "h100"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The tool's flags."""
    parts = "\n".join(f"  {name:<12} {part.title}, {part.limit} s at most" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_acceptance.sh",
        description=__doc__,
        epilog=f"parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/gpu_acceptance, or _rehearsed")
    parser.add_argument("--again", action="store_true", help="run these parts even if they have a result")
    parser.add_argument(
        "--write-docs", action="store_true", help="write the tables of docs/gpu.md from FOLDER, and stop"
    )
    options = parser.parse_args(arguments)
    options.rehearses = os.environ.get("REHEARSE", "0") != "0"
    options.out = options.out or ROOT / "runs" / ("gpu_acceptance" + "_rehearsed" * options.rehearses)
    return options


def rehearsal() -> dict[str, str]:
    """The environment of a program that is rehearsed on one card.

    Raises:
        ToolError: there is none here.
    """
    from ..rehearse.environment import environment_of  # builds what runs, which a GPU machine may not be able to

    return environment_of(PLAYED, devices=1) | {"CUDA_VISIBLE_DEVICES": "0"}


def machine(environment: Mapping[str, str] | None) -> dict[str, Any]:
    """What results belong to: the card, and this program's sources."""
    digest = hashlib.sha256()
    for path in sorted(
        path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")
    ):
        digest.update(path.read_bytes())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    card = f"no card: {PLAYED} played" if environment is not None else _card()
    found = {"card": card, "host": platform.node(), "torch": torch.__version__, "sources": digest.hexdigest()[:16]}
    return found | {"commit": git.stdout.strip() or None}


def _card() -> str:
    """As the driver's tool names it with its number; PyTorch would hold the card in this process too."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return "unknown"


class Acceptance:
    """The parts, run one after another, and their results in a folder."""

    def __init__(self, options: argparse.Namespace, environment: Mapping[str, str] | None) -> None:
        self.options, self.environment = options, environment
        self.path = options.out / "results.json"
        self.results: dict[str, Any] = {
            "rehearsal": environment is not None,
            "machine": machine(environment),
            "parts": {},
        }
        self.programs = Programs(options.out / "log.txt", environment, self._beat)

    def say(self, line: str) -> None:
        """A line of progress; each line of a rehearsal says that it is one."""
        for part in line.splitlines():
            print(f"rehearsal: {part}" if self.environment is not None else part, flush=True)

    def run(self) -> int:
        """Run what is missing; the exit code is 1 where a part does not pass."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        self._take_up()
        todo = [name for name in self.options.parts if self.options.again or name not in self.results["parts"]]
        with tempfile.TemporaryDirectory() as folder:
            for place, name in enumerate(todo):
                left = sum(self._limit(name) for name in todo[place:])
                self.say(f"[{place + 1}/{len(todo)}] {name}: {PARTS[name].title}; at most {duration(left)} left in all")
                self.results["parts"][name] = self._result(name, Path(folder))
                write_json(self.path, self.results)
                self.say("    " + report.line(name, self.results["parts"][name], self.environment is not None))
        chosen = {name: self.results["parts"][name] for name in self.options.parts}
        self.say("\n".join(["", *report.summary(chosen, self.environment is not None), f"Results: {self.path}"]))
        return int(any(result["state"] not in ("passed", "not rehearsed") for result in chosen.values()))

    def _take_up(self) -> None:
        """Results of an earlier call, if they are of this card and these sources."""
        if not self.path.exists():
            return
        before = json.loads(self.path.read_text(encoding="utf-8"))
        if {**before, "parts": None} == {**self.results, "parts": None}:
            self.results["parts"] = before["parts"]
            return
        aside = self.path.with_name(f"results-{time.strftime('%Y%m%d-%H%M%S')}.json")
        self.path.rename(aside)
        self.say(f"{self.path.name} is of another card or other sources: kept as {aside.name}, and all parts run anew")

    def _limit(self, name: str) -> int:
        return PARTS[name].limit * (SLOWER if self.environment is not None else 1)

    def _result(self, name: str, folder: Path) -> dict[str, Any]:
        start = time.monotonic()
        self.programs.deadline = start + self._limit(name)
        before = {other: result.get("figures", {}) for other, result in self.results["parts"].items()}
        result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M")}
        try:
            figures = PARTS[name].run(Work(self.programs, folder, before, self.results["machine"]["card"]))
            result |= {"state": "failed" if figures.get("failures") else "passed", "figures": figures}
        except (NotRehearsed, OutOfTime) as error:
            state = "out of time" if isinstance(error, OutOfTime) else "not rehearsed"
            result |= {"state": state, "error": str(error)}
        except Exception as error:  # whatever it is, the other parts have their turn
            words = str(error) if isinstance(error, PartError) else f"{type(error).__name__}: {error}"
            result |= {"state": "error", "error": words}
        return result | {"seconds": round(time.monotonic() - start, 1)}

    def _beat(self, left: float) -> None:
        self.say(f"    ... at most {duration(left)} left of this part")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where a part does not pass, 2 where nothing can run, 130 after an interruption."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if options.write_docs:
        report.write_docs(options.out / "results.json")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not options.rehearses and not torch.cuda.is_available():
            print("error: PyTorch finds no GPU here. REHEARSE=1 plays all this without one.", file=sys.stderr)
            return 2
        return Acceptance(options, rehearsal() if options.rehearses else None).run()
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on with the parts that are missing.", file=sys.stderr)
        return 130
