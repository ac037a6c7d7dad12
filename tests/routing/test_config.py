"""Test the configuration: its fields are the flags, and ReLU routing must be turned on."""

import argparse

import pytest

from megatron.remoe.routing.config import MEGATRON_FIELDS, ReMoEConfig
from megatron.remoe.training.arguments import add_remoe_arguments
from tests.layers import make_config, make_layer, make_topk_config

pytestmark = pytest.mark.usefixtures("process_groups")


def test_flags_are_the_fields() -> None:
    args = add_remoe_arguments(argparse.ArgumentParser()).parse_args([])
    ours = {name for name in ReMoEConfig.__dataclass_fields__ if name not in MEGATRON_FIELDS}
    more = {"local_layer_fusion", "allow_changed_settings", "resume_flag", "resume_folder"}
    assert vars(args).keys() == ours | more
    for name in ours:
        assert getattr(args, name) == ReMoEConfig.__dataclass_fields__[name].default
    for action in add_remoe_arguments(argparse.ArgumentParser())._actions:
        assert action.help, action.dest


def test_without_relu_routing_nothing_is_changed() -> None:
    assert not make_config(moe_relu_routing=False, moe_router_topk=2).moe_router_pre_softmax


def test_deprecated_names_are_refused_too() -> None:
    for name in ("enable_cuda_graph", "external_cuda_graph"):
        with pytest.raises(ValueError, match="--cuda-graph-impl"):
            make_config(**{name: True})


@pytest.mark.parametrize("own_class", [False, True])
def test_a_router_nobody_asked_for_is_refused(own_class: bool) -> None:
    """Otherwise settings that assume top-k would not be refused."""
    relu, topk = make_config(), {"moe_relu_routing": False, "moe_router_pre_softmax": True}
    other = make_config(**topk) if own_class else make_topk_config()
    with pytest.raises(ValueError, match="moe_relu_routing=True"):
        type(make_layer(relu).router)(other)


def test_the_router_has_no_bias() -> None:
    """Megatron's router has a bias if other linear layers have one."""
    router = make_layer(make_config(add_bias_linear=True)).router
    assert set(router.state_dict()) == {"weight", "l1_exponent", "guarded"}
