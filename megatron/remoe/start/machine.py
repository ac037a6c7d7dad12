"""Disable features that this machine does not have, and print the cost."""

import importlib
import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from megatron.remoe.files.errors import UsageError


def disable_unavailable(on_cpu: bool) -> None:
    """Turn off apex, and torch.compile and Transformer Engine if unusable. Call this before Megatron is imported.

    Megatron decorates small functions with torch.compile when it is imported, and calls them before it reads
    --disable-jit-fuser. Triton generates their kernels, and needs a C compiler and Python.h for a part of itself.

    Args:
        on_cpu: whether this process trains on the CPU, where nothing is compiled and Transformer Engine is not used.
    """
    switched_off = "1" in (os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("TORCH_COMPILE_DISABLE"))
    if not (on_cpu or switched_off) and (missing := missing_for_triton()):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        if os.environ.get("RANK", "0") == "0":
            reason = f"There is no {missing}, so torch.compile is off"
            effect = "SwiGLU, biases, dropout and residuals run as several kernels instead of one"
            print(f"{reason}: {effect}, which takes some time and memory.", file=sys.stderr, flush=True)
    hidden = ["apex"]  # without Transformer Engine, Megatron prefers its norms to PyTorch's, but they have no RMSNorm
    problem = "" if on_cpu else find_engine_problem()
    if on_cpu or problem:
        hidden.append("transformer_engine")
    if problem and os.environ.get("RANK", "0") == "0":
        print(f"Transformer Engine is not used: {problem}", file=sys.stderr, flush=True)
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's mark of a missing module


def find_engine_problem() -> str:
    """Return why Transformer Engine cannot be imported, or "". Megatron handles an ImportError, and no other error."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return ""
    except Exception as error:  # a library is missing, or versions differ
        return f"{type(error).__name__}: {error}"
    return ""


def check_kernels(kernels: str, on_cpu: bool) -> None:
    """Check that the kernels of --moe-kernels can run here.

    Args:
        kernels: value of the flag.
        on_cpu: whether this process trains on the CPU, where only Triton's interpreter can run them.

    Raises:
        UsageError: the kernels cannot run; the message names what is missing and the remedy.
    """
    if kernels == "torch" or os.environ.get("TRITON_INTERPRET") == "1":
        return
    if on_cpu:
        missing = "GPU"
    elif find_spec("triton") is None:
        missing = "package triton"
    else:
        missing = missing_for_triton()
    if missing:
        raise UsageError(
            f"--moe-kernels {kernels} cannot be used here: there is no {missing}. Install it, or leave the flag out.",
            "REMOE-E102",
        )


def missing_for_triton() -> str:
    """Return the name of a missing build dependency of Triton (its runtime/build.py), or ""."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return f"C compiler ({' or '.join(names)})"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    return "" if header.exists() else f"{header} (of python3-dev)"
