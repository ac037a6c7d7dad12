"""One MoE layer, forward and backward: ReLU-routed and grouped, Megatron's own local layer, and the Mixtral block of
Hugging Face transformers with each of its implementations.

All have experts of the same size and k active experts per token, and routers with the weights with which ReLU gives
every expert the same number of tokens. They take turns in one process; each figure is a median.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results import default_output, note, save, show

from megatron.remoe import cpu
from megatron.remoe.start import console, machine

console.hide_unhelpful_warnings()
machine.disable_unavailable(cpu.is_wanted(sys.argv))
if cpu.is_wanted(sys.argv):
    cpu.install()

from timed_entry import start_at_target  # noqa: E402

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.remoe.layer.specs import with_fused_layers, with_relu_routing  # noqa: E402
from megatron.remoe.routing.config import ReMoEConfig  # noqa: E402
from tools.models.megatron_model import one_process  # noqa: E402

OURS = "ReMoE, grouped"


def megatron_layer(experts: int, options: argparse.Namespace, relu: bool, dtype: torch.dtype, **more: Any) -> MoELayer:
    """Return ReMoE's layer, or top-k in Megatron's own; `more` is for the configuration."""
    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": options.hidden,
        "ffn_hidden_size": options.ffn,
        "moe_ffn_hidden_size": options.ffn,
        "num_attention_heads": 1,
        "num_moe_experts": experts,
        "moe_router_topk": options.topk,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "gradient_accumulation_fusion": False,
        "cuda_graph_modules": [],
    }
    config = ReMoEConfig(moe_relu_routing=True, **settings, **more) if relu else TransformerConfig(**settings)
    spec = get_gpt_layer_local_spec(experts, False, normalization="RMSNorm")
    spec = with_fused_layers(with_relu_routing(spec)) if relu else spec
    layer = spec.submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer.to(dtype).cuda()


def layers(experts: int, options: argparse.Namespace, tokens: torch.Tensor) -> dict[str, torch.nn.Module]:
    """Return name → layer, from `[tokens, 1, hidden]` to the same shape."""
    ours = megatron_layer(experts, options, relu=True, dtype=tokens.dtype)
    start_at_target(ours.router, tokens)
    theirs = megatron_layer(experts, options, relu=False, dtype=tokens.dtype)
    theirs.router.weight.data.copy_(ours.router.weight)
    found: dict[str, torch.nn.Module] = {OURS: ours, "Megatron's, top-k": theirs}
    blocks = (mixtral_block(name, experts, options, ours.router.weight) for name in options.transformers)
    return found | {f"transformers, {name}": block for name, block in zip(options.transformers, blocks, strict=True)}


def mixtral_block(name: str, experts: int, options: argparse.Namespace, router_weight: torch.Tensor) -> torch.nn.Module:
    """Return the block of transformers by an implementation's name, with the router's weight, type and device."""
    from transformers.models.mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_local_experts=experts,
        num_experts_per_tok=options.topk,
    )
    config._experts_implementation = name
    block = MixtralSparseMoeBlock(config).to(device=router_weight.device, dtype=router_weight.dtype).train()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    block.gate.weight.data.copy_(router_weight)
    return block


def seconds(layer: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return the time of one forward and backward pass."""
    layer.zero_grad(set_to_none=True)
    tokens.grad = None
    if tokens.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = layer(tokens)
    (output[0] if isinstance(output, tuple) else output).sum().backward()  # Megatron's layers return a bias too
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=1024, help="size of an expert (default 1024)")
    parser.add_argument("--topk", type=int, default=2, help="active experts per token (default 2)")
    parser.add_argument("--transformers", nargs="*", default=["eager", "grouped_mm"], help="its implementations")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, default=default_output("layer"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, dict[str, list[float]]] = {}
    with one_process(backend="nccl" if device == "cuda" else "gloo"):
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device))
        for experts, number in ((e, n) for e in options.experts for n in options.tokens):
            torch.manual_seed(1)
            tokens = (torch.randn(number, 1, options.hidden) + torch.randn(options.hidden).sign()).to(device)
            tokens = tokens.to(torch.bfloat16 if options.bf16 else torch.float32).requires_grad_()
            candidates = layers(experts, options, tokens.detach())
            times = results[f"{experts} experts, {number} tokens"] = {name: [] for name in candidates}
            for turn in range(options.repetitions + 1):
                for name, layer in candidates.items():
                    taken = seconds(layer, tokens)
                    times[name] += [taken] if turn else []
            save(options.output, {"options": vars(options), "seconds": results})
            note(f"{experts} experts, {number} tokens: ours {statistics.median(times[OURS]) * 1e3:.3g} ms")
            del candidates
            gc.collect()
    rows = []
    for case, times in results.items():
        first, *others = (statistics.median(found) for found in times.values())
        rows.append((case, f"{first * 1e3:,.3g} ms", *(other / first for other in others)))
    columns = ["layer", *next(iter(results.values()))]
    show("Forward and backward: ours, and the others' time over ours", columns, rows, options.output)


if __name__ == "__main__":
    main()
