"""Test the near-dense warm-up of a top-k MoE: a larger k in the first steps."""

from pathlib import Path

import pytest
import torch

from megatron.remoe.routing.warmup import WarmupTopKRouter
from tests.layers import HIDDEN, make_config, make_layer, make_topk_config
from tests.tiny_model import TOPK
from tests.training_runs import TINY, run, step_losses


def test_layer_equals_topk_layer_at_each_step(process_groups: None) -> None:
    warmup = {"moe_relu_routing": False, "moe_warmup_topk": 3, "moe_warmup_steps": 2, "moe_router_pre_softmax": True}
    layer = make_layer(make_config(**warmup), fused=True, router=WarmupTopKRouter)
    tokens = torch.randn(6, 2, HIDDEN, dtype=torch.float64, device=layer.router.weight.device)
    for step, topk in ((0, 3), (1, 3), (2, 1), (3, 1)):
        expected = make_layer(make_topk_config(moe_router_topk=topk), fused=True)
        expected.load_state_dict(layer.state_dict())
        layer.router.begin_step(step)
        torch.testing.assert_close(layer(tokens)[0], expected(tokens)[0])


@pytest.mark.timeout(300)
def test_it_resumes_on_ranks_that_exchange_tokens(data: Path, tmp_path: Path) -> None:
    def train(*more: str, processes: int = 1) -> list[float]:
        shared = [*TINY, *TOPK, "--data-path", str(data), "--train-iters", "4", "--save-interval", "1"]
        return step_losses(run([*shared, *more], processes))

    warmup = "--moe-warmup-topk 6 --moe-warmup-steps 2".split()
    whole = train(*warmup, "--save", str(tmp_path))
    ranks = ["--expert-model-parallel-size", "2"]
    resumed = train(*warmup, *ranks, "--load", str(tmp_path), "--ckpt-step", "1", processes=2)
    assert whole[1:] == pytest.approx(resumed, rel=1e-4)
    sparse = train("--load", str(tmp_path), "--ckpt-step", "2", "--allow-changed-settings")
    assert whole[2:] == pytest.approx(sparse, rel=1e-5)
