"""Test that the programs of the GPU tests start, take their steps and write figures on the no-op CUDA."""

from pathlib import Path

import pytest
import torch

from tests.golden_run import FLAGS
from tests.gpu import runs
from tests.gpu.rehearsed import h100
from tests.gpu.report import Report
from tests.gpu.runs import Case, Machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built for CPUs only, and CUDA is what is played"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run test_acceptance.py"),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("gpu"), "H100 (rehearsal)", h100())


@pytest.mark.parametrize(("kernels", "stage"), [("triton", "steady"), ("", "dense")])
def test_launch(kernels: str, stage: str, machine: Machine, tmp_path: Path) -> None:
    case = Case(kernels=kernels, flags=("--num-layers", "2"), settings={"GPU": "h100"})
    figures = runs.train_launched(machine, case, stage, 7)
    assert figures["seconds"] > 0 and figures["host_seconds"] > 0
    assert figures["peak_allocated_gib"] == pytest.approx(figures["forecast_gib"], rel=0.1) and figures["flops"] > 1e12
    report = Report(tmp_path, "NVIDIA H100 80GB HBM3", "launch")
    report(figures)
    kept = (tmp_path / "nvidia-h100-80gb-hbm3" / "report.md").read_text()
    assert "launch" in kept and "tokens_per_second" in kept


def test_golden_run(machine: Machine) -> None:
    assert list(runs.train_golden(machine, "golden", FLAGS, ["--exit-interval", "5"])) == [1, 5]
