"""A command's flags, as they are typed."""

from collections.abc import Iterable

Settings = dict[str, tuple[str, ...]]  # flag → its values, of the last occurrence, which is the one that counts


def parse(words: Iterable[str]) -> Settings:
    """Flags and their values, later ones in place of earlier ones."""
    settings: Settings = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            settings[flag] = (value,) if equals else ()
        elif flag:
            settings[flag] += (word,)
    return settings
