"""The benchmarks run and keep their figures, with models so small that the figures say nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainings import REPOSITORY

SMALL = """
-- --hidden-size 48 --ffn-hidden-size 64 --moe-ffn-hidden-size 64 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 2 --global-batch-size 2
""".split()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("step", ["--shapes", "(8, 8)", "--variants", "ReMoE", "--rounds", "1", "--steps", "2", *SMALL]),
        ("step", ["--memory", "16", *SMALL]),
        ("layer", "--tokens 64 --experts 4 --hidden 32 --ffn 16 --repetitions 1 --transformers eager".split()),
    ],
)
def test_benchmark(name: str, words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), "--output", "figures.json", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["machine"]["cores"] == os.cpu_count() and f"{name}.py" in figures["command"]
    if "--shapes" in words:
        found = figures["results"]["(8, 8)"]["ReMoE"]
        assert 0.7 < found["active_experts_of_full_size"] < 1.5 and found["utilization"] > 0
    elif name == "step":
        steady, dense, unbounded = figures["results"]["16"].values()
        assert steady["active"][-1] < 2 < 6 < dense["active"][-1]
        assert 0 < dense["peak_bytes"] < unbounded["peak_bytes"]
    else:
        (times,) = figures["seconds"].values()
        assert list(times) == ["ReMoE, grouped", "Megatron's, top-k", "transformers, eager"]
        assert all(min(found) > 0 for found in times.values())
