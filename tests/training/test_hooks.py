"""Test the hooks in Megatron's loop: they keep the functions and layers that were there, and count steps once."""

import argparse
import operator
from collections.abc import Callable
from functools import partial

import pytest
import torch

from megatron.core import rerun_state_machine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.remoe.routing.router import ReLURouter
from megatron.remoe.training.routing_hooks import install_routing
from tests.baselines import layers as baseline_layers
from tests.layers import HIDDEN, make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")


def install(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Install the routing of a layer's configuration, as a training run does."""
    model_cfg = argparse.Namespace(transformer=layer.config, transformer_layer_spec=None, post_wrap_hooks=[])
    args = argparse.Namespace(log_interval=1, tensorboard_log_interval=1, save=None, iteration=0)
    for name in ("moe_relu_routing", "moe_warmup_topk", "moe_baseline_router"):
        setattr(args, name, getattr(layer.config, name))
    install_routing(args, model_cfg)
    (hook,) = model_cfg.post_wrap_hooks
    return hook([layer])


def test_what_was_called_once_a_step_still_is() -> None:
    config = make_config()
    layer = make_layer(config)
    calls: list[tuple[object, ...]] = []
    exponent = layer.router.l1_exponent
    config.finalize_model_grads_func = lambda *given, **named: calls.append((*given, named, int(exponent)))
    assert install(layer) == [layer]
    layer.router.weight.data.fill_(1.0)
    layer(torch.ones(4, 1, HIDDEN, dtype=torch.float64, device=layer.router.weight.device))
    config.finalize_model_grads_func([layer], None, force_all_reduce=True)
    assert calls == [([layer], None, {"force_all_reduce": True}, 0)], "as it was called, before λ moves"
    assert int(exponent) == 1


@pytest.mark.parametrize("name", [None, "top_p", "expert_threshold"])
def test_a_step_that_runs_again_counts_once(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron rejects a result and runs the step again, from the same state and with the same outcome."""
    machine = rerun_state_machine.RerunStateMachine(lambda: {"of": "Megatron"}, lambda saved: restored.append(saved))
    machine.set_mode(rerun_state_machine.RerunMode.VALIDATE_RESULTS)
    machine.first_iteration_complete = True
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)
    torch.manual_seed(3)
    layer = baseline_layers.make_layer(name) if name else make_layer(make_config(moe_relu_layer_floor=0.1))
    layer.config.finalize_model_grads_func = lambda *_arguments: None
    install(layer)
    router, restored, before, after = layer.router, [], [], []
    tokens = torch.randn(8, 3, HIDDEN, dtype=torch.float64, device=router.weight.device)

    def state() -> dict[str, list[int] | int]:
        return {key: buffer.tolist() for key, buffer in router.named_buffers()} | get_moe_metrics_tracker().totals()

    for rejected in (False, True):
        while machine.should_run_forward_backward(None):
            before.append(state())
            layer(tokens)
            layer.config.finalize_model_grads_func([layer])
            after.append(state())
            is_first = machine.state == rerun_state_machine.RerunState.INITIAL_RUN
            rejects = partial(operator.lt, 0.0 if rejected and is_first else 9.0)
            machine.validate_result(torch.tensor(9.0), rejects, "too large", fatal=False)
    assert restored == [{"of": "Megatron"}]
    assert before[1] == before[2] == after[0] != after[1] == after[2]


@pytest.mark.parametrize(
    "given",
    [lambda own: own, lambda own: lambda _model_cfg: own, lambda own: lambda _model_cfg, vp_stage: {1: own}[vp_stage]],
)
def test_layers_of_the_callers_own_get_the_router(given: Callable[[ModuleSpec], object]) -> None:
    own = get_gpt_layer_local_spec(4, False, normalization="RMSNorm")
    model_cfg = argparse.Namespace(transformer=make_config(), transformer_layer_spec=given(own), post_wrap_hooks=[])
    flags = {"moe_relu_routing": True, "moe_warmup_topk": None, "moe_baseline_router": None, "save": None}
    install_routing(argparse.Namespace(**flags), model_cfg)
    changed = model_cfg.transformer_layer_spec(model_cfg, vp_stage=1)
    assert changed.submodules.mlp.keywords["submodules"].router is ReLURouter
    assert changed.submodules.self_attention is own.submodules.self_attention


def test_another_configuration_class_is_refused() -> None:
    model_cfg = argparse.Namespace(transformer=object())
    with pytest.raises(TypeError, match="needs a ReMoEConfig, got object"):
        install_routing(argparse.Namespace(moe_relu_routing=True, moe_baseline_router=None), model_cfg)
    none = {"moe_relu_routing": False, "moe_warmup_topk": None, "moe_baseline_router": None, "num_experts": None}
    install_routing(argparse.Namespace(**none), model_cfg)
