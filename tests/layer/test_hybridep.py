"""Test HybridEP with any number of experts per token, in Megatron's code and with a stand-in for the kernels."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from megatron.remoe.routing.config import MEGATRON_FIELDS, ReMoEConfig
from tests.layer.hybridep import deep_ep
from tests.layers import HIDDEN, make_config, make_layer
from tests.tiny_model import RELU
from tests.training_runs import TINY, run, series

HYBRIDEP = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}
PADDED = {name: True for name in MEGATRON_FIELDS if name.startswith("moe_hybridep_pad_")}  # its name varies by version


@pytest.fixture
def kernels(process_groups: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Megatron's dispatchers the functions that they have if `deep_ep` is installed."""
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep)
    for name, function in deep_ep.megatrons_functions().items():
        monkeypatch.setattr(token_dispatcher, name, function)


@dataclass
class NewerConfig(ReMoEConfig):
    """A configuration as in Megatron after 0.19.2, which by default sends the k largest gates of a map."""

    moe_hybridep_routing_map_mode: str = "indices"


@pytest.mark.parametrize(
    ("routing", "mode"),
    [({"moe_relu_routing": True}, "bool"), ({"moe_baseline_router": "top_p"}, "bool"), ({}, "indices")],
)
def test_newer_versions_take_the_map(routing: dict[str, object], mode: str) -> None:
    sizes = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 1, "num_moe_experts": 4}
    config = NewerConfig(**sizes, moe_router_topk=2, moe_router_load_balancing_type="none", **routing)
    assert config.moe_hybridep_routing_map_mode == mode


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("fused", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize("limit", [0.0, 1.2], ids=["whole", "in chunks"])
@pytest.mark.parametrize("share", ["all", "some", "one expert", "none"])
def test_layer_equals_alltoall(share: str, limit: float, fused: bool) -> None:
    results, weights = [], None
    for changes in ({}, HYBRIDEP, HYBRIDEP | PADDED):
        torch.manual_seed(2)
        layer = make_layer(make_config(moe_relu_activation_limit=limit, moe_router_dtype="fp32", **changes), fused)
        assert isinstance(layer.token_dispatcher, MoEFlexTokenDispatcher) is bool(changes)
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        weight = layer.router.weight.data
        if share != "some":
            weight.abs_()[{"all": 4, "one expert": 1, "none": 0}[share] :] *= -1
        tokens = torch.rand(7, 2, HIDDEN, dtype=torch.float64, device=weight.device) + 0.1
        output, _ = layer(tokens.requires_grad_())
        gradients = torch.autograd.grad(output.sin().sum(), [tokens, *layer.parameters()], allow_unused=True)
        results.append([output, layer.router.counts.table, *gradients])
    for right, *others in zip(*results, strict=True):
        for other in others:
            if right is None or other is None:  # an expert without a token
                assert all(gradient is None or not gradient.any() for gradient in (right, other))
            else:  # HybridEP's gates are in fp32
                torch.testing.assert_close(other, right, rtol=1e-5, atol=1e-6)


def test_training_equals_alltoall(data: Path) -> None:
    """Two ranks with half of the experts each train as with alltoall. Their layers run in chunks at first."""
    words = [*TINY, *RELU, "--data-path", str(data), "--expert-model-parallel-size", "2", "--train-iters", "3"]
    words += ["--moe-relu-activation-limit", "2"]
    hybridep = "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep --moe-router-dtype fp32".split()
    output = run([*words, *hybridep], processes=2, script=Path(deep_ep.__file__))
    expected = run(words, processes=2)
    for name in ("lm loss", "sparsity", "l1 loss", "l1 coefficient", "grad norm"):
        assert series(output, name) == pytest.approx(series(expected, name), rel=1e-4), name
