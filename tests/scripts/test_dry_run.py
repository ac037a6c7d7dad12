"""Test DRY_RUN=1 of the launch scripts."""

import re

import pytest

from tests.scripts.launching import dry_run

PAPER = {"182m": (777, 995), "978m": (5730, 5991)}  # 10^6 parameters, GFLOPs per sequence


@pytest.mark.parametrize(("size", "routing"), [("978m", "remoe"), ("182m", "dense"), ("182m", "moe")])
def test_cost_is_the_papers(size: str, routing: str) -> None:
    """The program accepts each script's flags, even without data. Parameters and FLOPs are the paper's."""
    estimate, _, command_line = dry_run(f"{size}_{routing}").partition("\nCommand:\n")
    assert "torch.distributed.run" in command_line and " --data-path PREFIX " in command_line
    parameters, gflops = PAPER[size]
    [total] = re.findall(r"total parameters +([\d,]+)", estimate)
    if routing != "dense":
        assert int(total.replace(",", "")) == pytest.approx(parameters * 1e6, rel=0.02)
    [per_sequence] = re.findall(r"([\d,]+) G per sequence of 1024 tokens", estimate)
    assert float(per_sequence.replace(",", "")) == pytest.approx(gflops, rel=0.02)
    assert "31,457,280,000 tokens" in estimate and f"Checkpoints: {24 if size == '978m' else 12} of " in estimate
    assert bool(re.search(r"experts, of 8 +4 +1\.8 +1\n", estimate)) == (routing == "remoe")
    assert re.search(r"Fits: .* GiB; .* hours to .* hours.* at 33 to 18 % of the peak \(--mfu\)\n$", estimate)


def test_both_models_cost_the_same() -> None:
    """GPTModel and HybridModel get the same estimate."""
    layout = {"PP": "2", "VPP": "2", "GPU": "a100"}
    gpt, hybrid = (dry_run("182m_remoe", MODEL=model, **layout).split("Command:") for model in ("gpt", "hybrid"))
    assert "--num-layers 12" in gpt[1] and "--hybrid-layer-pattern" in hybrid[1] and gpt[0] == hybrid[0]
    assert "in the fullest of 2 pipeline stages" in gpt[0] and "8 x a100 (80 GiB, 312 TFLOP/s dense bf16)" in gpt[0]


@pytest.mark.parametrize(("gpus_per_node", "leaves_node"), [("8", True), ("16", False)])
def test_expert_parallelism_over_nodes(gpus_per_node: str, leaves_node: bool) -> None:
    """With TP 2 and EP 8, expert-parallel groups have 16 GPUs."""
    layout = {"NNODES": "4", "TP": "2", "PP": "2", "EP": "8"}
    output = dry_run("978m_remoe", gpus_per_node, "60000", "16", **layout)
    assert ("WARNING: expert-parallel groups of 16 GPUs do not fit in nodes of 8" in output) == leaves_node
    assert re.search("GiB; [0-9.]+ hours", output)
