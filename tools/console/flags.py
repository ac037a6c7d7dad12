"""Define argparse types for the tools' flags, and split lists of Megatron's flags by name.

Megatron's parser reads the values of its flags: recipes/megatron_values.py.
"""

import argparse
import os
from collections.abc import Callable, Container, Iterable, Sequence


def group_by_flag(words: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return flag → the words after it; the last occurrence of a flag counts.

    Use it for the names of flags, and for the fingerprints of runs. Megatron's parser would add seconds to every
    command, and change the fingerprints of finished runs.
    """
    settings: dict[str, tuple[str, ...]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            settings[flag] = (value,) if equals else ()
        elif flag:
            settings[flag] += (word,)
    return settings


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before -- and those after it."""
    end = words.index("--") if "--" in words else len(words)
    return [*words[:end]], [*words[end + 1 :]]


def without(words: Iterable[str], flags: Container[str]) -> list[str]:
    """Return the words without these flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept


def number_of_cores() -> int:
    """Return the number of cores that this process may use, or of all cores on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tool_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the command `remoe NAME`; the description keeps its line breaks in the help."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"remoe {name}", description=description, formatter_class=formatter)


def whole_number(least: int) -> Callable[[str], int]:
    """Return an argparse type: whole numbers of at least `least`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least {least}")
        return int(text)

    return convert


def above_zero(text: str) -> float:
    """Convert to a number above 0; an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return number
