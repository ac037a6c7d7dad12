"""Remake the table "Fewer experts per token" of conversion.md: python docs/fewer_experts.py [FOLDER] [SEED ...]

Trains a top-k model with 4 of 16 experts per token, then continues it with 2 in several ways, on the quickstart's text.
A training that is complete is not repeated. On one core the three seeds take about half an hour.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.remoe.training.run_log import read_run_log  # noqa: E402
from tools.quickstart import corpora, corpus, dataset, models  # noqa: E402
from tools.recipes.models import Routing, Training  # noqa: E402

STEPS_BEFORE, STEPS = 800, 600
EXPERTS, BEFORE, AFTER = 16, 4, 2
SIZE = replace(models.SIZE, ffn=64)
LAMBDA = "--moe-relu-l1-reg-coeff-init 1e-2 --moe-relu-l1-reg-coeff-multiplier 1.05"
MOVING = f"--moe-relu-start-topk {BEFORE} --moe-relu-start-steps {STEPS // 3}"
# arm: experts per token, flags, whether it starts from the ReMoE that the source was converted into
ARMS = {
    "top-k, 2 experts, teacher": (AFTER, "--teacher {source}", False),
    "ReMoE, 2 experts, teacher": (AFTER, f"{LAMBDA} {MOVING} --teacher {{source}}", True),
    "top-k, 2 experts": (AFTER, "", False),
    "ReMoE, 2 experts": (AFTER, f"{LAMBDA} {MOVING}", True),
    "top-k, 4 experts, goes on": (BEFORE, "", False),
}


def flags(training: Training, routing: str, topk: int, seed: int, data: list[str]) -> list[str]:
    """Return Megatron's flags for a training."""
    kind = Routing(routing, EXPERTS, topk=topk).flags(SIZE.ffn)
    return [
        *("--cpu", *SIZE.layer_flags(routing), *SIZE.flags(), *training.flags(), *data),
        *(word for word in kind if word != "--moe-router-pre-softmax"),  # gates of a token add up to 1, as in Mixtral
        *f"--seed {seed} --num-workers 0 --no-create-attention-mask-in-dataloader --eval-interval {STEPS_BEFORE + 1} "
        "--multiple-validation-sets --full-validation --log-interval 20 --no-save-optim --save-interval 10000".split(),
    ]


def train(folder: Path, words: list[str]) -> None:
    """Run a training unless it is complete."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.log").open("w") as log:
        command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *words, "--save", str(folder / "checkpoints")]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (folder / "done").touch()


def figures(folder: Path) -> tuple[float, float | None, float | None]:
    """Return the loss of all held-out text in nats per byte; of the last 100 steps the experts per token and the KL."""
    records = list(read_run_log(folder / "checkpoints" / "metrics.jsonl"))
    sets = [record for record in records if record["kind"] == "validation"]
    loss = fmean((record["lm_loss"] for record in sets), [record["tokens"] for record in sets])
    last = [[record[name] for record in records if name in record][-5:] for name in ("sparsity", "teacher_kl")]
    sparsity, divergence = (fmean(values) if values else None for values in last)
    return loss, None if sparsity is None else EXPERTS * (1 - sparsity), divergence


def main() -> None:
    """Do what is missing, and print the table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fewer_experts").resolve()
    seeds = list(map(int, sys.argv[2:])) or [1, 2, 3]
    text = corpus.build(folder / "corpus", print, corpora.MIXED, corpora.CORPORA[corpora.MIXED]())
    made = dataset.build(folder / "data", folder / "corpus", text, 1)
    data = models.data_flags(folder / "data", made["tokens"]["train"])
    before = Training(STEPS_BEFORE, 16, 16, "4e-3", "4e-4", 0.95, 0.1)
    after = replace(before, iterations=STEPS, lr="1e-3", min_lr="1e-4")
    found: dict[str, list[tuple[float, float | None, float | None]]] = {}
    for seed in seeds:
        runs = folder / f"seed-{seed}"
        source, remoe = runs / "source" / "checkpoints", runs / "converted"
        train(runs / "source", flags(before, "moe", BEFORE, seed, data))
        found.setdefault(f"top-k, {BEFORE} experts, before", []).append(figures(runs / "source"))
        if not remoe.exists():
            command = f"tools/convert_checkpoint --load {source} --save {remoe} --moe-router-topk {AFTER} --seed {seed}"
            subprocess.run([sys.executable, *command.split()], check=True, cwd=ROOT)
        for name, (topk, more, converted) in ARMS.items():
            words = flags(after, "remoe" if converted else "moe", topk, seed + 100, data)
            words += ["--pretrained-checkpoint", str(remoe if converted else source)]
            run = runs / name.replace(" ", "-").replace(",", "")
            train(run, [*words, *more.format(source=source).split()])
            found.setdefault(name, []).append(figures(run))
    for name, results in found.items():
        rows = [[value for value in column if value is not None] for column in zip(*results, strict=True)]
        spread = f" ± {stdev(rows[0]):.4f}" if len(results) > 1 else ""
        cells = [", ".join(f"{value:.{digits}f}" for value in row) for row, digits in zip(rows, (3, 2, 4), strict=True)]
        print(f"| {name} | {cells[0]} | {fmean(rows[0]):.4f}{spread} | {cells[1]} | {cells[2]} |")


if __name__ == "__main__":
    main()
