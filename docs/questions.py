"""Remake the tables "Short questions" of experiments.md: python docs/questions.py [FOLDER] [SEED ...]

Trains and evaluates what is missing, and writes docs/questions/figures.json. On one core the three seeds take about
an hour and a half.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.common.figure_reader import read_figures  # noqa: E402
from tools.quickstart import dataset, models  # noqa: E402
from tools.recipes.models import Routing  # noqa: E402
from tools.sweep.plan import LOSS_FREE  # noqa: E402

STEPS, BRANCH = 1200, 800  # of a training; the step from which some continue
FINE_TUNING = "--train-iters 400 --lr 1e-3 --min-lr 1e-4 --pretrained-checkpoint {remoe}"
# λ = init · multiplier^n. With a multiplier this close to 1, λ is the init, whatever the n of the checkpoint.
FIXED = "--moe-relu-l1-reg-coeff-multiplier 1.000000001 --moe-relu-l1-reg-coeff-init"
CONTINUED = f"--load {{remoe}} --ckpt-step {BRANCH} --allow-changed-settings"
# training: routing, experts, text, flags with {remoe}, the ReMoE's checkpoints, and {at_N}, its λ at step N.
TRAININGS = {
    "remoe": ("remoe", 8, dataset.MIXED, ""),
    "continued-frozen": ("remoe", 8, dataset.MIXED, f"{CONTINUED} {FIXED} {{at_{BRANCH}}}"),
    "continued-zero": ("remoe", 8, dataset.MIXED, f"{CONTINUED} {FIXED} 1e-30"),
    "continued-floor": ("remoe", 8, dataset.MIXED, f"{CONTINUED} --moe-relu-layer-floor 0.8"),
    "tuned-live": ("remoe", 8, dataset.TECHNICAL, FINE_TUNING),
    "tuned-frozen": ("remoe", 8, dataset.TECHNICAL, f"{FINE_TUNING} {FIXED} {{at_{STEPS}}}"),
    "moe": ("moe", 8, dataset.MIXED, ""),
    "moe-lossfree": ("moe", 8, dataset.MIXED, LOSS_FREE),
    "tuned-zero": ("remoe", 8, dataset.TECHNICAL, f"{FINE_TUNING} {FIXED} 1e-30"),
    "remoe-32": ("remoe", 32, dataset.MIXED, ""),
}
ANALYZED = ("remoe", "moe", "moe-lossfree", "remoe-32")
CAPPED = ("remoe", "remoe-32")


def run(folder: Path, done: str, *words: str) -> None:
    """Run a command with its output in a file, unless a file of an earlier run says that it is done."""
    if (folder / done).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{done}.log").open("w") as log:
        subprocess.run([sys.executable, *words], check=True, stdout=log, stderr=log, cwd=ROOT,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    (folder / done).touch()


def lambda_at(folder: Path, step: int) -> float:
    """Return λ around a step, which moves by a factor of 4 up and down: its geometric mean over the last 200 steps."""
    steps, values = read_figures(folder).curve("l1_coefficient")
    return geometric_mean(values[(step - 200 < steps) & (steps <= step)].tolist())


def train(folder: Path, name: str, seed: int) -> Path:
    """Train and evaluate, and return the training's folder."""
    routing, experts, corpus, more = TRAININGS[name]
    runs = folder / f"seed-{seed}"
    text = dataset.make_text(folder / corpus, corpus, print)
    fields = {"remoe": runs / "remoe" / "checkpoints"}
    fields |= {f"at_{step}": lambda_at(runs / "remoe", step) for step in (BRANCH, STEPS) if f"at_{step}" in more}
    flags = [*models.common_flags(models.SIZE, STEPS, seed), *Routing(routing, experts).flags(models.SIZE.ffn)]
    flags += models.data_flags(text, json.loads((text / "manifest.json").read_text())["tokens"]["train"])
    flags += f"--save-interval 400 --save-retain-interval 400 --save {runs / name / 'checkpoints'}".split()
    run(runs / name, "trained", "pretrain_gpt.py", *flags, *more.format(**fields).split())
    held_out = [str(prefix.with_suffix("")) for prefix in sorted(text.glob("heldout_*.bin"))]
    both = ("--load", str(runs / name / "checkpoints"), "--data-path", *held_out)
    if name in ANALYZED:
        run(runs / name, "analyzed", "tools/analyze", *both, "--output-dir", str(runs / name / "analysis"))
    if name in CAPPED:
        caps = ("--max-experts-per-token", "1", "2", "3", "4", "--output", str(runs / name / "caps.json"))
        run(runs / name, "capped", "tools/evaluate", *both, *caps)
    return runs / name


def main() -> None:
    """Do what is missing."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/questions").resolve()
    seeds = list(map(int, sys.argv[2:])) or [1, 2, 3]
    for name in TRAININGS:
        for seed in seeds:
            train(folder, name, seed)


if __name__ == "__main__":
    main()
