"""Reads the lines that Megatron's training loop prints at log intervals."""

import re
from collections.abc import Mapping

_LINE = re.compile(r"\[[^][]+\] iteration +(\d+)/ *(\d+) \|(.*)$", re.MULTILINE)
# What the authors' fork prints, by this project's names: its λ is the one after the update, its L1 a mean over layers.
FORK_NAMES = {
    "moe relu sparsity": "sparsity",
    "moe relu l1 reg coeff": "l1 coefficient after the update",
    "l1_reg_loss": "mean l1 loss of a layer",
}
_FIELD = re.compile(r" ([a-z][a-z0-9_ ()/]*): +(\S+) \|")


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


def seconds_per_iteration(fields: Mapping[str, str]) -> float:
    """Of one line of the log."""
    return float(fields["elapsed time per iteration (ms)"]) / 1000
