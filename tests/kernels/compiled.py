"""Compile Triton kernels for any GPU without having one, in another process because this one interprets them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.trainings import REPOSITORY

CAPABILITIES = 80, 90, 100


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


@dataclass(frozen=True)
class Usage:
    """The resources of a kernel's machine code: registers per thread, and bytes per thread spilled to memory."""

    name: str
    capability: int
    registers: int
    spilled: int


def usages(kernels: Sequence[Kernel], capabilities: Sequence[int] = CAPABILITIES) -> list[Usage]:
    """Compile each kernel for each compute capability (80 for 8.0), and print and return its usage."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = json.dumps([[asdict(kernel) for kernel in kernels], list(capabilities)])
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    done = subprocess.run(
        command, input=asked, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [Usage(**usage) for usage in json.loads(done.stdout)]
    for usage in found:
        print(f"{usage.name}, sm{usage.capability}: {usage.registers} registers, {usage.spilled} bytes spilled")
    return found


def _usage(kernel: Kernel, capability: int) -> Usage:
    import importlib
    import tempfile

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
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed.stdout)}
    return Usage(kernel.name, capability, numbers["REG"], numbers["STACK"] + numbers["LOCAL"])


if __name__ == "__main__":
    kernels, capabilities = json.load(sys.stdin)
    found = [_usage(Kernel(**kernel), capability) for kernel in kernels for capability in capabilities]
    json.dump([asdict(usage) for usage in found], sys.stdout)
