"""Read Megatron's printed output, for runs of the authors' fork and for the progress of a training."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LINE = re.compile(r"\[[^][]+\] iteration +(\d{1,15})/ *(\d{1,15}) \|(.*)$", re.MULTILINE)
# Fields of the authors' fork → names in metrics.jsonl. The fork prints λ after its update.
_FORK_NAMES = {"moe relu sparsity": "sparsity", "moe relu l1 reg coeff": "l1_coefficient"}
_FIELD = re.compile(r" ([a-z][a-z0-9_ ()/]*): +(\S+) \|")
MILLISECONDS = "elapsed time per iteration (ms)"
_ARGUMENT = re.compile(r"^(?:\[.*?\]: *)?  (\w+) \.{2,} (.*)$")
# Evaluations during training do not name their data.
_EVALUATION = re.compile(
    r"(?:\[.*?\]: *)? validation(?:-(\S+))? loss at iteration (\d{1,15})(?: on (validation|test) set)? "
    r"\| lm loss value: (\S+)"
)
RESUMED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d{1,15})")
_FINER = re.compile(
    r"increase num_moe_experts to (\d+), increase moe_router_topk to (\d+), decrease moe_ffn_hidden_size to (\d+)"
)
_SPLIT = ("num_experts", "moe_router_topk", "moe_ffn_hidden_size")


def read_log(text: str) -> dict[int, dict[str, str]]:
    """Return the fields of every iteration in Megatron's printed output.

    Returns:
        iteration → printed name of the field ("lm loss", "sparsity", ...) → its printed value.
    """
    return {int(iteration): dict(_FIELD.findall(line)) for iteration, _, line in _LINE.findall(text)}


def read_printed(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file with Megatron's output, in the format of metrics.jsonl."""
    args: dict[str, Any] = {}
    started = False
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if logged := _LINE.search(line):
                if not started:
                    yield {"kind": "start", "iteration": 0, "args": {"train_iters": int(logged[2])} | args}
                    started = True
                yield {"kind": "log", "iteration": int(logged[1])} | _figures(dict(_FIELD.findall(logged[3])))
            elif argument := _ARGUMENT.search(line) if ".." in line else None:
                args, started = {} if started else args, False
                args[argument[1]] = _literal(argument[2].strip())
            elif evaluation := _EVALUATION.match(line):
                yield _evaluation(*evaluation.groups())
            elif finer := _FINER.search(line):  # the fork splits experts after it has printed its arguments
                args |= dict(zip(_SPLIT, map(int, finer.groups()), strict=True))


def _evaluation(name: str | None, iteration: str, on: str | None, loss: str) -> dict[str, Any]:
    record = {"kind": "validation", "iteration": int(iteration), "lm_loss": _literal(loss), "final": bool(on)}
    return record | ({"set": name or "test"} if name or on == "test" else {})


def _figures(fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields under their names in metrics.jsonl."""
    figures = {_FORK_NAMES.get(name, name.replace(" ", "_")): _literal(text) for name, text in fields.items()}
    if milliseconds := fields.get(MILLISECONDS):
        figures["seconds_per_iteration"] = _literal(f"{milliseconds}e-3")
    return figures


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
