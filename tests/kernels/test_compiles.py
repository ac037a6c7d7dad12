"""Test that all Triton kernels compile for compute capabilities 8.0, 9.0 and 10.0, and spill no registers."""

import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.kernels import gates, plan, swiglu, triton
from tools.console.places import ROOT

MAP = {"map_TE": "*i1", "num_tokens": "i32", "num_experts": "i32"}
COUNTS = {"counts_EB": "*i32", "by_token": "*i32"}
GATED = MAP | {"logits_TE": "*bf16", "probs_TE": "*bf16", "counts_EB": "*i32", "sums_EB": "*fp32"}
GRADIENT = {"d_probs_TE": "*bf16", "map_TE": "*i1", "on_E": "*fp32", "off": "*fp32"}
GRADIENT |= {"d_logits_TE": "*bf16", "size": "i32"}
FILLED = MAP | COUNTS | {"probs_TE": "*fp32", "token_index_P": "*i32", "gates_P": "*fp32"}
SPREAD = MAP | COUNTS | {"d_gates_P": "*fp32", "d_probs_TE": "*fp32", "num_pairs": "i32"}


@dataclass(frozen=True)
class Kernel:
    """A kernel and the arguments of its launch.

    Attributes:
        name: "module:function" below megatron.remoe.kernels.
        signature: Triton's type of each argument that is not a constant: "*bf16", "i32". Pointers are assumed to be
            aligned to 16 bytes, as torch's are.
        constants: values of the `tl.constexpr` arguments.
        multiples: names of the integers that are multiples of 16, which Triton checks at each launch.
        num_warps: warps of a program.
    """

    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    multiples: Sequence[str] = ()
    num_warps: int = 4


def spilled_bytes(kernel: Kernel, capability: int) -> int:
    """Return the bytes per thread that the kernel spills to memory if compiled for a capability (80 means 8.0)."""
    import triton
    from triton.backends.compiler import GPUTarget

    module, name = kernel.name.split(":")
    function = getattr(importlib.import_module(f"megatron.remoe.kernels.{module}"), name)
    signature = {argument: kernel.signature.get(argument, "constexpr") for argument in function.arg_names}
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in kernel.multiples
    }
    source = triton.compiler.ASTSource(function, signature, kernel.constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": kernel.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        listed = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", listed.stdout)
    assert sizes, listed.stdout
    return sum(map(int, sizes))


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
