"""A command's flags, as they are typed."""

import argparse
from collections.abc import Callable, Iterable, Sequence

GPT2_WORDS = 50257  # of its vocabulary
OF_GPT2S_SIZE = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(GPT2_WORDS)]  # without files

Settings = dict[str, tuple[str, ...]]  # flag → its values, of the last occurrence, which is the one that counts


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


def last_value(words: Sequence[str], flag: str) -> str | None:
    """Return the value that counts, the last one given to a flag as `--flag value` or `--flag=value`; None without."""
    found = None
    for place, word in enumerate(words):
        if word == flag and place + 1 < len(words):
            found = words[place + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def words_of(settings: Settings) -> list[str]:
    """Return the words that `parse` takes apart."""
    return [word for flag, values in settings.items() for word in (flag, *values)]


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a tool's own words, and those after --."""
    place = words.index("--") if "--" in words else len(words)
    return [*words[:place]], [*words[place + 1 :]]


def without(words: Iterable[str], left_out: Callable[[str], bool]) -> list[str]:
    """Return the words without some flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = left_out(word.partition("=")[0])
        if not dropping:
            kept.append(word)
    return kept


def whole_number(least: int) -> Callable[[str], int]:
    """Return a converter for argparse of whole numbers of at least `least`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least {least}")
        return int(text)

    return convert


def above_zero(text: str) -> float:
    """Return a number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return number
