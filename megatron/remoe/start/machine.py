"""Disable features that this machine does not have, and print the cost."""

import os
import shutil
import socket
import sys
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from megatron.remoe.files.errors import DataError, UsageError

ENGINE = "transformer_engine"


def disable_unavailable(on_cpu: bool) -> None:
    """Turn off compilation and Transformer Engine where they cannot work. Call it before Megatron is imported.

    Args:
        on_cpu: whether this process trains on the CPU, where nothing is compiled and Transformer Engine is not used.
    """
    if not on_cpu:
        disable_compilation()
    disable_broken_engine(notify=not on_cpu)


def disable_compilation() -> None:
    """Turn torch.compile off if Triton, which makes its kernels, could not compile its own part.

    Megatron compiles small functions when it is imported and calls them at its start, before it reads
    --disable-jit-fuser.
    """
    missing = missing_for_triton()
    if not missing or "1" in (os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("TORCH_COMPILE_DISABLE")):
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    _say(
        f"There is no {missing}, so torch.compile is off: SwiGLU, biases, dropout and residuals run as several kernels "
        "instead of one, which takes some time and memory."
    )


def check_node() -> None:
    """Check that this machine, which has no GPU, is the only node: others' ranks would wait for it on their GPUs.

    Raises:
        DataError: names the host. Each rank prints it, unlike a wrong flag.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) < int(world):
        raise DataError(
            f"{socket.gethostname()} is one of several nodes and has no working GPU. Repair or replace it, or use all "
            "nodes' CPUs with --cpu.",
            "REMOE-E107",
        )


def check_kernels(kernels: str, on_cpu: bool) -> None:
    """Check that the kernels of --moe-kernels can run here.

    Args:
        kernels: value of the flag.
        on_cpu: whether this process trains on the CPU, where only Triton's interpreter can run them.

    Raises:
        UsageError: names what is missing, and the remedy.
    """
    if kernels != "torch" and (problem := _kernel_problem(kernels, on_cpu)):
        raise UsageError(f"--moe-kernels {kernels} cannot be used here: {problem}.", "REMOE-E102")


def _kernel_problem(kernels: str, on_cpu: bool) -> str:
    """Return why the kernels cannot run here and the remedy, or ""."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1" and kernels == "triton"
    if on_cpu and not is_interpreted:
        return "there is no GPU. Leave it out, or try triton slowly with TRITON_INTERPRET=1 in the environment"
    try:
        import_module("triton")
    except Exception as error:
        return f"Triton cannot be imported ({type(error).__name__}: {error}). Install it, or leave the flag out"
    missing = "" if is_interpreted else missing_for_triton()
    return f"there is no {missing}. Install it, or leave the flag out" if missing else ""


def missing_for_triton() -> str:
    """Return what Triton needs (runtime/build.py) and cannot find, or ""."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return f"C compiler ({' or '.join(names)})"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    return "" if header.exists() else f"{header} (of python3-dev)"


def disable_broken_engine(notify: bool) -> None:
    """Treat a Transformer Engine that cannot be imported as not installed.

    Megatron does this for an ImportError. A missing shared library raises another error, which would end every run.
    """
    if find_spec(ENGINE) is None:
        return
    try:
        import_module(f"{ENGINE}.pytorch")
    except Exception as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == ENGINE]:
            del sys.modules[name]
        sys.modules[ENGINE] = None  # type: ignore[assignment]  # Python's mark of a missing module
        if notify:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            _say(f"Transformer Engine cannot be imported ({reason}) and counts as not installed.")


def _say(words: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(words, file=sys.stderr, flush=True)
