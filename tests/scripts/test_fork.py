"""Test that docs/fork.md lists each flag that differs from the fork."""

import json
import re
from pathlib import Path

from tests.scripts.launching import command
from tests.training_runs import REPOSITORY
from tools.console.flags import group_by_flag
from tools.recipes.models import PAPER, ROUTINGS

Flags = dict[str, dict[str, str]]  # script → flag → the words after it


def read_fork_flags() -> Flags:
    table = json.loads(Path(__file__).with_name("fork_flags.json").read_text())["flags"]
    return {name: table["all"] | flags for name, flags in table.items() if name != "all"}


def group_words(words: list[str]) -> dict[str, str]:
    return {flag: " ".join(values) for flag, values in group_by_flag(words).items() if flag != "--data-path"}


def read_our_flags() -> Flags:
    flags = {}
    for name in read_fork_flags():
        words = command(name, OUTPUT_DIR="runs/NAME")
        entry = next(place for place, word in enumerate(words) if word.endswith("pretrain_gpt.py"))
        flags[name] = group_words(words[entry + 1 :])
    return flags


def cell(flags: Flags, flag: str, routing: str) -> str:
    values = [flags[f"{size}_{routing}"].get(flag) for size in PAPER]
    given = ["not given" if value is None else value or "given" for value in values]
    return given[0] if len(set(given)) == 1 else " / ".join(given)


def equal(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def test_the_page_has_every_flag() -> None:
    page, fork, ours = (REPOSITORY / "docs" / "fork.md").read_text(), read_fork_flags(), read_our_flags()
    rows = re.findall(r"^\| (`--.+`) \| (.+) \| (.+) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    given, expected = {}, {}
    for flags, scripts, theirs, here, _ in rows:
        given |= {(flag, scripts): (theirs, here) for flag in re.findall(r"`(--[\w-]+)`", flags)}
    for flag in {flag for flags in (*fork.values(), *ours.values()) for flag in flags}:
        cells = {routing: (cell(fork, flag, routing), cell(ours, flag, routing)) for routing in ROUTINGS}
        different = {routing: pair for routing, pair in cells.items() if not equal(*pair)}
        if not different:
            continue
        (pair,) = set(different.values())
        expected[flag, "all" if len(different) == len(ROUTINGS) else ", ".join(different)] = pair
    assert given == expected
