"""Print and keep the figures of a benchmark, with its machine and command."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from models import ROOT, on_gpu

from tools.console.files import write_json
from tools.console.markdown import table

PACKAGES = ("torch", "megatron-core", "transformers", "numpy")


def machine() -> dict[str, Any]:
    """Return processor, cores and packages, and the GPUs with their driver if there are any."""
    model = platform.processor()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    installed = {one.name: one.version for one in importlib.metadata.distributions() if one.name in PACKAGES}
    found: dict[str, Any] = {"processor": model, "cores": os.cpu_count(), **installed}
    if on_gpu():  # by nvidia-smi: PyTorch would hold the device in this process too
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found["gpus"] = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return found


def note(line: str) -> None:
    """Print a line of progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def show(title: str, columns: Sequence[str], rows: Iterable[Iterable[Any]], path: Path) -> None:
    """Print a table, and where the figures are."""
    texts = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    print("\n".join([title, "", *table(columns, texts, text=1), "", f"Figures: {path}"]))


def save(path: Path, results: dict[str, Any]) -> None:
    """Write figures with date, machine and command; called after each case, so that a stopped run keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"date": time.strftime("%Y-%m-%d %H:%M"), "command": " ".join(sys.argv), "machine": machine()}
    write_json(path, json.loads(json.dumps(head | results, default=str)))


def default_output(name: str) -> Path:
    """Return the default file of a benchmark's figures."""
    return ROOT / "runs" / "benchmarks" / f"{name}.json"
