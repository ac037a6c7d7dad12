"""Choose flags and environment variables for the GPUs of a training run and the kernels that are installed."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ..console.flags import group_by_flag
from .layout import Layout, RecipeError
from .megatron_values import read_values

TRITON = ["--moe-kernels", "triton", "--cross-entropy-loss-fusion", "--ddp-average-in-collective"]
GPU_FLAGS = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
PLAIN_PYTORCH = ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"]
SPINNING = "GOMP_SPINCOUNT"  # how often a waiting thread of GNU's OpenMP looks before it sleeps
_WITHOUT_CONNECTIONS = {"--use-torch-fsdp2", "--overlap-moe-expert-parallel-comm"}
_WITHOUT_SEGMENTS = {"--use-nccl-ub", "--use-persistent-ckpt-worker"}


def check_gpus(wanted: int, interpreter: str) -> None:
    """Raise RecipeError if PyTorch sees fewer GPUs than `wanted`: the processes would train on the CPU."""
    printed = run([interpreter, "-c", "import torch; print(torch.cuda.device_count())"]).stdout.split()
    present = int(printed[-1]) if printed else 0
    if present < wanted:
        remedy = "Ask for fewer, or add --cpu after -- to use the CPU"
        raise RecipeError(f"gpus_per_node is {wanted}, and PyTorch sees {present} GPUs. {remedy}")


def run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run a program and keep its output."""
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, errors="replace")


def try_engine(interpreter: str, nodes: int) -> str | None:
    """Return why Transformer Engine cannot be imported; None if it can. A new process tries it, as it may crash.

    Raises:
        RecipeError: it is installed but cannot be imported, and other nodes might import it.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "not installed"
    result = run([interpreter, "-c", "import transformer_engine.pytorch"])
    problem = (result.stderr.splitlines() or ["crashed"])[-1] if result.returncode else None
    if problem and nodes > 1:
        raise RecipeError(
            f"NNODES={nodes}: Transformer Engine is installed on this node and cannot be imported ({problem}). Repair "
            "it, or add --transformer-impl local after -- on all nodes"
        )
    return problem


def deciding_values(layout: Layout, flags: Sequence[str]) -> dict[str, Any]:
    """Return the values of flags on which other flags depend: the user's, else the recipe's."""
    decided: dict[str, Any] = {"--transformer-impl": None, "--cuda-graph-impl": "none"}
    decided |= {"--tensor-model-parallel-size": layout.tp, "--context-parallel-size": layout.cp}
    given = decided.keys() & group_by_flag(flags)
    values = vars(read_values(flags)) if given else {}
    return decided | {flag: values[flag.removeprefix("--").replace("-", "_")] for flag in given}


def gpu_flags(
    has_experts: bool, kernels: str, values: Mapping[str, Any], interpreter: str, nodes: int
) -> tuple[list[str], str]:
    """Return the flags for a training run on GPUs, and a line that names the layers that they choose.

    Args:
        has_experts: whether the model has experts.
        kernels: the environment variable KERNELS.
        values: from `deciding_values`.
        interpreter: starts the run.
        nodes: number of nodes; each chooses its layers.

    Raises:
        RecipeError: context parallelism would run in plain PyTorch, which does not have it; see `try_engine`.
    """
    problem: str | None = "not asked for"
    if values["--transformer-impl"] != "local":
        problem = try_engine(interpreter, nodes)
    if problem is None:
        engine, chosen = "Transformer Engine", ["--transformer-impl", "transformer_engine"]
        if has_experts:
            chosen.append("--moe-grouped-gemm")
    else:
        if values["--context-parallel-size"] > 1 and values["--transformer-impl"] in (None, "local"):
            raise RecipeError(
                f"CP={values['--context-parallel-size']} needs Transformer Engine ({problem}). Install it, or leave CP "
                "out. To plan for a different machine, add --transformer-impl transformer_engine after --"
            )
        engine = f"plain PyTorch (Transformer Engine: {problem})"
        chosen = [*PLAIN_PYTORCH, "--no-rope-fusion"]
    # Without apex, a product of PyTorch's accumulates weight gradients, at least in Megatron's output layer. That is
    # not yet tested on a GPU, so only KERNELS=triton uses it.
    if not kernels and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        chosen.append("--no-gradient-accumulation-fusion")
    return [*GPU_FLAGS, *chosen], engine


def cpu_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a training run on the CPU; they do not change what the user has set.

    By default a waiting OpenMP thread keeps its core busy, while the thread that it waits for might have none because
    of another program. docs/performance.md has the measurement.
    """
    return {} if {SPINNING, "OMP_WAIT_POLICY"} & set(environment) else {SPINNING: "1000"}


def gpu_settings(
    flags: Sequence[str], values: Mapping[str, Any], environment: Mapping[str, str], gpu: str | None
) -> dict[str, str]:
    """Return the environment variables of a training run on GPUs; they do not change what the user has set.

    `flags` are the user's, `values` come from `deciding_values`. `gpu` is the kind of GPU of a dry run; None for this
    machine's.
    """
    chosen, question = {}, ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if gpu is None:
        gpu = run(question).stdout if shutil.which(question[0]) else ""
    precedes_blackwell = re.search(r"\bg?b\d", gpu.lower()) is None
    # Before Blackwell, Megatron refuses TP and CP unless this is 1. It refuses --use-torch-fsdp2 if this is 1, and the
    # overlap of expert parallelism needs more connections.
    is_parallel = max(values["--tensor-model-parallel-size"], values["--context-parallel-size"]) > 1
    if is_parallel and not _WITHOUT_CONNECTIONS & set(flags) and precedes_blackwell:
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # The number of pairs changes every step, and segments of a fixed size would fragment. All versions of PyTorch read
    # this name. CUDA graphs, NCCL's buffers and checkpoint workers do not work with it without more settings.
    if (
        "PYTORCH_ALLOC_CONF" not in environment
        and values["--cuda-graph-impl"] == "none"
        and not _WITHOUT_SEGMENTS & set(flags)
    ):
        chosen["PYTORCH_CUDA_ALLOC_CONF"] = environment.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return chosen
