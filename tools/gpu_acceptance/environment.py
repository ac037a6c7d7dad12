"""Prints as JSON what the machine has: card, driver, versions, what is missing, and two rates of the card."""

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "benchmarks")

import torch  # noqa: E402
from timed_entry import matmul_peak, seconds_on_gpu  # noqa: E402

VERSIONS = ("torch", "triton", "numpy", "megatron-core", "transformer-engine")
# Modules that a part does without, and what is left out then.
OPTIONAL = {
    "pytest": "part tests",
    "psutil": "saving checkpoints, which no part does",
    "rich": "bars and tables of the benchmarks, which are plain then",
    "transformers": "its peers in part layer",
    "scattermoe": "its peer in part layer",
    "megablocks": "its peer in part layer",
    "sonicmoe": "its peer in part layer",
}
COPIED = 2**31  # bytes


def driver() -> str | None:
    """Of nvidia-smi; None where it does not answer."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return None
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return lines[0] if lines else None


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def copy_rate() -> float:
    """TB/s of a copy within the card's memory, bytes read and written."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * COPIED / seconds_on_gpu(lambda: target.copy_(source)) / 1e12


def found() -> dict[str, Any]:
    """All of it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "compiler": shutil.which("gcc") or shutil.which("clang"),
        "missing": {name: what for name, what in OPTIONAL.items() if importlib.util.find_spec(name) is None},
        "bf16_tflops": matmul_peak(torch.bfloat16, "cuda") / 1e12,
        "copy_tb_per_second": copy_rate(),
    }


if __name__ == "__main__":
    print(json.dumps(found()))
