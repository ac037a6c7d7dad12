"""Rehearse the paper's ReMoE models with several micro-batches and EP, for the table that DRY_RUN=1 shows.

python tools/rehearse/choose.py                        the three sizes on 8 x H100
python tools/rehearse/choose.py --size 182m --gpu a100 --micro-batch 8 16 --ep 1 --kernels triton
"""

import argparse
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.cost import choices  # noqa: E402
from tools.rehearse.cards import CARDS  # noqa: E402
from tools.rehearse.scripts import GPUS, PLAIN, Launch, whole_step  # noqa: E402

MICRO_BATCHES = {"182m": (16, 32, 64), "469m": (8, 16, 32), "978m": (4, 8, 16)}


def rows(size: str, micro_batches: list[int], options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Yield a row for each micro-batch and EP; MFU is 0 if it, or a smaller one, does not fit."""
    for ep in options.ep:
        fits = True
        for micro_batch in sorted(micro_batches):
            row = {"micro_batch": micro_batch, "ep": ep, "gib": 0.0, "ms": 0.0, "collectives_ms": 0.0, "mfu": 0.0}
            if fits:
                settings = {"EP": str(ep), "GPU": options.gpu, "KERNELS": options.kernels.removeprefix("torch")}
                step = whole_step(Launch(size=size, flags=PLAIN, settings=settings), micro_batch)
                if step.error and "out of memory" not in step.error:
                    raise SystemExit(f"{size}, micro-batch {micro_batch}, EP {ep}: {step.error}")
                fits = step.error is None
                row |= {"gib": round(step.peak_gib, 2), "mfu": round(step.mfu, 4)}
                row |= {"ms": round((step.seconds + step.collectives) * 1e3, 1)}
                row |= {"collectives_ms": round(step.collectives * 1e3, 1)}
            yield row


def keep(name: str, made: str, row: dict[str, float]) -> None:
    """Put a row into its table, in place of an earlier one."""
    tables = choices.read()
    others = tables.get(name, {"rows": []})["rows"]
    others = [other for other in others if (other["micro_batch"], other["ep"]) != (row["micro_batch"], row["ep"])]
    tables[name] = {"made": made, "rows": sorted([*others, row], key=lambda row: -row["mfu"])}
    choices.write(tables)


def main() -> int:
    """Rehearse, and put each row into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=MICRO_BATCHES, default=list(MICRO_BATCHES), help="default: all")
    parser.add_argument("--micro-batch", type=int, nargs="+", help="default: three around that of the script")
    parser.add_argument("--ep", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--gpu", choices=CARDS, default="h100", help="default: h100")
    parser.add_argument("--kernels", choices=("torch", "triton"), default="torch", help="default: torch")
    options = parser.parse_args()
    for size in options.size:
        made = f"{datetime.date.today()}, torch {torch.__version__}, {GPUS} x {options.gpu}, {options.kernels} kernels"
        for row in rows(size, options.micro_batch or list(MICRO_BATCHES[size]), options):
            keep(choices.name(options.gpu, GPUS, size, options.kernels), made, row)
            print(size, row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
