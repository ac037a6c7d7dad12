"""Map layers and names between GPTModel and HybridModel, which has attention and MLP in separate layers."""

import argparse
import re

from ..console.errors import ConversionError
from ..recipes.flops import moe_layer_pattern

FINAL_NORM = {"gpt": "decoder.final_layernorm.", "hybrid": "decoder.final_norm."}
ATTENTION = ("self_attention.", "input_layernorm.")


def hybrid_layer(layer: int, rest: str) -> int:
    """Return the number, from 0, of the HybridModel layer that holds the weight `rest` of the GPTModel layer."""
    return 2 * layer + (0 if rest.startswith(ATTENTION) else 1)


def as_gpt(args: argparse.Namespace, source: object) -> argparse.Namespace:
    """Return the arguments of the GPTModel that computes the same as `args`; errors name the checkpoint `source`.

    Raises:
        ConversionError: attention and MLP do not alternate, or the routing is by hash.
    """
    args = argparse.Namespace(**vars(args))
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not pattern:
        return args
    _refuse_hash(args)
    layers = pattern.replace("|", "")
    if not re.fullmatch(r"(\*[E-])+", layers):
        raise ConversionError(
            f"{source}: --hybrid-layer-pattern {pattern} must alternate attention (*) and MLP (- or E) to be "
            "a GPTModel.",
            "REMOE-E512",
        )
    experts = [int(mlp == "E") for mlp in layers[1::2]]
    args.hybrid_layer_pattern, args.num_layers = None, len(experts)
    args.moe_layer_freq = 1 if len(set(experts)) == 1 else experts
    return args


def as_hybrid(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of the HybridModel that computes the same as a GPTModel with `args`.

    Raises:
        ConversionError: the routing is by hash, or attention is latent.
    """
    _refuse_hash(args)
    if getattr(args, "multi_latent_attention", False):
        raise ConversionError(
            "--multi-latent-attention: such a model cannot become a HybridModel. Continue training the GPTModel.",
            "REMOE-E512",
        )
    args = argparse.Namespace(**vars(args))
    mlps = ["E" if has_experts else "-" for has_experts in moe_layer_pattern(args)]
    args.hybrid_layer_pattern = "".join(f"*{mlp}" for mlp in mlps)
    args.num_layers, args.moe_layer_freq = 2 * len(mlps), 1
    return args


def _refuse_hash(args: argparse.Namespace) -> None:
    if getattr(args, "moe_baseline_router", None) == "hash":
        raise ConversionError(
            "--moe-baseline-router hash depends on the layers' numbers, which differ in the other model class.",
            "REMOE-E512",
        )
