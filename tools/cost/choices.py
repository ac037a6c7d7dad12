"""The paper's models with several micro-batches and EP, as `python tools/rehearse/choose.py` rehearsed them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.remoe.data.files import write_text

FILE = Path(__file__).with_name("choices.json")


def name(gpu: str, gpus: int, size: str, kernels: str) -> str:
    """Return the key of a table in the file."""
    return f"{gpus} x {gpu}, {size}, {kernels}"


def read() -> dict[str, Any]:
    """Return for each name "made", when and how, and "rows", the best first."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def write(tables: dict[str, Any]) -> None:
    """Write the file, a row a line."""
    texts = [
        f'"{key}": {{"made": {json.dumps(table["made"])}, "rows": [\n'
        + ",\n".join(f" {json.dumps(row)}" for row in table["rows"])
        for key, table in sorted(tables.items())
    ]
    write_text(FILE, "{\n" + "\n]},\n".join(texts) + "\n]}\n}\n")


def lines(gpu: str, gpus: int, size: str, kernels: str) -> Iterator[str]:
    """Yield the table of a model of the paper, or the command that makes it."""
    table = read().get(name(gpu, gpus, size, kernels))
    if table is None:
        command = f"python tools/rehearse/choose.py --size {size} --gpu {gpu} --kernels {kernels}"
        yield f"Micro-batch and EP: not rehearsed for {gpus} x {gpu}" + (f"; {command} does it" if gpus == 8 else "")
        return
    yield f"Micro-batch and EP by rehearsals: {table['made']}. Modelled, not measured; collectives are not hidden"
    yield "  micro-batch  EP  GiB at most  ms a step  host  collectives  MFU as it stands  GPU never waiting"
    for row in table["rows"]:
        start = f"  {row['micro_batch']:>11}{row['ep']:>4}"
        figures = f"{row['gib']:>13.1f}{row['ms']:>11.0f}{row['host_ms']:>6.0f}{row['collectives_ms']:>13.0f}"
        figures += f"{row['mfu']:>18.1%}{row['free_mfu']:>19.1%}"
        yield f"{start}{figures}" if row["mfu"] else f"{start}  does not fit"
