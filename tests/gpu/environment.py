"""Print the card, its driver, versions and two rates of the card as JSON."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, str(Path(sys.path[0]) / "benchmarks"))

import torch  # noqa: E402
from timed_entry import matmul_peak, seconds_of  # noqa: E402

VERSIONS = ("torch", "triton", "numpy", "megatron-core", "transformer-engine", "fla-core")
COPIED = 2**31  # bytes


def driver() -> str | None:
    """Return the version that nvidia-smi prints; None if it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return lines[0] if lines else None


def found() -> dict[str, Any]:
    """Return all figures; TFLOP/s of bf16 products, and TB/s of a copy, reads plus writes."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {one.name: one.version for one in importlib.metadata.distributions() if one.name in VERSIONS},
        "bf16_tflops": matmul_peak(torch.bfloat16, "cuda") / 1e12,
        "copy_tb_per_second": 2 * COPIED / seconds_of(lambda: target.copy_(source), "cuda") / 1e12,
    }


if __name__ == "__main__":
    print(json.dumps(found()))
