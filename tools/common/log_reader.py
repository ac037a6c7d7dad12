"""Reads what Megatron prints: its arguments, and the lines at log intervals."""

import re
from collections.abc import Iterable, Mapping

_LINE = re.compile(r"\[[^][]+\] iteration +(\d+)/ *(\d+) \|(.*)$", re.MULTILINE)
# What the authors' fork prints, by this project's names: its λ is the one after the update, its L1 a mean over layers.
FORK_NAMES = {
    "moe relu sparsity": "sparsity",
    "moe relu l1 reg coeff": "l1 coefficient after the update",
    "l1_reg_loss": "mean l1 loss of a layer",
}
_FIELD = re.compile(r" ([a-z][a-z0-9_ ()/]*): +(\S+) \|")
_ARGUMENT = re.compile(r"^(?:\[.*?\]: *)?  (\w+) \.{2,} (.*)$")


def read_log(text: str) -> dict[int, dict[str, str]]:
    """The fields of every logged iteration.

    Args:
        text: what Megatron printed.

    Returns:
        iteration → name of the field as printed ("lm loss", "sparsity", ...) → its value as printed. In a log of the
        authors' fork the names are those of `FORK_NAMES`.
    """
    return {
        int(iteration): {FORK_NAMES.get(name, name): value for name, value in _FIELD.findall(fields)}
        for iteration, _, fields in _LINE.findall(text)
    }


def series(text: str, field: str) -> list[float]:
    """The values of a field that every logged iteration has, in their order."""
    return [float(fields[field]) for _, fields in sorted(read_log(text).items())]


def read_arguments(lines: Iterable[str]) -> dict[str, str]:
    """Name of each argument, as `args` has it → its value as printed; of the last start where there are several."""
    return {match[1]: match[2].strip() for line in lines if (match := _ARGUMENT.search(line))}


def seconds_per_iteration(fields: Mapping[str, str]) -> float:
    """Of one line of the log."""
    return float(fields["elapsed time per iteration (ms)"]) / 1000
