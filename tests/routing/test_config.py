"""Test the configuration: its fields are the flags, and ReLU routing must be turned on."""

import argparse

import pytest
import torch

from megatron.core.extensions import transformer_engine
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.routing.config import MEGATRONS_FIELDS, ReMoEConfig
from megatron.remoe.routing.layers import norm_weights
from megatron.remoe.training.arguments import add_remoe_arguments
from tests.layers import HIDDEN, make_config, make_layer, make_topk_config

pytestmark = pytest.mark.usefixtures("process_groups")


def test_flags_are_the_fields() -> None:
    args = add_remoe_arguments(argparse.ArgumentParser()).parse_args([])
    own = {name for name in ReMoEConfig.__dataclass_fields__ if name not in MEGATRONS_FIELDS}
    assert vars(args).keys() == own | {
        *("local_layer_fusion", "allow_changed_settings", "moe_log_flips_interval"),
        "qk_layernorm_all_heads",
    }
    for name in own:
        assert getattr(args, name) == ReMoEConfig.__dataclass_fields__[name].default
    for action in add_remoe_arguments(argparse.ArgumentParser())._actions:
        assert action.help, action.dest


def test_without_relu_routing_nothing_is_changed() -> None:
    settings = vars(make_topk_config(moe_router_topk=2, moe_router_pre_softmax=False))
    given = {name: settings[name] for name in ("num_layers", "hidden_size", "num_attention_heads", "num_moe_experts")}
    config = ReMoEConfig(**given, moe_router_topk=2)
    assert not config.moe_router_pre_softmax
    assert ReMoEConfig(**given, moe_router_topk=2, moe_relu_routing=True, moe_router_load_balancing_type="none")


@pytest.mark.parametrize("own_class", [False, True])
def test_a_router_nobody_asked_for_is_refused(own_class: bool) -> None:
    """Otherwise settings that assume top-k would not be refused."""
    relu, topk = make_config(), {"moe_relu_routing": False, "moe_router_pre_softmax": True}
    other = make_config(**topk) if own_class else make_topk_config()
    with pytest.raises(ValueError, match="moe_relu_routing=True"):
        type(make_layer(relu).router)(other)


def test_no_bias_unless_it_is_asked_for() -> None:
    plain = make_layer(make_config(add_bias_linear=True))
    asked = make_layer(make_config(add_bias_linear=True, moe_relu_router_bias=True))
    assert plain.router.bias is None and "bias" not in plain.router.state_dict()
    assert asked.router.bias is not None
    tokens = torch.randn(4, 1, HIDDEN, dtype=torch.float64, device=asked.router.weight.device)
    asked.router.bias.data.fill_(1e3)
    assert asked.router(tokens)[1].all()
    with pytest.raises(ValueError, match="--moe-relu-router-bias .* --disable-bias-linear"):
        make_config(moe_relu_router_bias=True)


class Block(torch.nn.Module):
    """Norms and another layer, with names that do not show their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.normalizer_of_nothing = torch.nn.Linear(3, 3)
        self.first, self.second = torch.nn.RMSNorm(3), torch.nn.LayerNorm(3)
        self.frozen = torch.nn.RMSNorm(3).requires_grad_(False)


def test_norms_are_found_by_their_type() -> None:
    block = Block()
    found = list(norm_weights(block.modules()))
    assert [id(weight) for weight in found] == [
        id(weight) for weight in (block.first.weight, block.second.weight, block.second.bias)
    ]


def test_norms_of_transformer_engine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class NormAndLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_norm_weight, self.weight = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((3,), (3, 3)))

    class OwnNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

    engine = argparse.Namespace(
        pytorch=argparse.Namespace(LayerNorm=OwnNorm, RMSNorm=OwnNorm, LayerNormLinear=NormAndLinear)
    )
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(transformer_engine, "te", engine, raising=False)
    own, both = OwnNorm(), NormAndLinear()
    assert [id(weight) for weight in norm_weights([own, both])] == [id(own.weight), id(both.layer_norm_weight)]


def test_megatrons_configuration_is_enough_for_dense_models() -> None:
    assert type(make_topk_config()) is TransformerConfig
