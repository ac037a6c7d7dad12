"""Test training FLOPs: they are Megatron's count plus the routers, for each kind of layer."""

import pytest

from megatron.training.training import num_floating_point_operations
from tests.tools.sweeping import model_arguments
from tests.tools.test_cost import arguments
from tools.recipes.flops import flops_per_sequence
from tools.recipes.models import PAPER, Routing

COUNTED = {
    "dense": {"num_experts": None},
    "grouped queries, every second layer": {"moe_layer_freq": 2},
    "gated attention, shared experts": {"attention_output_gate": True, "moe_shared_expert_intermediate_size": 24},
    "GELU, all heads": {"swiglu": False, "group_query_attention": False, "moe_layer_freq": [0, 1, 1]},
    "experts in a latent space": {"moe_latent_size": 32},
    "multi-token prediction": {"mtp_num_layers": 1},
    "hybrid": {"hybrid_layer_pattern": "*-*E|EE*"},
    "latent attention": {"multi_latent_attention": True, "group_query_attention": False},
    "latent attention, queries too": {"multi_latent_attention": True, "group_query_attention": False, "q_lora_rank": 8},
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_megatrons_and_the_routers(name: str) -> None:
    """Megatron counts half of the attention, no routers, and some norms, which are small."""
    latent = {"q_lora_rank": None, "kv_lora_rank": 12, "qk_head_dim": 16, "qk_pos_emb_head_dim": 4, "v_head_dim": 20}
    later = ("attention_output_gate", "experimental_attention_variant", "mtp_num_layers", "moe_latent_size")
    unused = ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads", "linear_key_head_dim")
    unused += ("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim")
    common: dict[str, object] = dict.fromkeys(later) | dict.fromkeys(unused, 1) | latent
    common |= {"num_layers": 3, "group_query_attention": True, "multi_latent_attention": False, "moe_layer_freq": 1}
    args = arguments(**{**common, "padded_vocab_size": 512, "moe_router_topk": 2, **COUNTED[name]})
    pattern, freq = args.hybrid_layer_pattern, args.moe_layer_freq
    layers = 3 if freq == 1 else 2
    layers = pattern.count("E") if pattern else (layers + (args.mtp_num_layers or 0)) * bool(args.num_experts)
    routers = 6 * args.seq_length * layers * args.hidden_size * args.num_experts if args.num_experts else 0
    actual = flops_per_sequence(args)
    expected = num_floating_point_operations(args, 1, seqlen_squared_sum_in_batch=2 * args.seq_length**2)
    assert actual - routers == pytest.approx(expected, rel=2e-3)
    assert args.num_experts is None or routers / actual > 0.001


def test_routers_without_weights() -> None:
    args = model_arguments(PAPER["182m"], Routing("moe"), 50257)
    plain = flops_per_sequence(args)
    args.moe_baseline_router = "hash"
    assert plain - flops_per_sequence(args) == 6 * 1024 * 12 * 768 * 8


@pytest.mark.parametrize(("size", "gigaflops"), [("182m", 995), ("469m", 2873), ("978m", 5991)])
def test_flops_of_the_papers_table(size: str, gigaflops: int) -> None:
    dense = flops_per_sequence(model_arguments(PAPER[size], Routing("dense"), 50257))
    assert dense / 1e9 == pytest.approx(gigaflops, abs=0.5)


def test_layers_that_are_not_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="attention, MLP and experts"):
        flops_per_sequence(arguments(hybrid_layer_pattern="M-"))
