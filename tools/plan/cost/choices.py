"""Show rehearsals of the paper's models with several micro-batches and EP, from plan/rehearse/choose.py."""

import json
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("choices.json")  # rows for 8 GPUs, the best of a model first
GPUS = 8


def lines(gpu: str, gpus: int, size: str, kernels: str) -> Iterator[str]:
    """Yield the table of a model of the paper, or the command that makes it."""
    wanted = {"gpu": gpu, "size": size, "kernels": kernels}
    found = [row for row in json.loads(FILE.read_text(encoding="utf-8")) if wanted.items() <= row.items()]
    if gpus != GPUS or not found:
        remedy = ""
        if gpus == GPUS:
            remedy = f"; python tools/plan/rehearse/choose.py --size {size} --gpu {gpu} --kernels {kernels} does it"
        yield f"Micro-batch and EP: not rehearsed for {gpus} x {gpu}{remedy}"
        return
    made = f"{found[0]['made']}, {gpus} x {gpu}, {kernels} kernels"
    yield f"Micro-batch and EP by rehearsals: {made}. Modelled, not measured; collectives are not hidden"
    yield "  micro-batch  EP  GiB at most  ms a step  host  collectives  MFU with waits  GPU never waiting"
    for row in found:
        figures = "{gib:>13.1f}{ms:>11.0f}{host_ms:>6.0f}{collectives_ms:>13.0f}{mfu:>16.1%}{free_mfu:>19.1%}"
        figures = figures if row["mfu"] else "  does not fit"
        yield ("  {micro_batch:>11}{ep:>4}" + figures).format(**row)
