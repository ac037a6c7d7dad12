"""One ReMoE layer in bf16 with `--moe-kernels torch` and `triton`, on a GPU: both ways' numbers and times.

Same weights and tokens. The error of a result is its distance from that of PyTorch's way in float64, over its norm; the
layer's output and all gradients are looked at, and the largest is told.
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from layer import ROOT, megatron_layer, parameters_of, seconds
from results import milliseconds, progress, save, show
from timed_entry import start_at_target

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from tools.common.one_process import one_process

WAYS = ("torch", "triton")
GRAINS = {"(8, 1)": (8, 1), "(8, 8)": (64, 8), "(64, 1)": (64, 1)}  # (E, G): experts, and active ones per token
ALLOWED = 1.5  # times PyTorch's error, which is that of bf16
LOSS_OF_L1 = {"moe_relu_l1_reg_coeff_init": 1e-3}  # so that its gradient is seen


def results_of(layer: torch.nn.Module, tokens: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients, in float64 on the host."""
    tokens = tokens.detach().clone().requires_grad_()
    layer.zero_grad()
    output = layer(tokens)[0]
    output.backward(upstream)
    found = {"output": output, "tokens": tokens.grad}
    found |= {name: weight.grad for name, weight in layer.named_parameters()}
    return {name: value.detach().double().cpu() for name, value in found.items() if value is not None}


def largest_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Of all results, and whose it is; one that is missing or not finite is off by infinity."""
    errors = {}
    for name, value in exact.items():
        off = (found[name] - value).norm() / value.norm() if name in found else torch.tensor(torch.inf)
        errors[name] = float(off.nan_to_num(torch.inf))
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=3072, help="of an expert before granularity (default 3072)")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "kernels.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU, which Triton's kernels need")
    whole, rows, failures = options.ffn, [], []
    results: dict[str, dict[str, Any]] = {}
    with one_process(backend="nccl"), progress(len(GRAINS)) as done:
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device="cuda"))
        for case, (experts, options.topk) in GRAINS.items():
            torch.manual_seed(1)
            options.ffn = whole // options.topk
            common = torch.randn(options.hidden).sign()
            tokens = (torch.randn(options.tokens, 1, options.hidden) + common).to("cuda", torch.bfloat16)
            upstream = torch.randn_like(tokens)
            layers = {
                way: megatron_layer(experts, options, True, torch.bfloat16, moe_kernels=way, **LOSS_OF_L1)
                for way in WAYS
            }
            start_at_target(layers["torch"].router, tokens)
            state = copy.deepcopy(layers["torch"].state_dict())
            layers["triton"].load_state_dict(state)
            oracle = megatron_layer(experts, options, True, torch.float64, moe_kernels="torch", **LOSS_OF_L1)
            oracle.load_state_dict(state)
            exact = results_of(oracle, tokens.double(), upstream.double())
            del oracle
            results[case] = {way: {"seconds": []} for way in WAYS}
            for way, layer in layers.items():
                error, whose = largest_error(results_of(layer, tokens, upstream), exact)
                results[case][way] |= {"error": error, "of": whose}
            for _ in range(options.repetitions):
                for way, layer in layers.items():
                    taken = seconds(lambda x, layer=layer: layer(x)[0], tokens.requires_grad_(), parameters_of(layer))
                    results[case][way]["seconds"].append(taken)
            theirs, ours = (results[case][way] for way in WAYS)
            if not ours["error"] <= ALLOWED * theirs["error"]:
                failures.append(
                    f"{case}: {ours['of']} is off by {ours['error']:.2e}, PyTorch's by {theirs['error']:.2e}"
                )
            save(options.output, {"layers": results, "failures": failures})
            times = [statistics.median(found["seconds"]) for found in (theirs, ours)]
            errors = [f"{found['error']:.1e}" for found in (theirs, ours)]
            rows.append((case, *map(milliseconds, times), times[1] / times[0], *errors))
            done(f"{case}: {times[1] / times[0]:.3f} of PyTorch's time")
    columns = ["(E, G)", "torch", "triton", "triton / torch", "error, torch", "error, triton"]
    show(f"One layer, forward and backward, {options.tokens} tokens", columns, rows, options.output)


if __name__ == "__main__":
    main()
