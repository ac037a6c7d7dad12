"""What is looked at, each in processes of its own in which the candidate is the Megatron that is found."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..common.data_sets import write_documents
from ..common.errors import ToolError
from ..common.log_reader import read_log
from ..common.places import ROOT
from ..common.tiny_model import RELU, TRAINING
from .candidate import Candidate
from .signatures import Parameter, shown, shown_change, wrong_with_call, wrong_with_replacement
from .survey import MARK
from .uses import Use

TIMEOUT = 600  # seconds for one process
STEPS = 4
FLAGS = [
    *TRAINING,
    *RELU,
    *f"--micro-batch-size 4 --lr 4e-3 --train-iters {STEPS} --split 100,0,0 --log-interval 1 --cpu".split(),
]
PYTEST = [*"-m pytest -q -p no:cacheprovider -o addopts=".split(), "--tb=line"]


@dataclass(frozen=True)
class Result:
    """Of one check.

    Attributes:
        problems: why it fails, one line each.
        said: what was looked at; empty where nothing was, which is no pass.
    """

    problems: list[str] = field(default_factory=list)
    said: str = ""

    @property
    def state(self) -> str:
        """passes, fails, or did not run."""
        return "fails" if self.problems else "passes" if self.said else "did not run"


@dataclass(frozen=True)
class Change:
    """One difference between the installed Megatron and the candidate.

    Attributes:
        what: path, flag or setting.
        how: old → new.
        place: file and line in the candidate, of the installed one where it is gone.
    """

    what: str
    how: str
    place: str


class Comparison:
    """The candidate beside the installed Megatron: all that this project takes from either."""

    def __init__(self, uses: Sequence[Use], base: Candidate, other: Candidate) -> None:
        self.uses, self.base, self.other = uses, base, other

    @cached_property
    def replaced(self) -> dict[str, Any]:
        """What stands in the place of Megatron's; see `survey.replaced`."""
        return _survey(self.other, "replaced")

    @cached_property
    def _paths(self) -> tuple[str, ...]:
        replaced = _survey(self.base, "replaced")["replaced"]
        return tuple(sorted({use.path for use in self.uses} | set(replaced) | set(self.replaced["replaced"])))

    @cached_property
    def then(self) -> dict[str, Any]:
        """What the installed Megatron has."""
        return _survey(self.base, "facts", self._paths)

    @cached_property
    def now(self) -> dict[str, Any]:
        """What the candidate has."""
        return _survey(self.other, "facts", self._paths)

    def known(self, path: str) -> bool:
        """Whether a path leads to something in the installed Megatron."""
        return "error" not in self.then["facts"][path]

    def gone(self, path: str) -> str:
        """Why a path leads to nothing any more; empty where it does not, or never did."""
        return self.now["facts"][path].get("error", "") if self.known(path) else ""

    def signature(self, path: str) -> list[Parameter] | None:
        """What the candidate takes there."""
        found = self.now["facts"][path].get("parameters")
        return None if found is None else [Parameter(*one) for one in found]

    def changes(self) -> list[Change]:
        """All differences in what this project takes from Megatron, and new settings about MoE."""
        own = {use.path for use in self.uses if use.override} | set(self.replaced["replaced"])
        found = []
        for path in filter(self.known, self._paths):
            then, now = self.then["facts"][path], self.now["facts"][path]
            old, new = ([Parameter(*one) for one in fact.get("parameters", [])] for fact in (then, now))
            if "error" in now:
                found.append(Change(path, f"{_signature(old)} → gone", place(then)))
            elif old != new:
                found.append(Change(path, shown_change(old, new), place(now)))
            elif path in own and then.get("body") != now.get("body"):
                found.append(Change(path, "another body", place(now)))
        old_settings, new_settings = self.then["moe_settings"], self.now["moe_settings"]
        for name in sorted(old_settings.keys() ^ new_settings.keys()):
            how = "a new setting" if name in new_settings else "gone"
            found.append(Change(name, how, new_settings.get(name) or old_settings[name]))
        return found


def _signature(parameters: list[Parameter]) -> str:
    return shown(parameters) if parameters else "there"


def place(fact: dict[str, Any]) -> str:
    """File and line."""
    return f"{fact['file']}:{fact['line']}" if "line" in fact else ""


def imports(comparison: Comparison) -> Result:
    """Whether all that is named is there, and comes from the candidate."""
    folder, problems = comparison.other.folder, []
    for name, file in comparison.now["modules"].items():
        if folder is not None and not Path(file).is_relative_to(folder):
            problems.append(f"megatron.{name} comes from {file}, not from the candidate")
    names = {use.path for use in comparison.uses if not use.path.startswith("--")}
    known = sorted(filter(comparison.known, names))
    for path in known:
        if reason := comparison.gone(path):
            users = ", ".join(sorted({use.where for use in comparison.uses if use.path == path}))
            problems.append(f"{path} ({place(comparison.then['facts'][path])}): {reason}; used in {users}")
    return Result(problems, f"{len(known)} names" if known else "")


def settings(comparison: Comparison) -> Result:
    """Whether all flags that are read have the names that they are read by."""
    flags = {use.path: use.where for use in comparison.uses if use.path.startswith("--")}
    known = sorted(filter(comparison.known, flags))
    problems = [f"{path}: {reason}; used in {flags[path]}" for path in known if (reason := comparison.gone(path))]
    return Result(problems, f"{len(known)} flags" if known else "")


def signatures(comparison: Comparison) -> Result:
    """Whether Megatron takes our calls, and our methods and replacements what Megatron may give them."""
    problems, looked_at = [], 0
    own = [(use.path, use.override, use.where) for use in comparison.uses if use.override is not None]
    for path, found in comparison.replaced["replaced"].items():
        if found is not None:
            own.append((path, tuple(Parameter(*one) for one in found), "what stands there instead"))
    for use in comparison.uses:
        if use.call is not None and (theirs := _alive(comparison, use.path)):
            looked_at += 1
            if reason := wrong_with_call(theirs, *use.call):
                problems.append(_mismatch(comparison, use.path, f"{use.where}: {reason}"))
    for path, ours, where in own:
        if theirs := _alive(comparison, path):
            looked_at += 1
            # Ours may ask for more where we are the ones who call it, as constructors do.
            before = wrong_with_replacement(
                ours, [Parameter(*one) for one in comparison.then["facts"][path]["parameters"]]
            )
            if (reason := wrong_with_replacement(ours, theirs)) and reason != before:
                problems.append(_mismatch(comparison, path, f"{where}: {reason}"))
    return Result(problems, f"{looked_at} calls and methods" if looked_at else "")


def _alive(comparison: Comparison, path: str) -> list[Parameter] | None:
    there = comparison.known(path) and not comparison.gone(path)
    return comparison.signature(path) if there else None


def _mismatch(comparison: Comparison, path: str, reason: str) -> str:
    then, now = comparison.then["facts"][path], comparison.now["facts"][path]
    change = shown_change(
        [Parameter(*one) for one in then["parameters"]], [Parameter(*one) for one in now["parameters"]]
    )
    return f"{path} ({place(now)}) {change}: {reason}"


def patches(comparison: Comparison) -> Result:
    """Whether each change of Megatron can be made."""
    found = comparison.replaced
    problems = [f"{what}: {reason}" for what, reason in found["failed"].items()]
    return Result(problems, f"{found['patches']} patches" if found["patches"] and found["replaced"] else "")


def tests(*selection: str) -> Callable[[Comparison], Result]:
    """A check by tests of this project.

    Args:
        selection: files, or tests of them, and options of pytest.
    """

    def check(comparison: Comparison) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            ended = _run(comparison.other, [*PYTEST, f"--junitxml={report}", *selection])
            suite = ElementTree.parse(report).find("testsuite") if report.exists() else None
        if suite is None:
            return Result([_last_words(ended)])
        failed = [
            f"{case.get('classname')}::{case.get('name')}: {said.get('message', '').splitlines()[0]}"
            for case in suite.iter("testcase")
            for said in [*case.findall("failure"), *case.findall("error")]
        ]
        skipped = int(suite.get("skipped", 0))
        passed = int(suite.get("tests", 0)) - skipped - len(failed)
        if ended.returncode and not failed:
            failed = [_last_words(ended)]
        return Result(failed, f"{passed} tests" + (f", {skipped} skipped" if skipped else "") if passed else "")

    return check


def training(comparison: Comparison) -> Result:
    """A tiny ReMoE on the CPU with each; other losses are told, and only those that are not finite are a failure."""
    ended = _train(comparison.other)
    found = read_log(ended.stdout)
    if ended.returncode or sorted(found) != [*range(1, STEPS + 1)]:
        return Result([_last_words(ended)])
    losses, sparsities = ([float(found[step][name]) for step in sorted(found)] for name in ("lm loss", "sparsity"))
    if not all(map(math.isfinite, losses)):
        return Result([f"losses: {losses}"])
    base = _train(comparison.base)
    if base.returncode:
        raise ToolError(f"The training with the installed Megatron fails: {_last_words(base)}")
    expected = [float(fields["lm loss"]) for _, fields in sorted(read_log(base.stdout).items())]
    apart = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    beside = (
        f"as {comparison.base.version}" if not apart else f"up to {apart:.1e} from those of {comparison.base.version}"
    )
    return Result([], f"{STEPS} steps to loss {losses[-1]:.4f} and S {sparsities[-1]:.4f}; losses {beside}")


@cache
def _train(who: Candidate) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        write_documents(prefix, (ROOT / "LICENSE").read_bytes().split(b"\n\n"))
        return _run(who, [str(ROOT / "pretrain_gpt.py"), *FLAGS, "--data-path", str(prefix)])


@cache
def _survey(who: Candidate, question: str, paths: tuple[str, ...] = ()) -> Any:
    ended = _run(who, ["-m", "tools.canary.survey", question], json.dumps(paths))
    answers = [line for line in ended.stdout.splitlines() if line.startswith(MARK)]
    if ended.returncode or not answers:
        raise ToolError(f"megatron-core {who.version} cannot be looked at: {_last_words(ended)}")
    return json.loads(answers[-1].removeprefix(MARK))


def _run(who: Candidate, words: list[str], given: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in this project's folder with a Megatron in front, told to try it whatever its version."""
    environment = os.environ | {"REMOE_TRY_MEGATRON": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    if who.folder is not None:
        environment["PYTHONPATH"] = str(who.folder)
    command = [sys.executable, *words]
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"It had not ended after {TIMEOUT} s.")


def _last_words(ended: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process printed, which tells of its error."""
    lines = [line for line in [*ended.stdout.splitlines(), *ended.stderr.splitlines()] if line.strip()]
    return lines[-1].strip() if lines else f"exit code {ended.returncode}, and no word"


SPECIFICATIONS = (
    "tests/local/test_transformer_engine.py",
    "tests/local/test_fused_layers.py::test_specification_keeps_what_it_does_not_know",
)
CHECKS: dict[str, Callable[[Comparison], Result]] = {
    "imports": imports,
    "settings": settings,
    "signatures": signatures,
    "patches": patches,
    "patches still needed": tests("tests/test_patches.py", "-k", "still"),
    "layer specifications": tests(*SPECIFICATIONS),
    "router and controller": tests("tests/routing"),
    "dispatch and experts": tests("tests/moe"),
    "training": training,
}
