"""Choose flags and environment variables for the GPUs of a training and the kernels that are installed."""

import importlib.util
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from ..console.flags import last_value
from .layout import RecipeError

TRITON = ["--moe-kernels", "triton", "--cross-entropy-loss-fusion", "--ddp-average-in-collective"]
GPU_FLAGS = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
PLAIN_PYTORCH = ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"]
ENGINE, APEX = ("transformer_engine.pytorch",), ("torch", "fused_weight_gradient_mlp_cuda")
_WITHOUT_CONNECTIONS = {"--use-torch-fsdp2", "--use-megatron-fsdp", "--overlap-moe-expert-parallel-comm"}
_WITHOUT_SEGMENTS = {"--use-nccl-ub", "--use-persistent-ckpt-worker"}


def kernel_flags(kernels: str, interpreter: str) -> list[str]:
    """Return the flags that KERNELS stands for.

    Raises:
        RecipeError: it is neither empty nor triton, or a package is missing.
    """
    if kernels not in ("", "triton"):
        raise RecipeError(f"KERNELS={kernels}: choose triton, or leave it unset")
    if kernels and importlib.util.find_spec("fla") is None:
        raise RecipeError(
            f"KERNELS=triton needs flash-linear-attention's kernels: {interpreter} -m pip install fla-core"
        )
    return TRITON if kernels else []


def count_gpus(environment: Mapping[str, str], interpreter: str) -> int:
    """Return the number of GPUs of this machine that processes see, by the driver's tool or else by PyTorch."""
    if shutil.which("nvidia-smi") is None:
        printed = _last_line([interpreter, "-c", "import torch; print(torch.cuda.device_count())"])
        return int(printed) if printed.isdecimal() else 0
    listed = sum(line.startswith("GPU ") for line in _output(["nvidia-smi", "-L"]).splitlines())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return listed
    return min(listed, sum(device.strip()[:1] not in ("", "-") for device in visible.split(",")))


def check_gpus(wanted: int, environment: Mapping[str, str], interpreter: str) -> None:
    """Check that this machine has the GPUs that are wanted; without them each process would train on the CPU.

    Raises:
        RecipeError: it has fewer.
    """
    present = count_gpus(environment, interpreter)
    if present < wanted:
        remedy = (f"Ask for at most {present}, or add" if present else "Add") + " --cpu after -- to use the CPU"
        raise RecipeError(f"gpus_per_node is {wanted}, and {present} GPUs were found. {remedy}")


def _output(command: Sequence[str]) -> str:
    """Return what a program prints; nothing if it fails."""
    answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, errors="replace")
    return "" if answer.returncode else answer.stdout


def _last_line(command: Sequence[str]) -> str:
    return (_output(command).splitlines() or [""])[-1]


def problem_with(interpreter: str, modules: Sequence[str]) -> str | None:
    """Return why `modules` cannot be imported; None if they can.

    The import runs in a process of its own, as it may print, or crash.
    """
    if importlib.util.find_spec(modules[-1].partition(".")[0]) is None:
        return ": not installed"
    program = f"""
try:
    import {", ".join(modules)}
    print("usable")
except Exception as error:
    print(" cannot be imported: %s: %s" % (type(error).__name__, (str(error).splitlines() or [""])[0]))
"""
    answer = _last_line([interpreter, "-c", program])
    return None if answer == "usable" else answer or f": {interpreter} crashed while importing it"


def gpu_flags(has_experts: bool, kernels: str, flags: Sequence[str], interpreter: str) -> tuple[list[str], str]:
    """Return the flags for a training on GPUs, and which layers they choose and why.

    Args:
        has_experts: whether the model has experts.
        kernels: KERNELS of the environment.
        flags: Megatron's flags from the user.
        interpreter: the one that trains, empty to ask for no packages and take plain PyTorch.
    """
    problem: str | None = ": not asked for"
    if interpreter and last_value(flags, "--transformer-impl") != "local":
        problem = problem_with(interpreter, ENGINE)
    if problem is None:
        engine, chosen = "Transformer Engine", ["--transformer-impl", "transformer_engine"]
        if has_experts:
            chosen.append("--moe-grouped-gemm")
    else:
        engine = f"plain PyTorch (Transformer Engine{problem})"
        chosen = [*PLAIN_PYTORCH]
        if not kernels:
            chosen.append("--no-rope-fusion")
    # Without apex, PyTorch's product has to add weight gradients, in Megatron's output layer at least, and no GPU has
    # run that yet.
    if not kernels and (not interpreter or problem_with(interpreter, APEX) is not None):
        chosen.append("--no-gradient-accumulation-fusion")
    return [*GPU_FLAGS, *chosen], engine


def precedes_blackwell(gpu: str | None) -> bool:
    """Return whether the GPUs are of an earlier generation than Blackwell.

    Args:
        gpu: kind of GPU that a plan is for; None for those of this machine.
    """
    if gpu is not None:
        letters = gpu.lower().removeprefix("g")
        return not (letters[:1] == "b" and letters[1:2].isdigit())
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capabilities = _output(command) if shutil.which(command[0]) else ""
    generation = capabilities.partition(".")[0].strip()
    return not generation.isdecimal() or int(generation) < 10


def gpu_settings(flags: Sequence[str], environment: Mapping[str, str], gpu: str | None) -> dict[str, str]:
    """Return the environment variables of a training on GPUs; the user's own stay. `gpu`: see `precedes_blackwell`."""
    chosen = {}
    # Before Blackwell, Megatron refuses TP and CP without one connection. It refuses FSDP with it, and the overlap of
    # expert parallelism wants more.
    parallel = [last_value(flags, f"--{kind}-parallel-size") for kind in ("tensor-model", "context")]
    if parallel != ["1", "1"] and not _WITHOUT_CONNECTIONS & set(flags) and precedes_blackwell(gpu):
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # The number of pairs changes every step, and segments of a fixed size would fragment. All versions of PyTorch read
    # this name. CUDA graphs, NCCL's buffers and checkpoint workers do not work with it without more settings.
    if (
        "PYTORCH_ALLOC_CONF" not in environment
        and (last_value(flags, "--cuda-graph-impl") or "none") == "none"
        and not _WITHOUT_SEGMENTS & set(flags)
    ):
        chosen["PYTORCH_CUDA_ALLOC_CONF"] = environment.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return chosen
