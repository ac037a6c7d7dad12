"""Read the lines that Megatron prints at log intervals."""

import re

_LINE = re.compile(r"\[[^][]+\] iteration +(\d{1,15})/ *\d{1,15} \|(.*)$", re.MULTILINE)
_FIELD = re.compile(r" ([a-z][a-z0-9_ ()/]*): +(\S+) \|")
MILLISECONDS = "elapsed time per iteration (ms)"
RESUMED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d{1,15})")


def read_log(text: str) -> dict[int, dict[str, str]]:
    """Return the fields of every iteration in Megatron's printed output.

    Returns:
        iteration → printed name of the field ("lm loss", "sparsity", ...) → its printed value.
    """
    return {int(iteration): dict(_FIELD.findall(line)) for iteration, line in _LINE.findall(text)}
