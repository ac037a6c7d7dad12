"""Compare a run with the paper's settings (arXiv 2412.14711, section 4.1), or its authors' scripts where it names none.

`fork.json` holds the settings that affect the result: of all runs, of models with experts, of a routing, of a size. The
scripts' settings were read by their own parser at the commit that the file names.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..recipes.models import PAPER

DIMENSIONS = ("num_layers", "hidden_size", "num_attention_heads")


def _table() -> dict[str, dict[str, Any]]:
    table = json.loads(Path(__file__).with_name("fork.json").read_text(encoding="utf-8"))
    return {source: table[source] for source in ("paper", "fork")}


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that affect a run's result, as the user gave them: experts before granularity."""
    names = [name for parts in _table().values() for part in parts.values() for name in part]
    given = {name: _single(getattr(args, name)) for name in [*DIMENSIONS, *names]}
    if given["num_experts"]:
        given["num_experts"] //= args.moe_granularity
        given["moe_router_topk"] //= args.moe_granularity
    if args.hybrid_layer_pattern:  # attention and experts alternate: count the layers of the equal GPTModel
        pattern, layer = args.hybrid_layer_pattern.replace("|", ""), "*E" if args.num_experts else "*-"
        number = len(pattern) // len(layer)
        given["num_layers"] = number if pattern == number * layer else pattern
    return given


def read_expected(size: str, routing: str) -> dict[str, tuple[Any, str]]:
    """Return the value of each setting in the paper's run, with its source: "paper" or "fork"."""
    kinds = ["all", size, routing] if routing == "dense" else ["all", size, "experts", routing]
    model = PAPER[size]
    sizes = zip(DIMENSIONS, (model.layers, model.hidden, model.heads), strict=True)
    settings: dict[str, tuple[Any, str]] = {name: (number, "paper") for name, number in sizes}
    for source, parts in _table().items():
        settings |= {name: (value, source) for kind in kinds for name, value in parts.get(kind, {}).items()}
    return settings


def write_differences(given: dict[str, Any], size: str, routing: str) -> Iterator[str]:
    """Yield those of the settings from `read_settings` that differ from the paper's run."""
    different = []
    for name, (expected, source) in read_expected(size, routing).items():
        here = describe_data(given[name]) if name == "data_path" else given[name]
        if here != expected:
            different.append(f"  --{name.replace('_', '-')} {_format(here)}   ({source}: {_format(expected)})")
    yield f"Settings that differ from the paper's {size.upper()} {routing}: {'' if different else 'none'}"
    yield from different


def describe_data(words: list[str] | str | None) -> str:
    """Return data sets and weights of --data-path in words, without folders and the ends that preprocessing adds."""
    words = [words] if isinstance(words, str) else words or []
    weighted = len(words) > 1 and re.fullmatch(r"[0-9.]+", words[0])
    prefixes, weights = (words[1::2], words[::2]) if weighted else (words, [])
    names = [re.sub(r"^pile_(?=\d)|(_text)?_document$", "", Path(prefix).name) for prefix in prefixes]
    if len(names) < 2:
        return "".join(names) or "none"
    if len(set(map(float, weights))) > 1:
        return ", ".join(f"{weight} {name}" for weight, name in zip(weights, names, strict=True))
    numbers = [int(name) if name.isdecimal() else -1 for name in names]
    in_order = numbers[0] >= 0 and numbers == [*range(numbers[0], numbers[0] + len(names))]
    shown = f"{names[0]} to {names[-1]}" if in_order else ", ".join(names)
    return f"{shown}, {'equally' if weights else 'by size'}"


def _single(value: Any) -> Any:
    """Return the value of a flag that takes several, if it has only one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
