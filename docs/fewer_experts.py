"""Remake the table "Fewer experts per token" of conversion.md.

Trains a top-k model with 4 of 16 experts per token, then continues it with 2 in several ways, on the quickstart's text.
A training that is complete is not repeated. On one core the three seeds take about 50 minutes.
"""

import argparse
import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.models.on_cpu import megatron_on_cpu  # noqa: E402

megatron_on_cpu()

import torch  # noqa: E402
from questions import run  # noqa: E402

from tools.console.display import Display  # noqa: E402
from tools.models.checkpoints import find, load, save  # noqa: E402
from tools.models.convert.command import GENTLE, loss_of  # noqa: E402
from tools.models.convert.models import count_pairs, source_args  # noqa: E402
from tools.models.megatron_model import build, one_process  # noqa: E402
from tools.models.text import blend_of, sample  # noqa: E402
from tools.recipes import tiny  # noqa: E402
from tools.recipes.models import Routing, Training  # noqa: E402
from tools.runs.figure_reader import read_figures  # noqa: E402
from tools.text.corpora import dataset  # noqa: E402

STEPS_BEFORE = 800
EXPERTS, BEFORE, AFTER = 16, 4, 2
SIZE = replace(tiny.SIZE, ffn=64)
SOURCE, WITH_NULLS = "source/checkpoints", "with-null-experts"
REMOE, REMOE_OF_4 = "remoe-of-2-gates", "remoe-of-4-gates"  # the gates that the routers are fitted to
MOVING = f"--moe-relu-start-topk {BEFORE} --moe-relu-start-steps {{third}}"
NULLS = "--moe-baseline-router null_experts"
# arm: experts per token, flags, folder of the source or of what it was converted into
ARMS = {
    "top-k, 2 experts, teacher": (AFTER, "--teacher {source}", SOURCE),
    "ReMoE, 2 experts, teacher": (AFTER, f"{GENTLE} --teacher {{source}}", REMOE),
    "ReMoE, 4 to 2 experts, teacher": (AFTER, f"{GENTLE} {MOVING} --teacher {{source}}", REMOE_OF_4),
    "null experts, 2 experts, teacher": (AFTER, f"{NULLS} --teacher {{source}}", WITH_NULLS),
    "top-k, 2 experts": (AFTER, "", SOURCE),
    "ReMoE, 2 experts": (AFTER, GENTLE, REMOE),
    "ReMoE, 4 to 2 experts": (AFTER, f"{GENTLE} {MOVING}", REMOE_OF_4),
    "null experts, 2 experts": (AFTER, NULLS, WITH_NULLS),
    "top-k, 4 experts, continued": (BEFORE, "", SOURCE),
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


def add_null_experts(source: Path, output: Path, seed: int) -> None:
    """Convert a top-k model: null experts get a new router's random rows, as in the paper."""
    checkpoint = find(source, None)
    args = source_args(checkpoint.args)
    new_args = Namespace(**vars(args) | {"moe_baseline_router": "null_experts", "moe_router_topk": AFTER})
    with one_process(0):
        model, target = build(args), build(new_args)
        load(checkpoint, model)
        weights = model.state_dict()
        torch.manual_seed(seed)
        for name in [name for name in weights if name.endswith("mlp.router.weight")]:
            weights[name] = torch.cat([weights[name], SIZE.init_std * torch.randn(weights[name].shape)])
        target.load_state_dict(weights)
        save(target, new_args, output)


def experts_per_token(folder: Path) -> float:
    """Count a model's experts per token on its training text."""
    checkpoint = find(folder, None)
    args = source_args(checkpoint.args)
    with one_process(0):
        model = build(args)
        load(checkpoint, model)
        text = sample(blend_of(args, None), 256, args.seq_length, args.padded_vocab_size, 0)
        with count_pairs(model) as pairs:
            loss_of(model, text, Display())
    return EXPERTS * sum(active for active, _ in pairs) / sum(total for _, total in pairs)


def figures(folder: Path) -> tuple[float, float | None, float | None]:
    """Return the loss of all held-out text in nats per byte; of the last 100 steps the experts per token and the KL."""
    log = read_figures(folder)
    last = [log.curve(name).values[-5:] for name in ("sparsity", "teacher_kl")]
    sparsity, divergence = (float(values.mean()) if len(values) else None for values in last)
    experts = None if sparsity is None else EXPERTS * (1 - sparsity)
    assert log.validation_loss is not None, folder
    return log.validation_loss, experts_per_token(folder) if "null-experts" in folder.name else experts, divergence


def main() -> None:
    """Do what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    add("folder", nargs="?", type=Path, default=Path("runs/fewer_experts"), help=default)
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help=default)
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM", help="default: all")
    add("--steps", type=int, default=600, metavar="N", help=f"after the first {STEPS_BEFORE}; {default}")
    add("--lr", type=float, default=1e-3, metavar="X", help=f"of these steps; it falls to a tenth; {default}")
    add("--lr-warmup-fraction", default="0.01", metavar="X", help=default)
    given = parser.parse_args()
    folder = given.folder.resolve()
    text = dataset.make_text(folder, dataset.MIXED, print)
    data = dataset.data_flags(text, json.loads((text / "manifest.json").read_text())["tokens"]["train"])
    before = Training(STEPS_BEFORE, 16, 16, "4e-3", "4e-4", 0.95, 0.1)
    after = replace(before, iterations=given.steps, lr=f"{given.lr:g}", min_lr=f"{given.lr / 10:g}")
    settings = f"{given.steps}-steps-lr-{given.lr:g}-warmup-{given.lr_warmup_fraction}"
    found: dict[str, list[tuple[float, float | None, float | None]]] = {}
    for seed in given.seeds:
        runs = folder / f"seed-{seed}"
        source = runs / SOURCE
        words = flags(before, "moe", BEFORE, seed, data)
        run(runs / "source", "done", "pretrain_gpt.py", *words, "--save", str(runs / SOURCE))
        found.setdefault(f"top-k, {BEFORE} experts, before", []).append(figures(runs / "source"))
        starts = {ARMS[name][2] for name in given.arms}
        for output, topk in ((REMOE, AFTER), (REMOE_OF_4, BEFORE)):
            if output in starts and not (runs / output).exists():
                command = f"remoe convert --load {source} --save {runs / output} --moe-router-topk {topk}"
                subprocess.run([sys.executable, *command.split(), "--seed", str(seed)], check=True, cwd=ROOT)
        if WITH_NULLS in starts and not (runs / WITH_NULLS).exists():
            add_null_experts(source, runs / WITH_NULLS, seed)
        for name in given.arms:
            topk, more, start = ARMS[name]
            words = flags(after, "remoe" if start in (REMOE, REMOE_OF_4) else "moe", topk, seed + 100, data)
            words += ["--pretrained-checkpoint", str(runs / start)]
            words[words.index("--lr-warmup-fraction") + 1] = given.lr_warmup_fraction
            place = runs / settings / name.replace(" ", "-").replace(",", "")
            words += [*more.format(source=source, third=given.steps // 3).split(), "--save", str(place / "checkpoints")]
            run(place, "done", "pretrain_gpt.py", *words)
            found.setdefault(name, []).append(figures(place))
    for name, results in found.items():
        rows = [[value for value in column if value is not None] for column in zip(*results, strict=True)]
        spread = f" ± {stdev(rows[0]):.4f}" if len(results) > 1 else ""
        cells = [", ".join(f"{value:.{digits}f}" for value in row) for row, digits in zip(rows, (3, 2, 4), strict=True)]
        print(f"| {name} | {cells[0]} | {fmean(rows[0]):.4f}{spread} | {cells[1]} | {cells[2]} |")


if __name__ == "__main__":
    main()
