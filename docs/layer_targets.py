"""Train ReMoE with a target for each layer instead of one for all: python docs/layer_targets.py FLAGS

FLAGS are those of pretrain_gpt.py. Each layer's λ moves by the sign of its own distance from the target.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.remoe import pretrain  # noqa: E402


def set_layer_targets(_model_cfg: Any) -> None:
    """Replace the controller that the model will get."""
    from megatron.remoe.routing.controller import SparsityController
    from megatron.remoe.training import hooks

    class LayerController(SparsityController):
        @torch.no_grad()
        def update(self, step: int = 0) -> None:
            before = [router.l1_exponent.clone() for router in self.routers]
            super().update(step)
            assert self._last is not None
            counts = self._last.counts
            directions = torch.sign(counts.active - self._target_topk * counts["tokens"]).to(torch.int64)
            for router, exponent, number in zip(self.routers, before, self._numbers, strict=True):
                router.l1_exponent.copy_(exponent + directions[number - 1])

    hooks.SparsityController = LayerController  # type: ignore[misc]


if __name__ == "__main__":
    pretrain.main(set_layer_targets)
