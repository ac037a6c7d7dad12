"""Rehearse launches, waits, bytes and modelled time of the launch scripts by kernels; writes docs/performance.md.

python tools/rehearse/speed.py             all rows; finished rehearsals in runs/speed are not repeated
python tools/rehearse/speed.py --write     and put the table into docs/performance.md
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.files import write_between, write_json  # noqa: E402
from tools.common.places import ROOT  # noqa: E402
from tools.cost import choices  # noqa: E402
from tools.recipes.models import PAPER, Training  # noqa: E402
from tools.rehearse.scripts import GPUS, PLAIN, Launch, Step, whole_step  # noqa: E402

ROUTINGS = {"remoe": "ReMoE", "moe": "top-k"}
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


@dataclass(frozen=True)
class Row:
    """A launch script with these kernels and this micro-batch."""

    kernels: str
    launch: Launch
    micro_batch: int

    @property
    def title(self) -> str:
        """The first columns of its row."""
        model = f"{self.launch.size.upper()} {ROUTINGS[self.launch.routing]}"
        return f"{model} | {self.kernels} | {self.micro_batch}, {self.launch.settings.get('EP', '1')}"


def rows() -> Iterator[Row]:
    """Yield all rows: by kernels, and last with the best micro-batch and EP."""
    engines: dict[str, tuple[str, ...]] = {"": PLAIN}
    if importlib.util.find_spec("transformer_engine") is not None:
        engines |= {"Transformer Engine, ": ()}
    for size in PAPER:
        for routing in ROUTINGS:
            for engine, flags in engines.items():
                for kernels in ("torch", "triton"):
                    settings = {"KERNELS": kernels.removeprefix("torch")}
                    yield Row(f"{engine}{kernels}", Launch(routing, flags, settings, size), Training().micro_batch)
        if table := choices.read().get(choices.name("h100", GPUS, size, "triton")):
            best = table["rows"][0]
            settings = {"KERNELS": "triton", "EP": str(best["ep"])}
            yield Row("triton", Launch("remoe", PLAIN, settings, size), best["micro_batch"])


def figures(row: Row, folder: Path, only_finished: bool = False) -> Step | None:
    """Return the figures of a row, rehearsed now or earlier."""
    path = folder / f"{row.title.replace(' ', '').replace('|', '-')}.json"
    if only_finished and not path.exists():
        return None
    if not path.exists():
        write_json(path, dataclasses.asdict(whole_step(row.launch, row.micro_batch)))
    return Step(**json.loads(path.read_text(encoding="utf-8")))


def line(row: Row, step: Step) -> str:
    """Return a row of the table."""
    if step.error is not None:
        return f"| {row.title} | no: {step.error.splitlines()[0][:120]} | | | | |"
    counts = [step.forward_layer, step.launches]
    numbers = ["–" if count is None else f"{count:,.0f}" for count in counts]
    numbers += [f"{step.bytes / 1e9:,.0f}", f"{step.seconds * 1e3:,.0f}", f"{step.roofline_mfu:.1%}", f"{step.mfu:.1%}"]
    return f"| {row.title} | {' | '.join(numbers)} |"


def main() -> int:
    """Rehearse what is missing, print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "speed", help="default: runs/speed")
    parser.add_argument("--finished", action="store_true", help="use finished rehearsals only")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    titles = "model | kernels | micro-batch, EP | launches of a forward layer | of a step"
    table = [f"| {titles} | GB | ms | MFU | MFU, collectives counted |", "|---|---|---|" + "---:|" * 6]
    for row in rows():
        if (step := figures(row, options.output_dir, options.finished)) is not None:
            table.append(line(row, step))
            print(table[-1], flush=True)
    if options.write:
        write_between(ROOT / "docs" / "performance.md", BEGIN, END, "\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
