"""The candidate beside the installed Megatron, each looked at by a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from ..common.errors import ToolError
from ..common.places import ROOT
from .candidate import Candidate
from .signatures import Parameter, shown, shown_change
from .survey import MARK
from .uses import Use

TIMEOUT = 600  # seconds for one process
Ended = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Fact:
    """What a path leads to.

    Attributes:
        parameters: of a function or class; None for what has none.
        body: a hash of what its code does.
        place: file and line.
        error: why there is nothing; empty where there is something.
    """

    parameters: list[Parameter] | None
    body: str
    place: str
    error: str


@dataclass(frozen=True)
class Look:
    """What one Megatron has; see `survey.survey`."""

    modules: dict[str, str]
    facts: dict[str, Fact]
    moe_settings: dict[str, str]
    replaced: dict[str, list[Parameter] | None]
    failed: dict[str, str]
    patches: int


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
    """All that this project takes from Megatron, in the installed one and in the candidate."""

    def __init__(self, uses: Sequence[Use], base: Candidate, other: Candidate) -> None:
        self.uses, self.base, self.other = uses, base, other
        self._paths = tuple(sorted({use.path for use in uses}))

    @cached_property
    def then(self) -> Look:
        """The installed Megatron."""
        return look(self.base, self._paths)

    @cached_property
    def now(self) -> Look:
        """The candidate."""
        return look(self.other, self._paths)

    def is_known(self, path: str) -> bool:
        """Whether a path leads to something in the installed Megatron."""
        return path in self.then.facts and not self.then.facts[path].error

    def signatures(self, path: str) -> tuple[list[Parameter], list[Parameter]] | None:
        """What is taken at a path, by the installed Megatron and the candidate; None where one of them has nothing."""
        then, now = (found[path].parameters if path in found else None for found in (self.then.facts, self.now.facts))
        return None if then is None or now is None else (then, now)

    def told(self, path: str, reason: str) -> str:
        """A problem with a path that is in both: where it is, how it changed, and what does not fit."""
        then, now = self.then.facts[path], self.now.facts[path]
        return f"{path} ({now.place}) {shown_change(then.parameters or [], now.parameters or [])}: {reason}"

    def changes(self) -> list[Change]:
        """All differences in what this project takes from Megatron, and new settings about MoE."""
        rewritten = {use.path for use in self.uses if use.override} | self.then.replaced.keys()
        found: dict[tuple[str, str], Change] = {}
        for path in filter(self.is_known, sorted(self.then.facts)):
            then, now = self.then.facts[path], self.now.facts.get(path)
            if now is None or now.error:
                change = Change(path, f"{shown(then.parameters or [])} → gone", then.place)
            elif then.parameters != now.parameters:
                change = Change(path, shown_change(then.parameters or [], now.parameters or []), now.place)
            elif path in rewritten and then.body != now.body:
                change = Change(path, "another body", now.place)
            else:
                continue
            found.setdefault((change.place, change.how), change)  # the same by several paths
        old, new = self.then.moe_settings, self.now.moe_settings
        for name in sorted(old.keys() ^ new.keys()):
            change = Change(name, "a new setting" if name in new else "gone", new.get(name) or old[name])
            found[change.place, name] = change
        return list(found.values())


@cache
def look(who: Candidate, paths: tuple[str, ...]) -> Look:
    """What paths lead to.

    Raises:
        ToolError: this Megatron cannot be imported.
    """
    ended = run(who, ["-m", "tools.canary.survey"], json.dumps(paths))
    answers = [line for line in ended.stdout.splitlines() if line.startswith(MARK)]
    if ended.returncode or not answers:
        raise ToolError(f"megatron-core {who.version} cannot be looked at: {last_words(ended)}")
    found: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
    facts = {
        path: Fact(
            _parameters(fact.get("parameters")), fact.get("body", ""), fact.get("place", ""), fact.get("error", "")
        )
        for path, fact in found["facts"].items()
    }
    return Look(
        **found | {"facts": facts, "replaced": {path: _parameters(one) for path, one in found["replaced"].items()}}
    )


def _parameters(given: list[list[Any]] | None) -> list[Parameter] | None:
    return None if given is None else [Parameter(*one) for one in given]


def run(who: Candidate, words: list[str], given: str = "") -> Ended:
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


def last_words(ended: Ended) -> str:
    """The last line that a process printed, which tells of its error."""
    lines = [line for line in [*ended.stdout.splitlines(), *ended.stderr.splitlines()] if line.strip()]
    return lines[-1].strip() if lines else f"exit code {ended.returncode}, and no word"
