"""The sweep started as a user does, and runs of it that were never trained."""

import os
import subprocess
import sys
from pathlib import Path

from tests.trainings import REPOSITORY, finish

FINAL = " on validation set"


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept |= {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DATA_PATH": "pile"}
    return subprocess.Popen(
        ["bash", str(REPOSITORY / "scripts" / "sweep.sh"), *arguments],
        cwd="/",  # it works from anywhere
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sweep(*arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
    return finish(start(*arguments, **environment), code)


def logged(iteration: int, train_iters: int, more: str = "", milliseconds: float = 100.0) -> str:
    return (
        f" [2026-01-01 00:00:00.000000] iteration {iteration:8d}/{train_iters:8d} | consumed samples: {4 * iteration} |"
        f" elapsed time per iteration (ms): {milliseconds} | learning rate: 1.0E-04 | global batch size:     4 |"
        f" lm loss: 5.5E+00 |{more} loss scale: 1.0 |\n"
    )


def evaluated(iteration: int, where: str, loss: float) -> str:
    return f" validation loss at iteration {iteration}{where} | lm loss value: {loss:.6E} | lm loss PPL: 2.5E+02 | \n"


def write_run(folder: Path, train_iters: int, log: str, more: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = "python -m torch.distributed.run --nproc-per-node 4 --nnodes 2 /there/pretrain_gpt.py --hidden-size 768"
    flags = f"--seq-length 64 --global-batch-size 4 --train-iters {train_iters} --split 969\\,30\\,1 {more}"
    (folder / "command.sh").write_text(f"{command} {flags}")
    (folder / "train.log").write_text(log)
