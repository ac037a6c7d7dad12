"""The GPU tests' programs run over the CUDA that does nothing: they start, take their steps and write their figures."""

from pathlib import Path

import pytest
import torch

from tests.golden_run import FLAGS
from tests.gpu import runs
from tests.gpu.conftest import row
from tests.gpu.runs import Case, Machine
from tools.common.files import write_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built for CPUs only, and CUDA is what is played"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run test_acceptance.py"),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    from tools.rehearse.build import environment_of

    rehearsal = environment_of("h100", devices=1) | {"CUDA_VISIBLE_DEVICES": "0"}
    return Machine(tmp_path_factory.mktemp("gpu"), rehearsal)


def test_environment(machine: Machine) -> None:
    assert runs.environment(machine)["card"].endswith("(rehearsal)")


@pytest.mark.parametrize(("kernels", "stage"), [("triton", "steady"), ("", "dense")])
def test_launch(kernels: str, stage: str, machine: Machine, tmp_path: Path) -> None:
    settings = {"GPU": "h100"}
    case = Case(kernels=kernels, flags=("--num-layers", "2"), settings=settings)
    found = runs.train_launched(machine, case, stage, 7)
    assert len(found["losses"]) == 0 or found["seconds"] > 0
    assert found["host_seconds"] > 0
    planned = runs.forecast(machine, case, stage)
    assert found["peak_allocated_gib"] == pytest.approx(planned["forecast_gib"], rel=0.1) and planned["flops"] > 1e12
    write_json(tmp_path / "launch.json", found)
    assert row(tmp_path / "launch.json")[0] == "launch" and "tokens_per_second" in row(tmp_path / "launch.json")[1]


def test_golden_run(machine: Machine) -> None:
    assert list(runs.train_golden(machine, "golden", FLAGS, ["--exit-interval", "5"])) == [1, 5]
