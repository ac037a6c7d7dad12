"""Several versions side by side, in Markdown."""

from collections.abc import Sequence

from ..common.markdown import table
from .candidate import Candidate
from .checks import Result
from .comparison import Change

BEGIN, END = "<!-- canary:begin -->", "<!-- canary:end -->"
Found = tuple[Candidate, dict[str, Result], list[Change]]


def markdown(base: Candidate, found: Sequence[Found]) -> str:
    """The table of outcomes, what fails, and what changed against the installed version."""
    titles = ["check", *(f"{one.version}, {one.date}" for one, _, _ in found)]
    lines = table(titles, ([name, *(_cell(results[name]) for _, results, _ in found)] for name in found[0][1]))
    failures = [
        f"- {one.version}, {name}: {_plain(problem)}"
        for one, results, _ in found
        for name, result in results.items()
        for problem in result.problems
    ]
    if failures:
        lines += ["", "What fails:", "", *failures]
    lines += ["", f"Changed against {base.version}, of what this project takes from Megatron:", ""]
    merged: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for one, _, changes in found:
        for change in changes:
            merged.setdefault((change.what, change.how), []).append((change.place, one.version))
    rows = []
    for (what, how), places in merged.items():
        where = ", ".join(dict.fromkeys(place for place, _ in places))
        versions = ", ".join(version for _, version in places)
        rows.append([f"`{what.removeprefix('megatron.')}`", _plain(how), where, versions])
    return "\n".join([*lines, *table(["what", "old → new", "file and line", "in"], rows)])


def _cell(result: Result) -> str:
    return f"{result.state}: {result.said}" if result.said and not result.problems else f"**{result.state}**"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("*", r"\*").replace("<", "&lt;")
