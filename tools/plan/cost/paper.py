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

from ...recipes.models import PAPER

DIMENSIONS = ("num_layers", "hidden_size", "num_attention_heads")
# Further settings that change the time or memory of a step.
OF_A_STEP = """num_query_groups seq_length global_batch_size num_experts moe_router_topk moe_granularity ffn_hidden_size
bf16 moe_layer_freq moe_shared_expert_intermediate_size""".split()


def _table() -> dict[str, dict[str, Any]]:
    found = json.loads(Path(__file__).with_name("fork.json").read_text(encoding="utf-8"))
    return {source: found[source] for source in ("paper", "fork")}


def settings(args: argparse.Namespace) -> dict[str, Any]:
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


def expected(size: str, routing: str) -> dict[str, tuple[Any, str]]:
    """Return the value of each setting in the paper's run, with its source: "paper" or "fork"."""
    kinds = ["all", size, routing] if routing == "dense" else ["all", size, "experts", routing]
    model = PAPER[size]
    found = dict(zip(DIMENSIONS, ((n, "paper") for n in (model.layers, model.hidden, model.heads)), strict=True))
    for source, parts in _table().items():
        found |= {name: (value, source) for kind in kinds for name, value in parts.get(kind, {}).items()}
    return found


def differences(given: dict[str, Any], size: str, routing: str) -> dict[str, str]:
    """Return those of the given `settings` that differ from the paper's run, each with its text."""
    found = {}
    for name, (there, source) in expected(size, routing).items():
        here = data_sets(given[name]) if name == "data_path" else given[name]
        if here != there:
            found[name] = f"--{name.replace('_', '-')} {_shown(here)}   ({source}: {_shown(there)})"
    return found


def lines(different: dict[str, str], size: str, routing: str) -> Iterator[str]:
    """Yield the differences as text."""
    yield f"Settings that differ from the paper's {size.upper()} {routing}: {'' if different else 'none'}"
    yield from (f"  {text}" for text in different.values())


def is_papers_step(args: argparse.Namespace, different: dict[str, str]) -> bool:
    """Return whether a step has the paper's model, batch and layout, except for EP and the micro-batch."""
    layout = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    rest = args.recompute_granularity, args.mtp_num_layers, args.hybrid_layer_pattern
    is_same = not different.keys() & {*DIMENSIONS, *OF_A_STEP} and args.transformer_impl == "local"
    return is_same and layout == (1, 1, 1) and not any(rest)


def data_sets(words: list[str] | str | None) -> str:
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


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
