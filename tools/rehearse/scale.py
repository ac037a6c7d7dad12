"""Rehearse a ReMoE of 30B parameters on 64, 512 and 4096 GPUs; writes docs/scale.md.

python tools/rehearse/scale.py             all layouts; finished rehearsals in runs/scale are not repeated
python tools/rehearse/scale.py --write     and put the table into docs/scale.md
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.files import write_between  # noqa: E402
from tools.common.places import ROOT  # noqa: E402

# 48 layers, hidden 2048, 128 experts of 768, k = 8: about 30B parameters, of which 3B are active.
MODEL = """
--num-layers 48 --hidden-size 2048 --num-attention-heads 32 --group-query-attention --num-query-groups 4
--kv-channels 128 --ffn-hidden-size 6144 --moe-ffn-hidden-size 768 --num-experts 128 --moe-router-topk 8
--seq-length 4096 --max-position-embeddings 4096 --normalization RMSNorm --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --position-embedding-type rope --rotary-base 1000000 --attention-dropout 0
--hidden-dropout 0 --init-method-std 0.02 --make-vocab-size-divisible-by 1024 --tokenizer-type NullTokenizer
--vocab-size 151643 --micro-batch-size 1 --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --clip-grad 1.0
--moe-relu-routing --moe-token-dispatcher-type alltoall --bf16 --use-distributed-optimizer --overlap-grad-reduce
--overlap-param-gather --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-rope-fusion
""".split()
MICRO_BATCHES = 4  # of each pipeline
BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"


@dataclass(frozen=True)
class Layout:
    """How the model is split; the rest is data parallelism."""

    ep: int
    pp: int = 1
    tp: int = 1
    recompute: bool = False

    @property
    def title(self) -> str:
        """In words."""
        parts = [f"TP{self.tp} + SP"] * (self.tp > 1) + [f"PP{self.pp}"] * (self.pp > 1) + [f"EP{self.ep}"]
        return " x ".join(parts) + (", full recompute" if self.recompute else "")

    def flags(self, gpus: int) -> list[str]:
        """Return Megatron's flags for so many GPUs."""
        words = f"--tensor-model-parallel-size {self.tp} --pipeline-model-parallel-size {self.pp} "
        words += f"--expert-model-parallel-size {self.ep} --expert-tensor-parallel-size 1 "
        words += f"--global-batch-size {MICRO_BATCHES * gpus // (self.tp * self.pp)}"
        found = words.split() + ["--sequence-parallel"] * (self.tp > 1)
        if self.recompute:
            found += "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
        return found


LAYOUTS = {
    64: (Layout(ep=8), Layout(ep=8, recompute=True), Layout(ep=8, pp=4)),
    512: (Layout(ep=8, recompute=True), Layout(ep=8, pp=4), Layout(ep=32, pp=2)),
    4096: (Layout(ep=8, pp=4), Layout(ep=32, pp=2), Layout(ep=16, pp=4, tp=2)),
}


def rehearse(gpus: int, layout: Layout, folder: Path) -> dict[str, Any]:
    """Return the figures of a rehearsal, made now or earlier."""
    path = folder / f"{gpus}-{layout.title.replace(' ', '')}.json"
    if not path.exists():
        tool = [sys.executable, str(ROOT / "tools" / "rehearse"), "--gpus", str(gpus), "--json", str(path), "--"]
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        if layout.tp > 1:
            environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as the launch scripts set it
        subprocess.run([*tool, *MODEL, *layout.flags(gpus)], stdout=subprocess.DEVNULL, env=environment)
    return json.loads(path.read_text())


def row(gpus: int, layout: Layout, found: dict[str, Any]) -> str:
    """Return a row of the table."""
    if not found["starts"]:
        words = (found["error"] or "").splitlines()[0]
        return f"| {gpus} | {layout.title} | no: {words[:120]} | | | | |"
    memory = ", ".join(
        f"{name} {stage['peak_allocated_gib']:.1f} ({stage['peak_reserved_gib']:.1f})"
        for name, stage in found["stages"].items()
    )
    work = found["roofline"]["seconds"]
    sent = sum(one["seconds"] for one in found["collectives"])
    largest = found["collectives"][0]
    bound = "the GPU" if work > sent else f"{largest['kind']}, {largest['group']}"
    alone, hidden = (found["roofline"]["mfu"] * work / seconds for seconds in (work + sent, max(work, sent)))
    return (
        f"| {gpus} | {layout.title} | {found['kind']}: {memory} | {work:.2f} | {sent:.2f} | {bound} | "
        f"{alone:.0%} to {hidden:.0%} |"
    )


def main() -> int:
    """Rehearse what is missing, print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "scale", help="default: runs/scale")
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    head = "| GPUs | layout | GiB allocated (reserved) at most | GPU, s | links, s | longer | MFU |"
    rows = [head, "|---|---|---|---:|---:|---|---:|"]
    for gpus in options.gpus:
        for layout in LAYOUTS[gpus]:
            rows.append(row(gpus, layout, rehearse(gpus, layout, options.output_dir)))
            print(rows[-1], flush=True)
    if options.write:
        write_between(ROOT / "docs" / "scale.md", BEGIN, END, "\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
