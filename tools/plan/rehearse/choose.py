"""Rehearse the paper's models with several micro-batches and EP, for the tables of DRY_RUN=1 and docs/performance.md.

python tools/plan/rehearse/choose.py                        the three sizes on 8 x H100
python tools/plan/rehearse/choose.py --size 182m --gpu a100 --micro-batch 8 16 --ep 1 --kernels triton
"""

import argparse
import datetime
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])

from megatron.remoe.files.files import write_text  # noqa: E402
from tools.plan.cost.choices import FILE  # noqa: E402
from tools.plan.rehearse.cards import CARDS  # noqa: E402
from tools.plan.rehearse.scripts import PLAIN, Launch  # noqa: E402
from tools.recipes.models import Training  # noqa: E402

MICRO_BATCHES = {"182m": (16, 32, 64), "469m": (8, 16, 32), "978m": (4, 8, 16)}
BATCH = Training().global_batch
COLUMNS = "model, kernels, micro-batch, EP | launches of a forward layer | of a step | GB | host, ms | GPU, ms"
HEAD = f"| {COLUMNS} | with host waits, ms | collectives, ms | MFU, with host waits | MFU, GPU never waiting |"


def whole_step(launch: Launch, micro_batch: int) -> dict[str, float] | None:
    """Rehearse a step of `BATCH` sequences, data parallel over all GPUs, in micro-batches of so many.

    Returns:
        None if it does not fit. Launches of a forward "layer" and all "launches"; "bytes" that the step moves; "gib",
        the most that PyTorch reserves in any stage. Seconds: "gpu" and "host" of their work, "stands" of the step with
        host waits (see `roofline.step_seconds`), "collectives" one after another. "mfu" with host waits, "free_mfu"
        with a GPU that never waits, both with all collectives.

    Raises:
        SystemExit: it does not start for another reason.
    """
    sizes = ("--micro-batch-size", str(micro_batch), "--global-batch-size", str(BATCH))
    found = replace(launch, flags=(*launch.flags, *sizes)).rehearse()
    if not found["starts"]:
        if "out of memory" in found["error"]:
            return None
        raise SystemExit(f"{launch}, micro-batch {micro_batch}: {found['error']}")
    work, collectives = found["roofline"], sum(one["seconds"] for one in found["collectives"])
    step = {"layer": found["launches"]["forward_layer"] or 0, "launches": found["launches"]["step"]}
    step |= {"gib": max(peaks["peak_reserved_gib"] for peaks in found["stages"].values()), "bytes": work["bytes"]}
    step |= {"gpu": work["seconds"], "host": work["host_seconds"], "stands": work["stands_seconds"]}
    ideal = work["mfu"] * work["seconds"]  # at the card's rate
    for name, seconds in (("mfu", step["stands"]), ("free_mfu", step["gpu"])):
        step[name] = ideal / (seconds + collectives)
    return step | {"collectives": collectives}


def line(title: str, step: dict[str, float] | None) -> str:
    """Return a row of docs/performance.md."""
    if step is None:
        return f"| {title} | does not fit |" + " |" * 8
    numbers = [f"{one:,.0f}" for one in (step["layer"], step["launches"], step["bytes"] / 1e9)]
    numbers += [f"{step[name] * 1e3:,.0f}" for name in ("host", "gpu", "stands", "collectives")]
    return f"| {title} | {' | '.join(numbers)} | {step['mfu']:.1%} | {step['free_mfu']:.1%} |"


def keep(key: dict[str, Any], made: str, step: dict[str, float] | None) -> None:
    """Put a row into the file of DRY_RUN=1, in place of an earlier one; its MFU is 0 if the launch does not fit."""
    step = step or dict.fromkeys(("gib", "stands", "host", "collectives", "mfu", "free_mfu"), 0.0)
    row = key | {
        "made": made,
        "gib": round(step["gib"], 2),
        "ms": round(1e3 * (step["stands"] + step["collectives"]), 1),
    }
    row |= {f"{name}_ms": round(1e3 * step[name], 1) for name in ("host", "collectives")}
    row |= {name: round(step[name], 4) for name in ("mfu", "free_mfu")}
    others = [other for other in json.loads(FILE.read_text(encoding="utf-8")) if not key.items() <= other.items()]
    rows = sorted([*others, row], key=lambda row: (row["gpu"], row["size"], row["kernels"], -row["mfu"]))
    write_text(FILE, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def main() -> int:
    """Rehearse, print a table, and put the rows of ReMoE into the file of DRY_RUN=1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=MICRO_BATCHES, default=list(MICRO_BATCHES), help="default: all")
    parser.add_argument("--routing", nargs="+", choices=("remoe", "moe"), default=["remoe"], help="default: remoe")
    parser.add_argument("--granularity", type=int, default=1, metavar="G", help="default: 1")
    parser.add_argument("--micro-batch", type=int, nargs="+", help="default: three for each size")
    parser.add_argument("--ep", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--gpu", choices=CARDS, default="h100", help="default: h100")
    parser.add_argument("--kernels", choices=("torch", "triton", "quack"), default="torch", help="default: torch")
    options = parser.parse_args()
    print("\n".join([HEAD, "|---|" + "---:|" * 9]))
    made, kernels = f"{datetime.date.today()}, torch {torch.__version__}", options.kernels
    for size, routing, ep in itertools.product(options.size, options.routing, options.ep):
        settings = {"EP": str(ep), "GPU": options.gpu, "KERNELS": "" if kernels == "torch" else "triton"}
        flags = (*PLAIN, "--moe-granularity", str(options.granularity), "--moe-kernels", kernels)
        launch = Launch(routing, flags, settings, size)
        fits = True
        for micro_batch in sorted(options.micro_batch or MICRO_BATCHES[size]):
            step = whole_step(launch, micro_batch) if fits else None
            fits = step is not None
            if routing == "remoe" and options.granularity == 1:
                key = {"gpu": options.gpu, "size": size, "kernels": kernels, "micro_batch": micro_batch, "ep": ep}
                keep(key, made, step)
            fine = f", G = {options.granularity}" * (options.granularity > 1)
            print(line(f"{size.upper()} {routing}{fine}, {kernels}, {micro_batch}, {ep}", step), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
