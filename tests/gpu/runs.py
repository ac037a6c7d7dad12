"""Run the programs of the GPU tests in separate processes, on a GPU or on the no-op CUDA."""

import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.golden_run import EXACT, FLAGS, Figures, read_figures, write_data
from tests.scripts.launching import Launch
from tools.console.places import ROOT
from tools.plan.rehearse import rehearsal_flags
from tools.recipes.megatron_values import read_values
from tools.runs.log_reader import read_log

HERE = Path(__file__).parent
BENCHMARK = ROOT / "benchmarks" / "step.py"
SEQUENCES, LENGTH = 64, 1024  # a GPU's share of the paper's 512 sequences per step on 8 GPUs; tokens per sequence
# Weights hardly move, so routers stay at the target, which training reaches only after hundreds of steps.
AT_TARGET = "--lr 1e-7 --min-lr 0 --lr-warmup-fraction 0".split()
SHARES = {"dense": 0.5, "steady": 0.125}  # active share of the pairs, for the forecast and a rehearsal
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WARM_UP = 15  # steps: routers get their levels in the first four, then the memory pool and the clock settle
FUSED_FLAGS = [flag for flag in FLAGS if flag != "--no-local-layer-fusion"]  # the golden run with fused layers
# Flags for fp32 on a GPU: local layers, and no fusion that needs Apex or Transformer Engine.
FP32_GPU = """
--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-rope-fusion
""".split()


@dataclass(frozen=True)
class Machine:
    """A machine that runs programs.

    Attributes:
        folder: for temporary files.
        card: its name in CUDA.
        settings: environment variables for programs on the GPU.
    """

    folder: Path
    card: str
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def is_rehearsed(self) -> bool:
        """Return whether programs run on the no-op CUDA."""
        return self.card.endswith("(rehearsal)")

    def python(self, *words: object, share: float = 0.0, on_gpu: bool = True, limit: float = 240, **more: str) -> str:
        """Return a program's output; fail unless it exits with 0 within `limit` seconds (no limit in a rehearsal)."""
        # NGC's image rounds fp32 products to TF32.
        environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"} | (self.settings if on_gpu else {}) | more
        command = [*map(str, words)]
        if self.is_rehearsed and on_gpu:
            command = [str(HERE / "rehearsed.py"), str(share), *command]
        done = subprocess.run(
            [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", cwd=ROOT, env=environment, timeout=None if self.is_rehearsed else limit,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout


@dataclass(frozen=True)
class Case:
    """A launch script's training run on one GPU."""

    size: str = "182m"
    routing: str = "remoe"
    kernels: str = ""
    flags: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.size, self.routing, self.kernels or "torch", *(word.strip("-") for word in self.flags)]
        return "-".join(words)

    def planned(self, steps: int) -> tuple[dict[str, str], list[str]]:
        """Return the script's environment and flags, for `steps` steps on made-up tokens with nothing saved."""
        batch = ["--global-batch-size", str(SEQUENCES), "--micro-batch-size", "16"]
        settings = {"KERNELS": self.kernels, **self.settings}
        environment, flags = Launch(self.routing, (*batch, *self.flags), settings, self.size, gpus=1).plan()
        return environment, rehearsal_flags(flags, read_values(flags), steps)


def train_launched(machine: Machine, case: Case, stage: str, steps: int, limit: float = 240) -> dict[str, Any]:
    """Train a case; return the figures of its steps after `WARM_UP`, the memory and the forecast.

    In the stage "dense" routers begin with dense routing, in "steady" they stay at the target. "host_seconds" is the
    process's CPU time per step. A rehearsal takes at most ten steps, which is enough to measure memory.
    """
    steps = min(steps, 10) if machine.is_rehearsed else steps
    record = machine.folder / "record.json"
    environment, flags = case.planned(steps)
    more = AT_TARGET if stage == "steady" else []
    environment |= {"BENCHMARK_RECORD": str(record), "BENCHMARK_SHARE": str(SHARES[stage])}
    environment |= {"BENCHMARK_LOAD": "1"} if stage == "steady" else {}
    quiet = ["--log-interval", "10"]
    printed = machine.python(BENCHMARK, *flags, *more, *quiet, share=SHARES[stage], limit=limit, **environment)
    measured = json.loads(record.read_text())
    first = min(WARM_UP, len(measured["steps"]) - 1)
    seconds = statistics.median(measured["steps"][first:])
    return {
        "seconds": seconds,
        "host_seconds": statistics.median(measured["host"][first:]),
        "tokens_per_second": SEQUENCES * LENGTH / seconds,
        "active": statistics.mean(measured["active"][first:] or [0.0]),
        "peak_allocated_gib": (measured["held_bytes"] + measured["peak_bytes"]) / 2**30,
        "forecast_gib": measured["forecast"]["forecast_gib"]["now"],
        "flops": measured["forecast"]["step_flops"],
        "losses": [float(fields["lm loss"]) for fields in read_log(printed).values()],
    }


def profile(machine: Machine, case: Case, trace: Path) -> dict[str, Any]:
    """Save Megatron's profiler trace of two steps as `trace`; return its times, counts and attention kernels."""
    environment, flags = case.planned(WARM_UP + 4)
    start = f"--profile --use-pytorch-profiler --profile-step-start {WARM_UP} --profile-step-end {WARM_UP + 2}"
    place = ["--tensorboard-dir", str(machine.folder / "profile" / "tensorboard")]
    environment |= {"BENCHMARK_RECORD": str(machine.folder / "record.json"), "BENCHMARK_LOAD": "1"}
    machine.python(BENCHMARK, *flags, *AT_TARGET, *start.split(), *place, share=SHARES["steady"], **environment)
    shutil.move(machine.folder / "profile" / "torch_profile" / "rank-0.json.gz", trace)
    with gzip.open(trace) as file:
        events = [one for one in json.load(file)["traceEvents"] if "dur" in one]
    kernels = [one for one in events if one.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    waits = [one for one in events if one["name"] in WAITS]
    whole = max(one["ts"] + one["dur"] for one in events) - min(one["ts"] for one in events)
    return {
        "seconds": whole / 1e6,
        "kernel_seconds": sum(one["dur"] for one in kernels) / 1e6,
        "kernels": len(kernels),
        "waits": len(waits),
        "attention": sorted({one["name"] for one in kernels if "flash" in one["name"] or "attention" in one["name"]}),
    }


def train_golden(machine: Machine, name: str, flags: Sequence[str], more: Sequence[str] = ()) -> Figures:
    """Train the golden run's model in fp32 from weights that the CPU draws; return its figures until EXACT."""
    weights, text = machine.folder / f"{name}.pt", machine.folder / "text"
    if not text.with_suffix(".bin").exists():
        write_data(text)
    words = [HERE / "golden_entry.py", *flags, "--data-path", text, "--exit-interval", EXACT]
    if not weights.exists():
        machine.python(*words, "--cpu", on_gpu=False, OMP_NUM_THREADS="1", GOLDEN_WEIGHTS=str(weights))
    return read_figures(machine.python(*words, *FP32_GPU, *more, share=0.125, GOLDEN_WEIGHTS=str(weights)))
