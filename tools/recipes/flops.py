"""Count the training FLOPs of a model, for all tools."""

import argparse
import json
import os
from functools import cache, partial
from typing import Any

from megatron.remoe.routing.refusals import flag

from ..console.flags import GPT2_WORDS, Settings, whole

CONVENTION = (
    "A product of m x k and k x n matrices counts 2mnk; backward counts twice forward; attention counts over the whole",
    "square of the sequence, causal or not; routers and the output layer are in; norms and lookups are not.",
)
NUMBERS = {  # arguments by Megatron's names → its defaults
    "num_layers": 0, "hidden_size": 0, "seq_length": 0, "num_attention_heads": 1, "kv_channels": 0,
    "num_query_groups": 1, "q_lora_rank": 0, "kv_lora_rank": 32, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128, "mtp_num_layers": 0, "moe_latent_size": 0, "moe_shared_expert_intermediate_size": 0,
}  # fmt: skip
SWITCHES = "group_query_attention swiglu attention_output_gate multi_latent_attention moe_shared_expert_gate".split()
UNLEARNED = ("hash", "random")  # --moe-baseline-router without weights


def flops_per_sequence(args: argparse.Namespace, experts_per_token: float | None = None) -> float:
    """Return the training FLOPs of one sequence, counted as in the paper's table plus routers; see `CONVENTION`.

    With h the hidden size, s the sequence, n heads of d and g of keys and values, E experts of width f:
        attention h·d·(2n + 2g) + 2·s·n·d,  router h·E,  experts k·3·h·f,  output h·V
    multiply-adds of a token, times 2 for FLOPs, times 3 for forward and backward.

    Args:
        args: Megatron's validated arguments, or `arguments_of` a command's flags.
        experts_per_token: active experts of a token in each MoE layer; k if None.

    Raises:
        ValueError: the model has layers that are not counted here, such as Mamba.
    """
    of = _Defaulting(**vars(args))
    pattern, mtp = of.hybrid_layer_pattern, of.mtp_num_layers or 0
    if of.experimental_attention_variant or (pattern and set(pattern) - set("*-E|/")):
        found = of.experimental_attention_variant or f"--hybrid-layer-pattern {pattern}"
        raise ValueError(f"FLOPs are counted for attention, MLP and experts only, not for {found}")
    if pattern:
        mtp = pattern.rstrip("/").count("/")
        kinds = {kind: pattern.count(kind) for kind in "*-E"}
    else:
        experts = [bool(of.num_experts and expert) for expert in _frequency(of.moe_layer_freq, of.num_layers)]
        experts += experts[-1:] * mtp
        kinds = {"*": len(experts), "-": experts.count(False), "E": experts.count(True)}
    products = 3 if of.swiglu else 2
    token = kinds["*"] * _attention(of) + kinds["-"] * products * of.hidden_size * of.ffn_hidden_size
    if kinds["E"]:
        topk = of.moe_router_topk if experts_per_token is None else experts_per_token
        token += kinds["E"] * _experts(of, topk, products)
    token += (1 + mtp) * of.hidden_size * of.padded_vocab_size + mtp * 2 * of.hidden_size**2
    return 6.0 * of.seq_length * token


class _Defaulting(argparse.Namespace):
    """Arguments by name; None for those that a command or an older Megatron does not have."""

    def __getattr__(self, name: str) -> Any:
        return None


def _frequency(frequency: int | list[int] | None, layers: int) -> list[bool]:
    if isinstance(frequency, list):
        return [bool(one) for one in frequency]
    return [number % (frequency or 1) == 0 for number in range(layers)]


def _attention(of: _Defaulting) -> float:
    """Multiply-adds of a token in an attention layer."""
    hidden, heads = of.hidden_size, of.num_attention_heads
    if of.multi_latent_attention:
        key, value = of.qk_head_dim + of.qk_pos_emb_head_dim, of.v_head_dim
        query = of.q_lora_rank * (hidden + heads * key) if of.q_lora_rank else hidden * heads * key
        latent = of.kv_lora_rank * (hidden + heads * (of.qk_head_dim + value)) + hidden * of.qk_pos_emb_head_dim
        return query + latent + heads * value * hidden + of.seq_length * heads * (key + value)
    head = of.kv_channels or hidden // heads
    groups = of.num_query_groups if of.group_query_attention else heads
    projections = head * (heads * (3 if of.attention_output_gate else 2) + 2 * groups)
    return hidden * projections + 2 * of.seq_length * heads * head


def _experts(of: _Defaulting, topk: float, products: int) -> float:
    """Multiply-adds of a token in a layer of experts, router included."""
    hidden, latent = of.hidden_size, of.moe_latent_size
    width = of.moe_ffn_hidden_size or of.ffn_hidden_size
    router = 0 if of.moe_baseline_router in UNLEARNED else hidden * of.num_experts
    shared = hidden * (products * (of.moe_shared_expert_intermediate_size or 0) + bool(of.moe_shared_expert_gate))
    return router + shared + topk * products * (latent or hidden) * width + 2 * hidden * (latent or 0)


def arguments_of(settings: Settings) -> argparse.Namespace:
    """Return the arguments of a command's flags that FLOPs depend on, under Megatron's names.

    Granularity G multiplies experts and k, and divides their width, as Megatron's arguments have it.

    Raises:
        ValueError: --moe-layer-freq is not a pattern, or the tokenizer cannot be read.
    """
    number = partial(whole, settings)
    granularity, hidden = number("--moe-granularity", 1), number("--hidden-size")
    ffn = number("--ffn-hidden-size", hidden * 8 // 3 // 64 * 64 if "--swiglu" in settings else 4 * hidden)
    multiple = number("--make-vocab-size-divisible-by", 128)
    return argparse.Namespace(
        **{name: number(flag(name), default) for name, default in NUMBERS.items()},
        **{name: flag(name) in settings for name in SWITCHES},
        **{name: "".join(settings.get(flag(name), ())) for name in ("hybrid_layer_pattern", "moe_baseline_router")},
        ffn_hidden_size=ffn,
        num_experts=number("--num-experts") * granularity or None,
        moe_layer_freq=layer_frequency("".join(settings.get("--moe-layer-freq", ("1",)))),
        moe_router_topk=number("--moe-router-topk", 2) * granularity,
        moe_ffn_hidden_size=number("--moe-ffn-hidden-size", ffn) // granularity,
        padded_vocab_size=-(-vocabulary_words(settings) // multiple) * multiple,
    )


def layer_frequency(text: str) -> int | list[int]:
    """Return a number or a pattern of layers as Megatron reads it.

    Raises:
        ValueError: it is neither.
    """
    if text.isdecimal() and int(text):
        return int(text)
    from megatron.training.arguments import moe_freq_type  # slow to import

    try:
        found: int | list[int] = moe_freq_type(text)
        if found:
            return found
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"--moe-layer-freq {text}: {error}") from error
    raise ValueError(f"--moe-layer-freq {text}: give a number of at least 1, or a pattern such as ([0,1]*6)")


def vocabulary_words(settings: Settings) -> int:
    """Return the words of --vocab-size, --vocab-file or --tokenizer-model's tokenizer.json; else GPT-2's number.

    Raises:
        ValueError: tokenizer.json cannot be read.
    """
    file, folder = ("".join(settings.get(name, ())) for name in ("--vocab-file", "--tokenizer-model"))
    place = os.path.join(folder, "tokenizer.json") if folder else file
    return whole(settings, "--vocab-size") or (_words_in(place) if os.path.isfile(place) else GPT2_WORDS)


@cache
def _words_in(path: str) -> int:
    if path.endswith("tokenizer.json"):
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(path).get_vocab_size()
        except Exception as error:  # tokenizers has no exception of its own
            raise ValueError(f"--tokenizer-model: {path} cannot be read ({error})") from error
    with open(path, encoding="utf-8") as file:
        return len(json.load(file))
