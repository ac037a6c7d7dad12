"""Test what only a GPU can show, the most valuable first: speed and memory of the launch scripts, then results.

pytest -m gpu tests/gpu --gpu-report FOLDER      a second call runs only the tests without figures
python -m tests.gpu.rehearsed pytest ...         check on a machine without a GPU that the tests start and end
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.remoe.layer import counting
from tests.golden_run import EXACT, FLAGS, committed, differences
from tests.gpu.report import Report
from tests.gpu.runs import FUSED_FLAGS, Case, Machine, profile, train_golden, train_launched
from tests.layers import make_config, make_layer
from tools.plan.fake_ranks import FakePairCounts
from tools.plan.gpus import GPUS

pytestmark = pytest.mark.gpu
TRITON = "triton"
HALF = ("--num-layers", "12")  # of 978M's 24: a single GPU holds the whole optimizer state, 64 GiB for 24 layers
# In the order of measurement.
LAUNCHES = [
    (Case(kernels=TRITON), "steady"),
    (Case(), "steady"),
    (Case(routing="dense", kernels=TRITON), "steady"),
    (Case(routing="moe", kernels=TRITON), "steady"),
    (Case("978m", kernels=TRITON, flags=HALF), "steady"),
    (Case("469m", kernels=TRITON), "steady"),
    (Case(kernels=TRITON), "dense"),
]
FINER = [(Case(kernels=TRITON, flags=("--moe-granularity", number)), "steady") for number in ("8", "64")]
GRAINS = {"(8, 1)": (8, 1), "(8, 8)": (64, 8), "(64, 1)": (64, 1)}  # "(E, G)" → experts E·G, and G active per token


def launch(case: Case, stage: str, machine: Machine, report: Report) -> None:
    figures = train_launched(machine, case, stage, 50 if stage == "dense" else 35)
    card = next((kind for kind, one in GPUS.items() if one.title == machine.card), None)
    if card is not None:
        figures["mfu"] = figures["flops"] / figures["seconds"] / (GPUS[card].tflops * 1e12)
    report(figures)
    assert figures["peak_allocated_gib"] < 1.1 * figures["forecast_gib"]
    assert all(map(math.isfinite, figures["losses"]))
    if stage == "steady" and case.routing == "remoe" and not machine.is_rehearsed:
        granularity = int(case.flags[-1]) if "--moe-granularity" in case.flags else 1
        assert figures["active"] == pytest.approx(granularity, rel=0.3)


@pytest.mark.parametrize(("case", "stage"), LAUNCHES, ids=str)
def test_launch(case: Case, stage: str, machine: Machine, report: Report) -> None:
    launch(case, stage, machine, report)


def test_profile(machine: Machine, report: Report) -> None:
    """The trace has kernels, also of attention. It is kept because it shows where the host delays the GPU."""
    if machine.is_rehearsed:
        pytest.skip("PyTorch's profiler needs a real CUDA")
    figures = profile(machine, Case(kernels=TRITON), report.folder / "trace.json.gz")
    report(figures)
    assert figures["kernel_seconds"] > 0 and figures["attention"]


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("grain", GRAINS)
def test_kernels_against_float64(grain: str, machine: Machine, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the output and of each gradient is at most 1.5 times that of PyTorch in bf16."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from step import LeveledRouting

    experts, topk = GRAINS[grain]
    if machine.is_rehearsed:  # the map is not computed there, so its number of pairs would be arbitrary
        monkeypatch.setattr(counting, "read_pairs", FakePairCounts(topk / experts).counted(counting.read_pairs))
    sizes = {"hidden_size": 768, "moe_ffn_hidden_size": 3072 // topk, "num_moe_experts": experts}
    sizes |= {"moe_router_topk": topk, "moe_router_dtype": None, "init_method_std": 0.02}
    torch.manual_seed(1)
    tokens = (torch.randn(16384, 1, 768) + torch.randn(768).sign()).to("cuda", torch.bfloat16)
    upstream = torch.randn_like(tokens)

    def results(way: str, dtype: torch.dtype, state: dict[str, torch.Tensor] | None) -> tuple[Any, dict[str, Any]]:
        more = {"moe_kernels": way, "moe_relu_l1_reg_coeff_init": 1e-3}  # so that L1's gradient shows
        layer = make_layer(make_config(**sizes, **more, params_dtype=dtype, pipeline_dtype=dtype), fused=True)
        if state is not None:
            layer.load_state_dict(state)
        state = copy.deepcopy(layer.state_dict())
        layer.router.routing = LeveledRouting(layer.router, topk / experts)
        given = tokens.detach().to(dtype).requires_grad_()
        output = layer(given)[0]
        output.backward(upstream.to(dtype))
        results = {"output": output, "tokens": given.grad, **{n: w.grad for n, w in layer.named_parameters()}}
        return state, {name: value.detach().double().cpu() for name, value in results.items() if value is not None}

    state, plain = results("torch", torch.bfloat16, None)
    _, fused = results(TRITON, torch.bfloat16, state)
    _, exact = results("torch", torch.float64, state)
    errors = {
        kernels: {name: float((results[name] - value).norm() / value.norm()) for name, value in exact.items()}
        for kernels, results in (("torch", plain), (TRITON, fused))
    }
    report(errors)
    for name, error in errors[TRITON].items():
        assert machine.is_rehearsed or error <= 1.5 * errors["torch"][name], name


def test_golden_run(machine: Machine, report: Report) -> None:
    """GPU and CPU agree as well as two CPUs, because PyTorch's fp32 products on a GPU do not use TF32."""
    figures = train_golden(machine, "golden", FLAGS)
    report({"figures": figures})
    expected = {iteration: one for iteration, one in committed().items() if iteration <= EXACT}
    assert machine.is_rehearsed or differences(figures, expected) == []


def test_golden_run_of_both_kernels(machine: Machine, report: Report) -> None:
    ways = {way: train_golden(machine, "fused", FUSED_FLAGS, ["--moe-kernels", way]) for way in ("torch", TRITON)}
    report(ways)
    assert machine.is_rehearsed or differences(ways[TRITON], ways["torch"]) == []


def test_300_steps(machine: Machine, report: Report) -> None:
    """All losses are finite, from the dense start on, and the last one is below the first."""
    figures = train_launched(machine, Case(kernels=TRITON), "dense", 300, limit=480)
    report(figures)
    assert machine.is_rehearsed or len(figures["losses"]) == 30
    assert all(map(math.isfinite, figures["losses"]))
    assert machine.is_rehearsed or figures["losses"][-1] < figures["losses"][0]


@pytest.mark.parametrize(("case", "stage"), FINER, ids=str)
def test_granularity(case: Case, stage: str, machine: Machine, report: Report) -> None:
    launch(case, stage, machine, report)
