"""Parse and change lists of command-line flags."""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence

SCHEDULE = "--step-batch-size-schedule"
GPT2_WORDS = 50257  # size of its vocabulary
OF_GPT2S_SIZE = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(GPT2_WORDS)]  # needs no files

Settings = dict[str, tuple[str, ...]]  # flag → its values


def parse(words: Iterable[str]) -> Settings:
    """Return flags and their values; later ones replace earlier ones."""
    settings: Settings = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            settings[flag] = (value,) if equals else ()
        elif flag:
            settings[flag] += (word,)
    return settings


def whole(settings: Settings, flag: str) -> int:
    """Return the whole number after a flag, or 0."""
    values = settings.get(flag, ())
    return int(values[0]) if values and values[0].isdecimal() else 0


def last_value(words: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag, given as `--flag value` or `--flag=value`; None if it is not given."""
    return next(iter(parse(words).get(flag, ())), None)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before -- and those after it."""
    place = words.index("--") if "--" in words else len(words)
    return [*words[:place]], [*words[place + 1 :]]


def without(words: Iterable[str], left_out: Callable[[str], bool]) -> list[str]:
    """Return the words without the flags that `left_out` accepts, and without their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = left_out(word.partition("=")[0])
        if not dropping:
            kept.append(word)
    return kept


def for_a_plan(words: Sequence[str]) -> list[str]:
    """Return the words with the last batch size of --step-batch-size-schedule for all steps.

    If GPT-2's files are not given or not there yet, the words have a vocabulary of the same size.
    """
    if (schedule := last_value(words, SCHEDULE)) is not None:
        words = [*without(words, SCHEDULE.__eq__), "--global-batch-size", schedule.rpartition(":")[2]]
    files = [last_value(words, flag) for flag in ("--vocab-file", "--merge-file")]
    is_there = all(file is not None and os.path.isfile(file) for file in files)
    needs_files = last_value(words, "--tokenizer-type") in (None, "GPT2BPETokenizer")
    return [*words, *OF_GPT2S_SIZE] if needs_files and not is_there else [*words]


def number_of_cores() -> int:
    """Return the number of cores that this process may use; on macOS, of all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tool_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the command `remoe NAME` whose description keeps its lines."""
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
