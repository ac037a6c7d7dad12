"""Train from the weights in the file $GOLDEN_WEIGHTS; if it does not exist, write the initial weights and exit.

A GPU draws other random numbers than a CPU. To train the same model, both start from weights that a CPU drew.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from megatron.remoe import pretrain  # noqa: E402

WEIGHTS = Path(os.environ["GOLDEN_WEIGHTS"])


def load_or_write(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Load the weights, or write them and exit. Megatron calls this hook before it makes the optimizer."""
    weights = {name: weight.data for chunk in chunks for name, weight in chunk.named_parameters()}
    if not WEIGHTS.exists():
        torch.save(weights, WEIGHTS)
        sys.exit()
    drawn = torch.load(WEIGHTS)
    assert drawn.keys() == weights.keys(), sorted(drawn.keys() ^ weights.keys())
    for name, weight in weights.items():
        weight.copy_(drawn[name])
    return chunks


def observe(model_cfg: Any) -> None:
    """Install the hook."""
    model_cfg.post_wrap_hooks.append(load_or_write)


if __name__ == "__main__":
    pretrain.main(observe)
