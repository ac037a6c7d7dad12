"""The results as the tables of docs/huggingface.md."""

from typing import Any

from ..common.markdown import table
from ..quickstart.models import NAMES
from .followed import Followed

BEGIN, END = "<!-- after-training:begin -->", "<!-- after-training:end -->"


def markdown(followed: dict[str, Followed], measured: dict[str, Any]) -> str:
    """A column a model; below, the ReMoE's loss with the K largest gates alone, and what it wrote.

    Args:
        followed: model → what became of it.
        measured: "tasks" and "speed", model → what tools/evaluate says; "loss by K", bound → nats per token.
    """
    models = [followed[model] for model in NAMES]
    rows = [["logits' largest difference, of the largest", *(f"{one.logits:.0e}" for one in models)]]
    for name in models[0].printed:
        pairs = ((one.printed[name], one.alone[name]) for one in models)
        rows.append([f"loss on {name}: Megatron's, the folder's", *(f"{a:.6f}, {b:.6f}" for a, b in pairs)])
    steps = len(models[0].before)
    rows.append([f"next {steps} losses' largest difference", *(f"{one.next_difference():.0e}" for one in models)])
    for scores in zip(*(measured["tasks"][model] for model in NAMES), strict=True):
        cells = (f"{score['value']:.4g} ± {score['error']:.2g}" for score in scores)
        rows.append([f"{scores[0]['task']}, {scores[0]['metric']}, {scores[0]['documents']:,} documents", *cells])
    for what, title in (("prefill", "reading"), ("decode", "writing")):
        rates = [measured["speed"][model][what] for model in NAMES]
        rows.append([f"{title}, tokens/s against dense", *(f"{rate / rates[0]:.2f}" for rate in rates)])
    by_bound = measured["loss by K"]
    of_bounds = ["ReMoE's loss on code", *(f"{loss:.4f}" for loss in by_bound.values())]
    lines = [
        *table(["", *NAMES.values()], rows, text=1),
        "",
        *table(["K largest gates", *by_bound], [of_bounds], text=1),
    ]
    return "\n".join([*lines, "", "```", followed["remoe"].text, "```"])
