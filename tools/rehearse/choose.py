"""Rehearse the paper's models with several micro-batches and EP, for the tables of DRY_RUN=1 and docs/performance.md.

python tools/rehearse/choose.py                        the three sizes on 8 x H100
python tools/rehearse/choose.py --size 182m --gpu a100 --micro-batch 8 16 --ep 1 --kernels triton
"""

import argparse
import datetime
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.cost import choices  # noqa: E402
from tools.rehearse.cards import CARDS  # noqa: E402
from tools.rehearse.scripts import GPUS, PLAIN, Launch, Step, whole_step  # noqa: E402

MICRO_BATCHES = {"182m": (16, 32, 64), "469m": (8, 16, 32), "978m": (4, 8, 16)}
COLUMNS = "model, kernels, micro-batch, EP | launches of a forward layer | of a step | GB | host, ms | GPU, ms"
HEAD = f"| {COLUMNS} | as it stands, ms | collectives, ms | MFU, as it stands | MFU, GPU never waiting |"


def row(micro_batch: int, ep: int, step: Step) -> dict[str, float]:
    """Return a row of the table that DRY_RUN=1 shows; MFU is 0 if the launch does not fit."""
    ms = {"ms": step.stands + step.collectives, "host_ms": step.host, "collectives_ms": step.collectives}
    found = {"micro_batch": micro_batch, "ep": ep, "gib": round(step.peak_gib, 2)}
    found |= {name: round(seconds * 1e3, 1) for name, seconds in ms.items()}
    return found | {"mfu": round(step.mfu, 4), "free_mfu": round(step.free_mfu, 4)}


def line(title: str, step: Step) -> str:
    """Return a row of docs/performance.md."""
    if step.error is not None:
        return f"| {title} | does not fit |" + " |" * 8
    counts = [step.forward_layer or 0, step.launches, step.bytes / 1e9]
    seconds = [step.host, step.seconds, step.stands, step.collectives]
    numbers = [f"{one:,.0f}" for one in counts] + [f"{one * 1e3:,.0f}" for one in seconds]
    return f"| {title} | {' | '.join(numbers)} | {step.mfu:.1%} | {step.free_mfu:.1%} |"


def keep(name: str, made: str, row: dict[str, float]) -> None:
    """Put a row into its table, in place of an earlier one."""
    tables = choices.read()
    others = tables.get(name, {"rows": []})["rows"]
    others = [other for other in others if (other["micro_batch"], other["ep"]) != (row["micro_batch"], row["ep"])]
    tables[name] = {"made": made, "rows": sorted([*others, row], key=lambda row: -row["mfu"])}
    choices.write(tables)


def rehearse(size: str, routing: str, options: argparse.Namespace) -> None:
    """Rehearse one model, print its rows, and put those of ReMoE into the file."""
    made = f"{datetime.date.today()}, torch {torch.__version__}, {GPUS} x {options.gpu}, {options.kernels} kernels"
    for ep in options.ep:
        fits = True
        for micro_batch in sorted(options.micro_batch or MICRO_BATCHES[size]):
            settings = {"EP": str(ep), "GPU": options.gpu, "KERNELS": options.kernels.removeprefix("torch")}
            launch = Launch(routing, (*PLAIN, "--moe-granularity", str(options.granularity)), settings, size)
            step = whole_step(launch, micro_batch) if fits else Step("out of memory")
            if step.error and "out of memory" not in step.error:
                raise SystemExit(f"{size}, micro-batch {micro_batch}, EP {ep}: {step.error}")
            fits = step.error is None
            if routing == "remoe" and options.granularity == 1:
                keep(choices.name(options.gpu, GPUS, size, options.kernels), made, row(micro_batch, ep, step))
            fine = f", G = {options.granularity}" * (options.granularity > 1)
            print(line(f"{size.upper()} {routing}{fine}, {options.kernels}, {micro_batch}, {ep}", step), flush=True)


def main() -> int:
    """Rehearse, print a table, and put the rows of ReMoE into the file of DRY_RUN=1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=MICRO_BATCHES, default=list(MICRO_BATCHES), help="default: all")
    parser.add_argument("--routing", nargs="+", choices=("remoe", "moe"), default=["remoe"], help="default: remoe")
    parser.add_argument("--granularity", type=int, default=1, metavar="G", help="default: 1")
    parser.add_argument("--micro-batch", type=int, nargs="+", help="default: three around that of the script")
    parser.add_argument("--ep", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--gpu", choices=CARDS, default="h100", help="default: h100")
    parser.add_argument("--kernels", choices=("torch", "triton"), default="torch", help="default: torch")
    options = parser.parse_args()
    print("\n".join([HEAD, "|---|" + "---:|" * 9]))
    for size in options.size:
        for routing in options.routing:
            rehearse(size, routing, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
