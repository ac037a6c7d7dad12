"""What Megatron takes for granted and a machine may lack: a training does without it, and says what that costs."""

import os
import shutil
import sys
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ENGINE = "transformer_engine"


def do_without_what_is_missing(on_cpu: bool) -> None:
    """Call it before anything of Megatron is imported.

    Args:
        on_cpu: this runs on the CPU, where nothing is compiled and Transformer Engine is not missed.
    """
    if not on_cpu:
        do_without_compiler()
    do_without_broken_engine(says_so=not on_cpu)


def do_without_compiler() -> None:
    """Turn torch.compile off where Triton, which makes its kernels, could not compile its own part.

    Megatron decorates small functions with it when it is imported, and calls them when it starts, with Transformer
    Engine and without; its --disable-jit-fuser is looked at after that.
    """
    lacking = _lacking_for_triton()
    if not lacking or "1" in (os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("TORCH_COMPILE_DISABLE")):
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    _say(
        f"There is no {lacking}, so torch.compile is off: SwiGLU, biases, dropout and residuals run as several kernels "
        "instead of one, which takes some time and memory."
    )


def check_kernels(kernels: str, on_cpu: bool) -> None:
    """Whether what --moe-kernels asks for can run here.

    Args:
        kernels: the flag's value.
        on_cpu: this runs on the CPU, where Triton's interpreter alone can take its kernels.

    Raises:
        ValueError: names what lacks, and the remedy.
    """
    if kernels != "triton":
        return
    reason, is_interpreted = "", os.environ.get("TRITON_INTERPRET") == "1"
    if on_cpu and not is_interpreted:
        raise ValueError(
            "--moe-kernels triton cannot be used here: there is no GPU. Leave it out, or try the kernels slowly with "
            "TRITON_INTERPRET=1 in the environment."
        )
    try:
        import_module("triton")
    except Exception as error:
        reason = f"Triton cannot be imported ({type(error).__name__}: {error})"
    if not reason and not is_interpreted and (lacking := _lacking_for_triton()):
        reason = f"there is no {lacking}"
    if reason:
        raise ValueError(f"--moe-kernels triton cannot be used here: {reason}. Install it, or leave the flag out.")


def _lacking_for_triton() -> str:
    """What Triton looks for (runtime/build.py), in its words; empty where all of it is there."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return f"C compiler ({' or '.join(names)})"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    return "" if header.exists() else f"{header} (of python3-dev)"


def do_without_broken_engine(says_so: bool) -> None:
    """Let a Transformer Engine that cannot be imported count as not installed.

    Megatron does so where the reason is an ImportError; a library that is missing is none, and would end every run, on
    the CPU too.
    """
    if find_spec(ENGINE) is None:
        return
    try:
        import_module(f"{ENGINE}.pytorch")
    except Exception as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == ENGINE]:
            del sys.modules[name]
        sys.modules[ENGINE] = None  # type: ignore[assignment]  # what Python takes for "there is none"
        if says_so:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            _say(f"Transformer Engine cannot be imported ({reason}) and counts as not installed.")


def _say(words: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(words, file=sys.stderr, flush=True)
