"""Reads the lines that Megatron's training loop prints at log intervals."""

import re

_LINE = re.compile(r"\[[^][]+\] iteration +(\d+)/ *(\d+) \|(.*)$", re.MULTILINE)
_FIELD = re.compile(r" ([a-z][a-z0-9_ ()/]*): +(\S+) \|")


def read_log(text: str) -> dict[int, dict[str, str]]:
    """The fields of every logged iteration.

    Args:
        text: what Megatron printed.

    Returns:
        iteration → name of the field as printed ("lm loss", "sparsity", ...) → its value as printed.
    """
    return {int(iteration): dict(_FIELD.findall(fields)) for iteration, _, fields in _LINE.findall(text)}


def seconds_per_iteration(fields: dict[str, str]) -> float:
    """Of one line of the log."""
    return float(fields["elapsed time per iteration (ms)"]) / 1000
