"""Compile a Triton kernel for a GPU without having one."""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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
