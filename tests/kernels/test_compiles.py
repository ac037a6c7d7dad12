"""Test that all Triton kernels compile for compute capabilities 8.0, 9.0 and 10.0, and spill no registers."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.kernels import gates, plan, swiglu, triton
from tests.kernels.compiled import Kernel, spilled_bytes
from tools.console.places import ROOT

MAP = {"map_TE": "*i1", "num_tokens": "i32", "num_experts": "i32"}
COUNTS = {"counts_EB": "*i32", "by_token": "*i32"}
GATED = MAP | {"logits_TE": "*bf16", "probs_TE": "*bf16", "counts_EB": "*i32", "sums_EB": "*fp32"}
GRADIENT = {"d_probs_TE": "*bf16", "map_TE": "*i1", "on_E": "*fp32", "off": "*fp32"}
GRADIENT |= {"d_logits_TE": "*bf16", "size": "i32"}
FILLED = MAP | COUNTS | {"probs_TE": "*fp32", "token_index_P": "*i32", "gates_P": "*fp32"}
SPREAD = MAP | COUNTS | {"d_gates_P": "*fp32", "d_probs_TE": "*fp32", "num_pairs": "i32"}


def plans(num_tokens: int, num_experts: int) -> list[Kernel]:
    """Return the kernels of a plan and of the gates in this size."""
    block, tile = plan.choose_tile(num_tokens, num_experts)
    constants = {"BLOCK": block, "TILE": tile}
    filling = constants | {"BLOCKS": num_tokens // block}
    divided = ["num_experts"] if num_experts % 16 == 0 else []
    return [
        Kernel("plan:_count", MAP | COUNTS, constants, divided, plan.WARPS),
        Kernel("gates:_gates", GATED, constants, divided, plan.WARPS),
        Kernel("plan:_fill", FILLED | {"num_blocks": "i32", "num_pairs": "i32"}, filling, divided, plan.WARPS),
    ]


def experts(dtype: str, ffn: int) -> list[Kernel]:
    """Return the kernels of experts in this size, with the sum over a token's rows."""
    pairs, width = swiglu._tile(torch.empty(0, ffn))
    constants = {"PAIRS": pairs, "WIDTH": width}
    given = {"hidden_PF": dtype, "gates_P": "*fp32", "activated_PF": dtype}
    given |= {"num_pairs": "i32", "ffn": "i32"}
    gradients = {"d_hidden_PF": dtype, "d_gates_P": "*fp32"}
    summed = {"pairs_PH": dtype, "by_token": "*i32", "sums_TH": dtype, "hidden": "i32"}
    return [
        Kernel("swiglu:_activate", given, constants, ["ffn"]),
        Kernel("swiglu:_activate_backward", given | gradients, constants, ["ffn"]),
        Kernel("triton:_sum", summed, {"WIDTH": triton.SUM_WIDTH}, ["hidden"]),
    ]


def all_kernels() -> list[Kernel]:
    """Return all kernels, in the sizes of the launch scripts and in larger ones."""
    spread = Kernel("plan:_spread", SPREAD, {"BLOCK": plan.SPREAD // 64, "TILE": 64}, ["num_experts"])
    kernels = [*plans(16384, 8), *plans(16384, 512), *plans(65536, 512), spread]
    kernels += [Kernel("gates:_gradient", GRADIENT, {"E": number, "BLOCK": gates.BLOCK}) for number in (8, 512)]
    return [*kernels, *experts("*bf16", 3072), *experts("*fp32", 48)]


def test_nothing_is_spilled() -> None:
    """Kernels are compiled in a new process, because this one interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_compiles"]
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, text=True).stdout == ""


if __name__ == "__main__":
    for kernel, capability in itertools.product(all_kernels(), (80, 90, 100)):
        if spilled := spilled_bytes(kernel, capability):
            print(f"{kernel.name}, sm{capability}: {spilled} bytes spilled")
