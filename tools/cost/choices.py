"""Micro-batches and EP of the paper's models by rehearsals, as `python tools/rehearse/choose.py` wrote them down."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("choices.json")


def name(gpu: str, gpus: int, size: str, kernels: str) -> str:
    """The key of a table in the file."""
    return f"{gpus} x {gpu}, {size}, {kernels}"


def read() -> dict[str, Any]:
    """Name → "made" and "rows", the best first."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def lines(gpu: str, gpus: int, size: str, kernels: str) -> Iterator[str]:
    """The table of a model of the paper; which command makes it, where there is none."""
    table = read().get(name(gpu, gpus, size, kernels))
    if table is None:
        command = f"python tools/rehearse/choose.py --size {size} --gpu {gpu} --kernels {kernels}"
        yield f"Micro-batch and EP: not rehearsed for {gpus} x {gpu}" + (f"; {command} does it" if gpus == 8 else "")
        return
    yield f"Micro-batch and EP by rehearsals: {table['made']}. A model, no measurement; nothing hidden"
    yield "  micro-batch  EP  GiB at most  ms a step  of it collectives    MFU"
    for row in table["rows"]:
        start = f"  {row['micro_batch']:>11}{row['ep']:>4}"
        if row["mfu"]:
            yield f"{start}{row['gib']:>13.1f}{row['ms']:>11.0f}{row['collectives_ms']:>19.0f}{row['mfu']:>7.1%}"
        else:
            yield f"{start}  does not fit"
