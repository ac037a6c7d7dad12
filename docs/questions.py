"""Answer the short questions of docs/experiments.md: python docs/questions.py [FOLDER] [SEED ...]

Train and evaluate what is missing, write docs/questions/figures.json and print the tables. On one idle core the three
seeds take about an hour.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.remoe.start.checkpoint_files import newest_iteration  # noqa: E402
from tools.console.files import write_json  # noqa: E402
from tools.console.flags import without  # noqa: E402
from tools.experiments.sweep.plan import LOSS_FREE  # noqa: E402
from tools.recipes import tiny  # noqa: E402
from tools.recipes.models import Routing  # noqa: E402
from tools.runs.figure_reader import read_figures  # noqa: E402
from tools.text.corpora import dataset  # noqa: E402

STEPS, BRANCH = 1200, 800  # steps of a training; the step from which some continue
FINE_TUNING = "--train-iters 200 --lr 1e-3 --min-lr 1e-4 --eval-iters 20 --pretrained-checkpoint {remoe}"
# λ = init · multiplier^n. With a multiplier this close to 1, λ is the init, whatever the n of the checkpoint.
FIXED = "--moe-relu-l1-reg-coeff-multiplier 1.000000001 --moe-relu-l1-reg-coeff-init"
CONTINUED = f"--load {{remoe}} --ckpt-step {BRANCH} --allow-changed-settings"
# training: routing, text, flags with {remoe}, the ReMoE's checkpoints, and {at_N}, its λ at step N.
TRAININGS = {
    "remoe": ("remoe", dataset.MIXED, ""),
    "layer-targets": ("remoe", dataset.MIXED, ""),
    "continued-frozen": ("remoe", dataset.MIXED, f"{CONTINUED} {FIXED} {{at_{BRANCH}}}"),
    "continued-zero": ("remoe", dataset.MIXED, f"{CONTINUED} {FIXED} 1e-30"),
    "continued-floor": ("remoe", dataset.MIXED, f"{CONTINUED} --moe-relu-layer-floor 0.8"),
    "tuned-live": ("remoe", dataset.TECHNICAL, FINE_TUNING),
    "tuned-frozen": ("remoe", dataset.TECHNICAL, f"{FINE_TUNING} {FIXED} {{at_{STEPS}}}"),
    "moe": ("moe", dataset.MIXED, ""),
    "moe-lossfree": ("moe", dataset.MIXED, LOSS_FREE),
}
PROGRAMS = {"layer-targets": "docs/layer_targets.py"}  # others: pretrain_gpt.py
ANALYZED = ("remoe", "layer-targets", "moe", "moe-lossfree", "continued-floor")
RANKS = (2, 4, 8)
BINS = ((0, 1), (2, 2), (3, 3), (4, 16))  # experts of a token in both layers


def run(folder: Path, done: str, *words: str) -> None:
    """Run a command with its output in a file, unless a file of an earlier run says that it is done."""
    if (folder / done).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{done}.log").open("a") as log:
        subprocess.run([sys.executable, *words], check=True, stdout=log, stderr=log, cwd=ROOT,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    (folder / done).touch()


def lambda_at(folder: Path, step: int) -> float:
    """Return λ around a step, which moves by a factor of 4 up and down: its geometric mean over the last 200 steps."""
    steps, values = read_figures(folder).curve("l1_coefficient")
    return geometric_mean(values[(step - 200 < steps) & (steps <= step)].tolist())


def train(folder: Path, name: str, seed: int) -> Path:
    """Train and evaluate; return the training's folder."""
    routing, corpus, more = TRAININGS[name]
    runs = folder / f"seed-{seed}"
    text = dataset.make_text(folder / corpus, corpus, print)
    fields = {"remoe": runs / "remoe" / "checkpoints"}
    fields |= {f"at_{step}": lambda_at(runs / "remoe", step) for step in (BRANCH, STEPS) if f"at_{step}" in more}
    flags = [*tiny.common_flags(tiny.SIZE, STEPS, seed), *Routing(routing).flags(tiny.SIZE.ffn)]
    flags += dataset.data_flags(text, json.loads((text / "manifest.json").read_text())["tokens"]["train"])
    if corpus == dataset.TECHNICAL:  # its held-out text is long: evaluate a part
        left_out = ("--multiple-validation-sets", "--full-validation", "--validation-set-names")
        flags = without(flags, left_out.__contains__)
    own, words = runs / name / "checkpoints", more.format(**fields).split()
    flags += f"--save-interval 400 --save-retain-interval 400 --save {own} --load {own}".split()
    if newest_iteration(own):  # stopped earlier
        words = without(words, {"--load", "--ckpt-step"}.__contains__)
    run(runs / name, "trained", PROGRAMS.get(name, "pretrain_gpt.py"), *flags, *words)
    held_out = [str(prefix.with_suffix("")) for prefix in sorted(text.glob("heldout_*.bin"))]
    both = ("--load", str(own), "--data-path", *held_out)
    if name in ANALYZED:
        run(runs / name, "analyzed", "tools", "analyze", *both, "--output-dir", str(runs / name / "analysis"))
    if name == "remoe":
        caps = ("--max-experts-per-token", "1", "2", "3", "4", "--output", str(runs / name / "caps.json"))
        run(runs / name, "capped", "tools", "evaluate", *both, *caps)
    return runs / name


def figures(folder: Path) -> dict[str, Any]:
    """Return a training's figures.

    The loss of held-out text; experts per token by layer and the highest load of an expert, both of the last 100 steps;
    and what the analyses say. Loads are relative to an even one, and means of the layers.
    """
    run = read_figures(folder)
    found: dict[str, Any] = {"loss": run.validation_loss}
    if run.target_sparsity is not None:
        last = [*run.loads.values()][-5:]
        layers = run.layers["layer_sparsity"].items()
        found["experts"] = {layer: run.num_experts * (1 - fmean(curve.values[-5:])) for layer, curve in layers}
        found["load"] = fmean(max(load) / fmean(load) for layers in last for load in layers.values())
        found["lambda"] = lambda_at(folder, run.last)
    if (folder / "analyzed").exists():
        analyses = {path.stem: json.loads(path.read_text()) for path in (folder / "analysis").glob("*.json")}
        loads = [layer["relative_load"] for layer in analyses["balance"]["layers"].values()]
        found["ranks"] = {ranks: fmean(highest(load, ranks) for load in loads) for ranks in RANKS}
        found["none"] = [of["none"] for of in analyses["experts_per_token"]["layers"].values()]
        found["losses"] = analyses["losses"]
    if (folder / "capped").exists():
        [sets] = json.loads((folder / "caps.json").read_text())["text"].values()
        measured = [*sets.values()]
        found["caps"] = {
            cap: fmean([of[cap]["loss"] for of in measured], [of[cap]["tokens"] for of in measured])
            for cap in measured[0]
        }
    return found


def highest(load: list[float], ranks: int) -> float:
    """Return the highest load of neighbouring experts, whose mean load is 1."""
    size = len(load) // ranks
    return max(fmean(load[start : start + size]) for start in range(0, len(load), size))


def row(name: str, columns: list[list[float | None]], digits: int = 3) -> str:
    """Return a line of a table: mean and standard deviation over seeds of each column."""
    cells = [name]
    for values in ([value for value in column if value is not None] for column in columns):
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{fmean(values):.{digits}f}{spread}" if values else "")
    return f"| {' | '.join(cells)} |"


def show(found: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Print the tables."""
    for title, corpus in (("Continued", dataset.MIXED), ("Fine-tuned", dataset.TECHNICAL)):
        print(f"\n{title}: loss minus that with a live λ, experts per token in layers 1 and 2, highest load")
        live = found["remoe" if corpus == dataset.MIXED else "tuned-live"]
        for name, (routing, of, _) in TRAININGS.items():
            runs = found[name]
            if (routing, of) == ("remoe", corpus) and runs:
                apart = [each["loss"] - live[seed]["loss"] for seed, each in runs.items() if runs is not live]
                layers = [[each["experts"][layer] for each in runs.values()] for layer in (1, 2)]
                print(row(name, [apart, *layers, [each["load"] for each in runs.values()]]))
    print("\nLoss with at most K experts, minus that without a cap")
    caps = [each["caps"] for each in found["remoe"].values()]
    print(row("E = 8", [[of[cap] - of["none"] for of in caps] for cap in ("1", "2", "3", "4")], digits=4))
    print(f"\nHighest load of one of {', '.join(map(str, RANKS))} ranks")
    for name in ANALYZED:
        ranks = [each["ranks"] for each in found[name].values()]
        print(row(name, [[of[number] for of in ranks] for number in RANKS], digits=2))
    print("\nLoss of a token and of the next one by its experts in both layers; correlations")
    losses = [each["losses"] for each in found["remoe"].values()]
    for low, high in BINS:
        columns: list[list[float | None]] = [[], [], []]
        for of in losses:
            rows = [each for each in of["experts"] if low <= each["experts"] <= high]
            tokens = [each["tokens"] for each in rows]
            columns[0].append(sum(tokens) / sum(each["tokens"] for each in of["experts"]))
            for column, key in zip(columns[1:], ("own", "next"), strict=True):
                column.append(fmean([each[key] for each in rows], tokens) if rows else None)
        print(row(f"{low}–{high}", columns))
    print(row("r", [[], *([of["correlation"]["all"][key] for of in losses] for key in ("own", "next"))]))


def main() -> None:
    """Do what is missing, write the figures and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default="runs/questions")
    parser.add_argument("seeds", metavar="SEED", nargs="*", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in TRAININGS}
    for name in TRAININGS:
        for seed in given.seeds:
            found[name][seed] = figures(train(given.folder.resolve(), name, seed))
    write_json(ROOT / "docs" / "questions" / "figures.json", found)
    show(found)


if __name__ == "__main__":
    main()
