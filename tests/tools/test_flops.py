"""Test training FLOPs: they are Megatron's count plus the routers, for each kind of layer."""

from pathlib import Path

import pytest
import tokenizers

from megatron.training.training import num_floating_point_operations
from tests.tools.test_cost import arguments
from tests.tools.test_cost_command import EXPERTS, MODEL, cost, figures
from tools.console.flags import parse
from tools.recipes.flops import arguments_of, flops_per_sequence, vocabulary_words

COUNTED = {
    "dense": {"num_experts": None},
    "grouped queries, every second layer": {"moe_layer_freq": 2},
    "all heads": {"group_query_attention": False, "moe_layer_freq": [0, 1, 1]},
    "gated attention, shared experts": {"attention_output_gate": True, "moe_shared_expert_intermediate_size": 24},
    "GELU": {"swiglu": False},
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
    found = flops_per_sequence(args)
    expected = num_floating_point_operations(args, 1, seqlen_squared_sum_in_batch=2 * args.seq_length**2)
    assert found - routers == pytest.approx(expected, rel=2e-3)
    assert args.num_experts is None or routers / found > 0.001


@pytest.mark.parametrize(("router", "rows"), [("hash", 0), ("top_p", 1)])
def test_routers_of_baselines(router: str, rows: int) -> None:
    """A router has this number of rows of weights per expert."""
    args = arguments_of(parse([*MODEL, *EXPERTS]))
    plain = flops_per_sequence(args)
    args.moe_baseline_router = router
    assert flops_per_sequence(args) - plain == 6 * 1024 * 12 * 768 * 8 * (rows - 1)


LATENT = "--moe-relu-routing --multi-latent-attention --kv-lora-rank 48 --qk-head-dim 24 --v-head-dim 40"
SHARED = (
    "--moe-router-pre-softmax --moe-shared-expert-intermediate-size 512 --moe-shared-expert-gate --mtp-num-layers 1"
)


@pytest.mark.parametrize(
    "more", ["--moe-relu-routing --moe-granularity 4", f"{SHARED} --moe-layer-freq ([0]+[1]*11)", LATENT]
)
def test_flops_of_a_command_are_those_of_its_arguments(more: str) -> None:
    """FLOPs counted from flags are those of remoe cost, which parses the flags with Megatron."""
    flags = [*MODEL, *EXPERTS, *more.split()]
    if more == LATENT:
        flags.remove("--group-query-attention")
    counted = flops_per_sequence(arguments_of(parse(flags)))
    assert figures(cost("--gpus", "8", "--", *flags), f"{counted / 1e9:,.0f}")


def test_vocabulary_of_a_command(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    for flags, words in (
        (["--tokenizer-model", str(tmp_path)], 2),
        (["--vocab-file", str(tmp_path / "vocab.json")], 3),
        (["--vocab-size", "4", "--tokenizer-model", str(tmp_path)], 4),
        (["--tokenizer-model", "meta-llama/Llama-3.1-8B"], 50257),
    ):
        assert vocabulary_words(parse(["--tokenizer-type", "any", *flags])) == words
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="--tokenizer-model: .*other"):
        vocabulary_words(parse(["--tokenizer-model", str(tmp_path / "other")]))


@pytest.mark.parametrize("pattern", ["[0,", "0", "[1]*[1]"])
def test_wrong_pattern_of_layers(pattern: str) -> None:
    with pytest.raises(ValueError, match="--moe-layer-freq"):
        arguments_of(parse([*MODEL, *EXPERTS, "--moe-layer-freq", pattern]))


def test_layers_that_are_not_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="attention, MLP and experts"):
        flops_per_sequence(arguments(hybrid_layer_pattern="M-"))
