"""Build the no-op CUDA from `cuda/` at its first use; see cuda/stub.h."""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from megatron.remoe.files.files import find_cache_folder

from ..console.errors import ToolError
from .gpus import CONTEXT, GPUS

FOLDER = Path(__file__).parent / "cuda"
MANAGEMENT = FOLDER / "management.cpp"
SOURCES = sorted(set(FOLDER.glob("*.cpp")) - {MANAGEMENT})
NAME, MANAGEMENT_NAME = "libcuda.so.1", "libnvidia-ml.so.1"
# Symbols of CUDA's family in the libraries of PyTorch.
FAMILY = re.compile(r"(cuda[A-Z]|__cuda|cublas|nccl[A-Z]|cu(?!File)[A-Z]|nvrtc[A-Z])\w*")
# These functions only look up names, so the real ones in torch's libraries are used.
REAL = {"cudaGetErrorName", "cudaGetErrorString", "cublasGetStatusString", "ncclGetErrorString", "cublasLtGetVersion"}
# Functions that the C++ files do not define: parameters and body → their names. All others return 0.
ANSWERS = {
    "() { rehearsal_launched(); return 0; }": """
        __cudaLaunchKernel cudaLaunchKernel cudaLaunchKernelExC cudaLaunchCooperativeKernel cuLaunchKernel
        cuLaunchKernelEx cublasGemmEx cublasSgemm_v2 cublasGemmStridedBatchedEx cublasSgemmStridedBatched cublasLtMatmul
        ncclReduce ncclReduceScatter ncclSend ncclRecv ncclAlltoAll ncclBcast
    """,
    "(void** made) { *made = rehearsal_handle(); return 0; }": """
        cublasCreate_v2 cublasLtCreate cublasLtMatmulDescCreate cublasLtMatrixLayoutCreate
        cublasLtMatmulPreferenceCreate cudaStreamCreate cudaStreamCreateWithFlags cudaStreamCreateWithPriority
        cudaEventCreate cudaEventCreateWithFlags cudaGraphInstantiate cudaGraphInstantiateWithFlags __cudaGetKernel
        cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleGetFunction cuDevicePrimaryCtxRetain cuCtxGetCurrent
        nvrtcCreateProgram
    """,
    "(int* value) { *value = CUDA; return 0; }": "cudaDriverGetVersion cudaRuntimeGetVersion cuDriverGetVersion",
    "(int* value) { *value = 1; return 0; }": "cudaDeviceCanAccessPeer",
    "(int* value) { *value = 2; return 0; }": """
        cudaOccupancyMaxActiveBlocksPerMultiprocessor cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags
        cuOccupancyMaxActiveBlocksPerMultiprocessor
    """,
    "(int* value) { *value = 66; return 0; }": "cuOccupancyMaxActiveClusters",
    # No priority, default modes, no error.
    "(void*, int* value) { *value = 0; return 0; }": """
        cudaStreamGetPriority cuStreamIsCapturing cublasGetMathMode cublasGetPointerMode_v2 ncclCommGetAsyncError
    """,
}
# Triton launches kernels with a module that it compiles from this file at first use.
TRITON = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "driver.c"


def build_libraries() -> list[Path]:
    """Return the libraries to preload; build them unless they exist for these sources and this torch.

    Raises:
        ToolError: torch is not built for CUDA, or headers or a compiler are missing; the message says what to install.
    """
    if torch.version.cuda is None:
        raise ToolError(
            "A rehearsal needs PyTorch built for CUDA, as PyPI has it for Linux, and here is "
            f"{torch.__version__}, for CPUs only. Install it in a different environment (pip install torch), and set "
            "PYTHON=/path/to/python."
        )
    sources = [*sorted(FOLDER.iterdir()), Path(__file__), *[TRITON] * TRITON.exists()]
    digest = hashlib.sha256(torch.__version__.encode() + b"".join(path.read_bytes() for path in sources))
    folder = find_cache_folder() / f"rehearsal-{digest.hexdigest()[:16]}"
    if not (folder / NAME).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            unanswered = Path(aside) / "unanswered.cpp"
            unanswered.write_text(_unanswered())
            _compile([MANAGEMENT], Path(aside) / MANAGEMENT_NAME)
            _compile([*SOURCES, unanswered], Path(aside) / NAME)
            folder.mkdir(exist_ok=True)
            for name in (MANAGEMENT_NAME, NAME):
                os.replace(Path(aside) / name, folder / name)
    return [folder / NAME, folder / MANAGEMENT_NAME]


def environment(gpu: str, devices: int) -> dict[str, str]:
    """Return the environment variables that make a process see the no-op CUDA.

    Args:
        gpu: the kind of card, a key of `GPUS`.
        devices: number of cards that the process sees.

    Raises:
        ToolError: the libraries cannot be built.
    """
    card, built = GPUS[gpu], build_libraries()
    return {
        "LD_PRELOAD": ":".join(map(str, built)),
        "REHEARSAL_CARD": card.title,
        "REHEARSAL_CAPABILITY": card.capability,
        "REHEARSAL_MULTIPROCESSORS": str(card.multiprocessors),
        "REHEARSAL_DEVICES": str(devices),
        "REHEARSAL_GIB": str(card.memory - CONTEXT),
        "TRITON_LIBCUDA_PATH": str(built[0].parent),
        "TRITON_CACHE_DIR": str(find_cache_folder() / "triton"),
        "TRITON_INTERPRET": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }


def _compile(sources: list[Path], output: Path) -> None:
    command = [_compiler(), "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-Wl,-soname,{output.name}"]
    command += [f"-I{path}" for path in _include_folders()]
    result = subprocess.run([*command, *map(str, sources), "-o", str(output), "-ldl"], capture_output=True, text=True)
    if result.returncode:
        raise ToolError(f"The no-op CUDA cannot be built:\n{result.stderr[-3000:]}")


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (compiler := shutil.which(name)):
            return compiler
    raise ToolError("A rehearsal needs a C++ compiler: install g++.")


def _include_folders() -> list[Path]:
    """Return the folders of CUDA's headers: PyPI's (torch brings no crt, and not always CCCL), then the toolkit's."""
    nvidia = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    folders = [*sorted({path.parent for path in nvidia.glob("*/include/*.h")}), toolkit, toolkit / "cccl"]
    needed = {"crt/host_defines.h": "nvidia-cuda-crt", "nv/target": "nvidia-cuda-cccl"}
    missing = [name for file, name in needed.items() if not any((path / file).exists() for path in folders)]
    if missing:
        words = " ".join(f"'{name}=={torch.version.cuda}.*'" for name in missing)
        raise ToolError(f"A rehearsal needs CUDA's headers: pip install {words}, next to PyTorch from PyPI.")
    return folders


def _unanswered() -> str:
    """Return C++ for every symbol that PyTorch and Triton need and that no source here defines."""
    major, minor = map(int, str(torch.version.cuda).split(".")[:2])
    bodies = dict.fromkeys(_imported() - REAL, "() { return 0; }")
    bodies |= {name: body for body, names in ANSWERS.items() for name in names.split()}
    answered = {name for path in SOURCES for name in re.findall(r"^ANSWER\(.+?\)\s*(\w+)\(", path.read_text(), re.M)}
    lines = ['extern "C" void rehearsal_launched();', 'extern "C" void* rehearsal_handle();']
    lines.append(f"#define CUDA {1000 * major + 10 * minor}")
    lines.append('#define ANSWER extern "C" __attribute__((visibility("default")))')
    lines += [f"ANSWER int {name}{bodies[name]}" for name in sorted(bodies.keys() - answered)]
    return "\n".join(lines) + "\n"


def _imported() -> set[str]:
    """Return the symbols of CUDA's family that PyTorch's libraries and Triton need from other libraries."""
    names = set(re.findall(r"\bcu[A-Z]\w*(?=\()", TRITON.read_text())) if TRITON.exists() else set()
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*.so")):
        command = ["nm", "-D", "--undefined-only", "--without-symbol-versions", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ToolError(f"nm, of the package binutils, cannot read {path}: {result.stderr[:300]}")
        names |= {line.split()[-1] for line in result.stdout.splitlines()}
    return {name for name in names if FAMILY.fullmatch(name)}
