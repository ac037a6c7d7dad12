"""Define the measured models and their flags, and print and keep figures with their machine and command."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.console.files import write_json  # noqa: E402
from tools.console.markdown import table  # noqa: E402
from tools.recipes.hardware import PLAIN_PYTORCH  # noqa: E402
from tools.recipes.models import Routing, Size  # noqa: E402

# Steps that bring routers to the target. One batch is not enough: the tokens of a sequence have much in common.
FIT_STEPS = 4
COMMON = """
--tokenizer-type NullTokenizer --lr 1e-7 --lr-decay-style constant --clip-grad 1.0 --split 100,0,0 --eval-iters 0
--eval-interval 1000 --log-interval 1 --num-workers 0
""".split()
# Few log lines: each waits for the device.
GPU_FLAGS = [*PLAIN_PYTORCH, *"--bf16 --no-gradient-accumulation-fusion --no-rope-fusion --log-interval 1000".split()]


def on_gpu(words: Sequence[str] = ()) -> bool:
    """Return whether a training run with these flags runs on a GPU; the entry decides by the same rule."""
    return torch.cuda.is_available() and "--cpu" not in words


@dataclass(frozen=True)
class Shape:
    """A GPT of the paper's kind, with few layers.

    Attributes:
        experts, granularity: E and G; there are E·G experts of size ffn / G, of which G are active.
        vocabulary: small, so that the output layer's share of the FLOPs (29 %) is near the 182M model's (24 %).
    """

    experts: int
    granularity: int
    layers: int = 2
    hidden: int = 768
    ffn: int = 2048
    sequence: int = 1024
    micro_batch: int = 4
    vocabulary: int = 8191  # one more is the end of a document

    @property
    def name(self) -> str:
        """Return "(E, G)"."""
        return f"({self.experts}, {self.granularity})"

    @property
    def tokens(self) -> int:
        """Return the tokens of one step."""
        return self.micro_batch * self.sequence

    @property
    def size(self) -> Size:
        """Return the dimensions of the model."""
        return Size(
            self.layers, self.hidden, 12, self.ffn, sequence=self.sequence, init_std=0.02, vocabulary_multiple=128
        )

    def flags(self, routing: str) -> list[str]:
        """Return the run's flags, without data and number of steps."""
        batch = f"--micro-batch-size {self.micro_batch} --global-batch-size {self.micro_batch}".split()
        batch += ["--vocab-size", str(self.vocabulary)]
        experts = Routing(routing, self.experts, self.granularity).flags(self.ffn)
        return [*self.size.layer_flags(routing), *self.size.flags(), *COMMON, *batch, *experts]


PACKAGES = ("torch", "megatron-core", "transformers", "numpy")


def machine() -> dict[str, Any]:
    """Return processor, cores and packages, and the GPUs with their driver if there are any."""
    model = platform.processor()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    installed = {one.name: one.version for one in importlib.metadata.distributions() if one.name in PACKAGES}
    facts: dict[str, Any] = {"processor": model, "cores": os.cpu_count(), **installed}
    if on_gpu():  # by nvidia-smi: PyTorch would hold the device in this process too
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["gpus"] = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return facts


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
