"""The candidate beside the installed Megatron, each looked at by a process of its own."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import Signature
from pathlib import Path

from ..common.errors import ToolError
from ..common.places import ROOT
from .candidate import Candidate
from .facts import Look
from .signatures import shown_change
from .uses import Use

TIMEOUT = 600  # seconds for one process
Ended = subprocess.CompletedProcess[str]


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

    def signatures(self, path: str) -> tuple[Signature, Signature] | None:
        """What is taken at a path, by the installed Megatron and the candidate; None where one of them has nothing."""
        then, now = (found[path].signature if path in found else None for found in (self.then.facts, self.now.facts))
        return None if then is None or now is None else (then, now)

    def told(self, path: str, reason: str) -> str:
        """A problem with a path that has a signature in both: where it is, how it changed, and what does not fit."""
        then, now = self.then.facts[path], self.now.facts[path]
        return f"{path} ({now.place}) {shown_change(then.signature, now.signature)}: {reason}"

    def changes(self) -> list[Change]:
        """All differences in what this project takes from Megatron, and new settings about MoE."""
        rewritten = {use.path for use in self.uses if use.override} | self.then.replaced.keys()
        found: dict[tuple[str, str], Change] = {}
        for path in filter(self.is_known, sorted(self.then.facts)):
            then, now = self.then.facts[path], self.now.facts.get(path)
            if now is None or now.error:
                change = Change(path, f"{then.signature or Signature()} → gone", then.place)
            elif then.signature != now.signature:
                change = Change(path, shown_change(then.signature, now.signature), now.place)
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
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "look"
        ended = run(who, ["-m", "tools.canary.survey", str(found)], json.dumps(paths))
        if ended.returncode:
            raise ToolError(f"megatron-core {who.version} cannot be looked at: {last_words(ended)}")
        answer: Look = pickle.loads(found.read_bytes())
    return answer


def run(who: Candidate, words: list[str], given: str = "") -> Ended:
    """Run Python in this project's folder with a Megatron in front, told to try it whatever its version."""
    settings = {"REMOE_TRY_MEGATRON": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(who.folder or "")}
    command = [sys.executable, *words]
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, cwd=ROOT, env=os.environ | settings, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"It had not ended after {TIMEOUT} s.")


def last_words(ended: Ended) -> str:
    """The last line that a process printed, which tells of its error."""
    lines = [line for line in [*ended.stdout.splitlines(), *ended.stderr.splitlines()] if line.strip()]
    return lines[-1].strip() if lines else f"exit code {ended.returncode}, and no word"
