"""The training entry from the weights in $ACCEPTANCE_WEIGHTS; where there is no such file, it writes it and ends.

A GPU draws other random numbers than a CPU: weights that a CPU drew let both train the same model.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

import pretrain_gpt  # noqa: E402
from tools.common.files import write_aside  # noqa: E402

WEIGHTS = Path(os.environ["ACCEPTANCE_WEIGHTS"])


def take_or_write(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """As a hook of Megatron's, on the model before its optimizer is made."""
    weights = {name: weight.data for chunk in chunks for name, weight in chunk.named_parameters()}
    if not WEIGHTS.exists():
        write_aside(WEIGHTS, lambda aside: torch.save(weights, aside))
        sys.exit()
    drawn = torch.load(WEIGHTS)
    if drawn.keys() != weights.keys():
        raise ValueError(f"{WEIGHTS} is of another model: {sorted(drawn.keys() ^ weights.keys())}")
    for name, weight in weights.items():
        weight.copy_(drawn[name])
    return chunks


def observe(model_cfg: Any) -> None:
    """As the entry calls it."""
    model_cfg.post_wrap_hooks.append(take_or_write)


if __name__ == "__main__":
    pretrain_gpt.main(observe)
