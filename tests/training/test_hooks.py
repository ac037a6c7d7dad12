"""Test that hooks in Megatron's loop keep the functions that were there."""

import argparse

import pytest
import torch

from megatron.remoe.training import hooks
from tests.layers import HIDDEN, make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")


def install(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Install the routing of a layer's configuration, as a training does."""
    model_cfg = argparse.Namespace(transformer=layer.config, transformer_layer_spec=None, post_wrap_hooks=[])
    args = argparse.Namespace(log_interval=1, tensorboard_log_interval=1, save=None, iteration=0)
    for name in ("moe_relu_routing", "moe_warmup_topk", "moe_baseline_router"):
        setattr(args, name, getattr(layer.config, name))
    hooks.install_routing(args, model_cfg)
    (hook,) = model_cfg.post_wrap_hooks
    return hook([layer])


def test_what_was_called_once_a_step_still_is() -> None:
    config = make_config()
    layer = make_layer(config)
    calls: list[tuple[object, ...]] = []
    config.finalize_model_grads_func = lambda *arguments, **options: calls.append((*arguments, options))
    assert install(layer) == [layer]
    layer.router.weight.data.fill_(1.0)
    layer(torch.ones(4, 1, HIDDEN, dtype=torch.float64, device=layer.router.weight.device))
    config.finalize_model_grads_func([layer], None, force_all_reduce=True)
    assert calls == [([layer], None, {"force_all_reduce": True})], "as it was called"
    assert int(layer.router.l1_exponent) == 1, "and λ moved"


def test_another_configuration_class_is_refused() -> None:
    model_cfg = argparse.Namespace(transformer=object())
    with pytest.raises(TypeError, match="needs a ReMoEConfig, got object"):
        hooks.install_routing(argparse.Namespace(moe_relu_routing=True), model_cfg)
    none = {"moe_relu_routing": False, "moe_warmup_topk": None, "moe_baseline_router": None}
    hooks.install_routing(argparse.Namespace(**none), model_cfg)
