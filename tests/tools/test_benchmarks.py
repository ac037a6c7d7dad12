"""The benchmarks, with models so small that their figures say nothing: they run, and keep what they measured."""

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


def benchmark(name: str, output: Path, *arguments: str, expect: int = 0) -> str:
    """Run one on the CPU, without a terminal; returns what it printed."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), "--output", str(output), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_step_compares_with_plain_pytorch(tmp_path: Path) -> None:
    variants = ["ReMoE", "top-k, Megatron's layers, plain PyTorch"]
    arguments = ["--shapes", "(8, 8)", "--variants", *variants, "--rounds", "1", "--steps", "2", *SMALL]
    printed = benchmark("step", tmp_path / "step.json", *arguments)
    assert "(8, 8) round 1/1 ReMoE: " in printed and "2/2" in printed
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["machine"]["cores"] == os.cpu_count() and "step.py" in record["command"]
    figures = record["results"]["(8, 8)"]
    assert list(figures) == variants
    assert all(len(found["all_seconds"]) == 2 and found["peak_flops"] > 1e9 for found in figures.values())
    # Routers were brought to the target, which is one expert of full size, and top-k has no λ.
    assert 0.7 < figures["ReMoE"]["active_experts_of_full_size"] < 1.5
    assert figures["ReMoE"]["update_seconds"] > 0 == figures[variants[1]]["update_seconds"]


def test_memory_tells_dense_from_target(tmp_path: Path) -> None:
    printed = benchmark("memory", tmp_path / "memory.json", "--experts", "16", *SMALL)
    assert "16 experts, dense stage, unbounded: " in printed
    steady, dense, unbounded = json.loads((tmp_path / "memory.json").read_text())["results"]["16"].values()
    assert steady["active"][-1] < 2 < 6 < dense["active"][-1]
    assert 0 < dense["peak_bytes"] < unbounded["peak_bytes"]


def test_layer_has_all_peers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = "--tokens 32 64 --experts 4 --hidden 32 --ffn 16 --repetitions 1".split()
    printed = benchmark("layer", tmp_path / "layer.json", *sizes)
    assert "4 experts, 64 tokens: ReMoE, grouped" in printed
    seconds = json.loads((tmp_path / "layer.json").read_text())["seconds"]
    assert list(seconds) == ["4 experts, 32 tokens", "4 experts, 64 tokens"]
    peers = ["ReMoE, grouped", "Megatron's, top-k", "transformers, eager", "transformers, grouped_mm"]
    assert all(list(times) == peers and min(min(found) for found in times.values()) > 0 for times in seconds.values())


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    printed = benchmark("bounded", tmp_path / "bounded.json", "--shapes", "(8,1)", expect=2)
    assert "invalid choice: '(8,1)'" in printed
