"""Measure a training step: ReMoE at its target sparsity, top-k, and top-k in Megatron's own local layers.

--variants adds the dense start, in which half of the experts are active: by default, without the activation limit, and
with at most four experts per token; and layers with three times the target's experts per token.

Each run is a new process, and the variants take turns. Figures are medians over all steps of a variant. The table also
has the share of the measured matmul rate (FLOPs count the experts that were active), and the memory of a step: the
most that PyTorch holds beyond weights, gradients and optimizer state.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from timed_entry import FIT_STEPS, ROOT, on_gpu

from megatron.remoe.files.indexed import IndexedWriter
from tools.console.files import write_json
from tools.console.markdown import table
from tools.recipes.hardware import PLAIN_PYTORCH
from tools.recipes.models import Routing, Size

SHAPES = {"(8, 1)": (8, 1), "(8, 8)": (8, 8), "(64, 1)": (64, 1)}  # E and G: E·G experts of size FFN / G, G active
# A GPT of the paper's kind, with few layers.
SIZE = Size(2, 768, 12, 2048, init_std=0.02, vocabulary_multiple=128)
MICRO_BATCH = 4
# Small, so that the output layer's share of the FLOPs (29 %) is near the 182M model's (24 %).
VOCABULARY = 8191
DOCUMENTS = 64
COMMON = f"""
--micro-batch-size {MICRO_BATCH} --global-batch-size {MICRO_BATCH} --vocab-size {VOCABULARY}
--tokenizer-type NullTokenizer --lr 1e-7 --lr-decay-style constant --clip-grad 1.0 --split 100,0,0 --eval-iters 0
--eval-interval 1000 --log-interval 1 --num-workers 0
""".split()
# Few log lines: each waits for the device.
GPU_FLAGS = [*PLAIN_PYTORCH, *"--bf16 --no-gradient-accumulation-fusion --no-rope-fusion --log-interval 1000".split()]
WARM_UP = FIT_STEPS + (10 if on_gpu() else 2)  # a GPU's memory pool and clock settle; a CPU profiles the memory
PACKAGES = ("torch", "megatron-core", "transformers", "numpy")


@dataclass(frozen=True)
class Variant:
    """A way to train: "remoe" or "moe", flags besides the shape's, and initial experts per token over k (or 0)."""

    name: str
    routing: str
    flags: tuple[str, ...] = ()
    load: float = 1


USUAL = (
    Variant("ReMoE", "remoe"),
    Variant("top-k", "moe"),
    Variant("top-k, Megatron's layers", "moe", ("--no-local-layer-fusion",)),
)
DENSE = (
    Variant("dense start", "remoe", load=0),
    Variant("dense start, no limit", "remoe", ("--moe-relu-activation-limit", "0"), load=0),
    Variant("dense start, four experts", "remoe", ("--moe-relu-max-experts", "4"), load=0),
    Variant("three times the target", "remoe", load=3),
    Variant("three times the target, no limit", "remoe", ("--moe-relu-activation-limit", "0"), load=3),
)
VARIANTS = {variant.name: variant for variant in (*USUAL, *DENSE)}


def write_data(prefix: Path) -> None:
    """Write random tokens, enough for every step."""
    length = MICRO_BATCH * SIZE.sequence
    tokens = numpy.random.default_rng(1).integers(0, VOCABULARY, DOCUMENTS * length).astype(numpy.uint16)
    with IndexedWriter(prefix, numpy.dtype(numpy.uint16)) as writer:
        writer.add(tokens, numpy.full(DOCUMENTS, length))
        writer.finish()
        writer.publish()


def run(shape: str, variant: Variant, steps: int, more: list[str]) -> dict[str, Any]:
    """Train for some steps and return the record of benchmarks/timed_entry.py.

    Raises:
        SystemExit: the run failed; the message is the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix, record = Path(folder) / "tokens", Path(folder) / "record.json"
        write_data(prefix)
        experts = Routing(variant.routing, *SHAPES[shape]).flags(SIZE.ffn)
        command = [sys.executable, str(ROOT / "benchmarks" / "timed_entry.py"), "--num-layers", str(SIZE.layers)]
        command += [*SIZE.flags(), *COMMON, *experts, *(GPU_FLAGS if on_gpu(more) else [])]
        command += ["--data-path", str(prefix), "--train-iters", str(steps), *variant.flags, *more]
        environment = os.environ | {"BENCHMARK_RECORD": str(record)}
        environment |= {"BENCHMARK_LOAD": str(variant.load)} if variant.load else {}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            raise SystemExit(f"{shape} {variant.name} failed:\n" + (result.stdout + result.stderr)[-3000:])
        return json.loads(record.read_text())


def measure(shape: str, variants: list[Variant], rounds: int, steps: int, more: list[str]) -> dict[str, Any]:
    """Return name of a variant → its figures. The variants' runs take turns."""
    records: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        for variant in variants[:: 1 if number % 2 == 0 else -1]:
            records[variant.name].append(run(shape, variant, WARM_UP + steps + 1, more))
            seconds = statistics.median(records[variant.name][-1]["steps"][WARM_UP:])
            line = f"{shape} round {number + 1}/{rounds} {variant.name}: {seconds:.4g} s a step"
            print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)
    figures, granularity = {}, SHAPES[shape][1]
    peak = max(record["peak_flops"] for runs in records.values() for record in runs)
    for name, runs in records.items():
        model = runs[0]["model"]
        seconds = statistics.median(seconds for record in runs for seconds in record["steps"][WARM_UP:])
        pairs = [active for record in runs for active in record["active"][WARM_UP + 1 :]]
        active = statistics.mean(pairs or [model["topk"]])
        flops = model["flops"] + (active - model["topk"]) * model["flops_per_expert"]
        figures[name] = {
            "seconds": seconds,
            "tokens_per_second": model["tokens"] / seconds,
            "active_experts_of_full_size": active / granularity,
            "utilization": flops / seconds / peak,
            "peak_bytes": max(record["peak_bytes"] for record in runs),
            "layers": model["layers"],
            "tokens": model["tokens"],
        }
    return figures


def machine() -> dict[str, Any]:
    """Return processor, cores and packages, and the GPUs with their driver if there are any."""
    model = platform.processor()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    packages = {each.name: each.version for each in importlib.metadata.distributions() if each.name in PACKAGES}
    facts: dict[str, Any] = {"processor": model, "cores": os.cpu_count(), **packages}
    if on_gpu():  # by nvidia-smi: PyTorch would hold the device in this process too
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["gpus"] = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return facts


def save(path: Path, results: dict[str, Any]) -> None:
    """Write figures with date, machine and command. Called after each shape, so that a stopped benchmark keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"date": time.strftime("%Y-%m-%d %H:%M"), "command": " ".join(sys.argv), "machine": machine()}
    write_json(path, head | {"results": results})


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    text, usual = f"{'; '.join(VARIANTS)} (default: the first {len(USUAL)})", [variant.name for variant in USUAL]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=usual, metavar="NAME", help=text)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run (default 6)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "step.json")
    parser.add_argument("more", nargs="*", help="more of Megatron's flags, after --")
    options = parser.parse_args()
    variants = [VARIANTS[name] for name in options.variants]
    results: dict[str, Any] = {}
    over = f"s/step over {variants[0].name}"
    columns = ["variant", "s/step", "tokens/s", over, "full-size experts/token", "of matmul rate", "MiB"]
    for shape in options.shapes:
        figures = results[shape] = measure(shape, variants, options.rounds, options.steps, options.more)
        save(options.output, results)
        first, rows = figures[variants[0].name], []
        for name, each in figures.items():
            ratios = (each["seconds"] / first["seconds"], each["active_experts_of_full_size"], each["utilization"])
            speed = (f"{each['seconds']:.3g}", f"{each['tokens_per_second']:,.0f}")
            rows.append([name, *speed, *map("{:.3g}".format, ratios), f"{each['peak_bytes'] / 2**20:,.0f}"])
        print(f"(E, G) = {shape}, {first['layers']} layers, {first['tokens']} tokens", "", sep="\n")
        print(*table(columns, rows, text=1), "", f"Figures: {options.output}", sep="\n")


if __name__ == "__main__":
    main()
