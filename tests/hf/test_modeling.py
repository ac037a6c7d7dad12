"""Test the model for transformers against Megatron's, and what transformers and vLLM expect of a model."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM, RemoeModel
from tests.hf.models import MODELS, SIZES, build_megatron, make, tokens
from tools.console.places import ROOT
from tools.models.hf.settings import complete, make_config
from tools.models.measuring import compute_logits

TRAINED = ["relu, shared", "relu, shared, not balanced", "relu, normalized", "top-k", "sigmoid", "sigmoid, bias"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_megatrons(name: str, process_groups: None) -> None:
    model, ids = make(name), tokens()
    megatron, args = build_megatron(model)
    assert args.kv_channels, "a training run sets it, and compares it with the checkpoint"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, compute_logits(megatron, ids), rtol=1e-5, atol=1e-5)
    back = make_config(complete(args))
    for key, value in (SIZES | MODELS[name]).items():
        assert getattr(back, key) == getattr(model.config, key), (key, value)


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_megatrons(name: str, process_groups: None) -> None:
    """Loss, sparsity and gradients of L1 or load balancing agree, with and without activation checkpointing."""
    model, ids = make(name, router_aux_loss_coef=0.05), tokens()
    megatron, _ = build_megatron(model)
    megatron.train()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()
    losses = megatron(inputs, torch.arange(inputs.shape[1]).expand_as(inputs), None, labels=labels)
    losses.mean().backward()
    router = megatron.decoder.layers[1].mlp.router

    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        outputs = model(inputs, labels=labels, shift_labels=labels, output_router_logits=True)
        outputs.loss.backward()
        torch.testing.assert_close(outputs.loss, losses.mean() + 0.05 * outputs.aux_loss, rtol=1e-5, atol=0)
        if "relu" in name:
            torch.testing.assert_close(outputs.aux_loss, router.counts["l1_loss"].float(), rtol=1e-5, atol=0)
            pairs = losses.numel() * model.config.num_experts
            assert float(outputs.sparsity) == pytest.approx(1 - float(router.counts.active) / pairs, abs=1e-6)
        block = model.model.layers[1].mlp
        torch.testing.assert_close(block.gate.weight.grad, router.weight.grad, rtol=1e-4, atol=1e-6)
        if model.config.moe_relu_normalize:  # the gradient of s is c times that of s · c
            scale = router.gate_scale
            torch.testing.assert_close(block.gate.gate_scale.grad * scale.initial, scale.scale.grad)
        fc1 = megatron.decoder.layers[1].mlp.experts.local_experts[3].linear_fc1
        torch.testing.assert_close(block.experts.gate_up_proj.grad[3], fc1.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_compute_only_active_pairs(implementation: str) -> None:
    """Experts compute only the active pairs, with each of transformers' implementations."""
    model, ids = make("relu"), tokens()
    rows: list[int] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda _module, arguments, _output: rows.append(len(arguments[0])))
    with torch.no_grad():
        model.set_experts_implementation("eager")
        eager = model(ids, output_router_logits=True)
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids).logits, eager.logits, rtol=1e-5, atol=1e-5)
    active = [int((logits > 0).sum()) for logits in eager.router_logits]
    assert rows == active * 2 and 0 < active[0] < ids.numel() * 8
    assert float(eager.sparsity) == pytest.approx(1 - sum(active) / (2 * ids.numel() * 8))


def test_base_model_runs_sizes_that_are_no_multiple_of_8() -> None:
    model = RemoeModel(RemoeConfig(**(SIZES | MODELS["relu"] | {"moe_intermediate_size": 20}))).bfloat16()
    assert model(tokens()).last_hidden_state.isfinite().all()


def test_layer_that_is_off() -> None:
    model, ids = make("relu"), tokens()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    off = model(ids, output_router_logits=True)
    off.logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters()), "ranks wait for gradients of all weights"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
        assert torch.equal(model(ids).logits, off.logits) and off.sparsity == 1


def test_autocast_keeps_the_dtype_of_the_router() -> None:
    ids = tokens()
    for dtype in ("float32", None):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = make("relu", router_dtype=dtype)(ids, output_router_logits=True).router_logits[0].dtype
        assert seen == (torch.float32 if dtype else torch.bfloat16)


def test_at_most_k_experts() -> None:
    ids = tokens()
    with torch.no_grad():
        exact = make("relu")(ids).logits
        torch.testing.assert_close(make("relu", max_experts_per_token=8)(ids).logits, exact, rtol=1e-5, atol=1e-5)
        bounded = make("relu", max_experts_per_token=2)
        seen: list[torch.Tensor] = []
        bounded.model.layers[0].mlp.experts.register_forward_hook(lambda _m, given, _o: seen.extend(given))
        gates = torch.relu(bounded(ids, output_router_logits=True).router_logits[0])
    assert seen[1].shape == seen[2].shape == (ids.numel(), 2)
    torch.testing.assert_close(seen[2], gates.topk(2).values)


def generate(model: RemoeForCausalLM, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    torch.manual_seed(11)
    return model.generate(ids, max_new_tokens=8, pad_token_id=0, **settings)


@pytest.mark.parametrize("name", ["dense", "relu, norms, shared gate", "top-k", "sigmoid, bias", "hash"])
def test_generation(name: str) -> None:
    """A cache changes nothing, and a text padded on the left generates the same as without padding."""
    model, ids = make(name), tokens(batch=2, length=9)
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 8}, {"num_beams": 3, "do_sample": False}):
        assert torch.equal(generate(model, ids, **settings), generate(model, ids, use_cache=False, **settings))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = generate(model, ids * mask, attention_mask=mask, do_sample=False)
    assert torch.equal(batch[0, 4:], generate(model, ids[:1, 4:], do_sample=False)[0])
    assert torch.equal(batch[1], generate(model, ids[1:], do_sample=False)[0])


def test_bias_chooses_and_weighs_nothing(tmp_path: Path) -> None:
    """The bias stays in float32 in a model in bf16, also when saved and loaded."""
    config, ids = make("sigmoid, bias").config, tokens()
    model = RemoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    router = model.model.layers[1].mlp.gate
    bias = torch.tensor([0.0, 0, 9, 0, 0, 7, 0, 0]) + 1e-4
    router.e_score_correction_bias = bias
    logits, gates, experts = router(torch.randn(5, 32, dtype=torch.bfloat16))
    chosen = logits.float().sigmoid()[:, [2, 5]]
    expected = torch.zeros(5, 8).index_copy(1, torch.tensor([2, 5]), 8 * chosen / chosen.sum(dim=1, keepdim=True))
    torch.testing.assert_close(torch.zeros_like(logits).scatter(1, experts, gates), expected.bfloat16())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_sigmoids_that_are_all_zero() -> None:
    model = make("sigmoid")
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():
        router.weight.fill_(-10)
        logits, gates, _ = router(torch.ones(3, 32))
        assert not logits.sigmoid().any() and not gates.any()
        assert model(tokens(), output_router_logits=True).aux_loss.isfinite()


@pytest.mark.parametrize(("changes", "message"), [
    ({"scoring_func": "tanh"}, "scoring_func"),
    ({"router_expert_bias": True}, "needs scoring_func='sigmoid'"),
    ({"hash_routing": True}, "needs moe_relu_routing=False"),
    ({"max_experts_per_token": 9}, "max_experts_per_token=9: must be 1 to 8"),
])  # fmt: skip
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        make("relu", **changes)
    model = make("hash")
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=model.model.embed_tokens(tokens()))


def test_padding_is_not_routed() -> None:
    model, ids = make("relu"), tokens(batch=2, length=9)
    rows: list[int] = []
    model.model.layers[0].mlp.experts.register_forward_hook(lambda _m, given, _o: rows.append(len(given[0])))
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=mask.cumsum(1) - mask, output_router_logits=True)
        alone = model(ids[:, 4:], output_router_logits=True)
    torch.testing.assert_close(padded.logits[:, 4:], alone.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((padded.aux_loss, padded.sparsity), (alone.aux_loss, alone.sparsity))
    assert rows[0] == rows[1] > 0


def test_routing_statistics_with_a_cache_and_with_only_padding() -> None:
    model, ids = make("relu"), tokens(batch=2, length=6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:], attention_mask=mask, past_key_values=cache, output_router_logits=True)
        nothing = model(ids, attention_mask=torch.zeros_like(mask), output_router_logits=True)
    active = torch.cat([logits > 0 for logits in step.router_logits]).float().mean()
    torch.testing.assert_close(step.sparsity, 1.0 - active)
    assert nothing.aux_loss == 0 and nothing.sparsity == 1


def test_arguments_that_vllm_passes() -> None:
    """vLLM requires these names in the decoder's signature. The positions take effect."""
    model, ids = make("relu").model.get_decoder(), tokens()
    assert {"input_ids", "inputs_embeds", "position_ids"} <= set(inspect.signature(type(model).forward).parameters)
    given = {"input_ids": ids, "inputs_embeds": None, "use_cache": False, "attention_instances": {}}
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden, stretched = (model(**given, position_ids=n * positions, return_dict=False)[0] for n in (1, 2))
        assert torch.equal(hidden, model(ids).last_hidden_state) and not torch.allclose(stretched, hidden)


def test_plugin_for_vllm_does_not_import_megatron() -> None:
    """The function of the entry point registers the model with vLLM and transformers."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = group["remoe"].partition(":")
    lines = f"import sys, {module} as plugin\nplugin.{function}()\nimport transformers\ntransformers.RemoeForCausalLM\n"
    lines += "transformers.AutoConfig.for_model('remoe')\n"
    lines += "print([name for name in sys.modules if name.startswith(('megatron.core', 'megatron.training'))])"
    assert subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True).stdout == "[]\n"
