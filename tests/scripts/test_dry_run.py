"""Test DRY_RUN=1 of the launch scripts: the cost and the settings that differ from the paper's."""

import re
from pathlib import Path

import pytest

from tests.gpt2_reference import gpt2_files
from tests.scripts.launching import SIZES, dry_run, shards

PAPER = {"182m": (777, 995), "469m": (2580, 2873), "978m": (5730, 5991)}  # 10^6 parameters, GFLOPs per sequence


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with empty data sets named like the fork's shards."""
    folder = tmp_path_factory.mktemp("pile")
    shards(folder, [f"{number:02}" for number in range(1, 30)])
    return str(folder)


@pytest.mark.parametrize(
    ("size", "routing"), [*((size, "remoe") for size in SIZES), ("182m", "dense"), ("182m", "moe")]
)
def test_cost_is_the_papers(size: str, routing: str, pile: str) -> None:
    """The program's parser and validation accept each script's flags; model, cost and settings are the paper's."""
    estimate, _, command_line = dry_run(f"{size}_{routing}", DATA_DIR=pile).partition("\nCommand:\n")
    assert "torch.distributed.run" in command_line and "--bf16" in command_line and "--save" in command_line
    parameters, gflops = PAPER[size]
    [total] = re.findall(r"total parameters +([\d,]+)", estimate)
    if routing != "dense":
        assert int(total.replace(",", "")) == pytest.approx(parameters * 1e6, rel=0.02)
    [per_sequence] = re.findall(r"([\d,]+) G per sequence of 1024 tokens", estimate)
    assert float(per_sequence.replace(",", "")) == pytest.approx(gflops, rel=0.02)
    assert f"Settings that differ from the paper's {size.upper()} {routing}: none" in estimate
    assert "31,457,280,000 tokens" in estimate and f"Checkpoints: {24 if size == '978m' else 12} of " in estimate
    assert ("dense start, 4 of 8 experts" in estimate) == (routing == "remoe")
    assert "--moe-relu-max-experts" not in estimate


def test_cost_without_data() -> None:
    output = dry_run("182m_dense")
    assert "PREFIX in the command" in output and "epochs" not in output
    assert " --data-path PREFIX " in output and "182,471,424" in output


def test_both_models_cost_the_same(pile: str) -> None:
    """GPTModel and HybridModel get the same estimate: parameters, FLOPs, memory and differences from the paper."""
    layout = {"DATA_DIR": pile, "PP": "2", "VPP": "2"}
    gpt, hybrid = (dry_run("182m_remoe", MODEL=model, **layout).split("Command:") for model in ("gpt", "hybrid"))
    assert "--num-layers 12" in gpt[1] and "--hybrid-layer-pattern" in hybrid[1]
    assert "in the fullest of 2 pipeline stages" in gpt[0] and gpt[0] == hybrid[0]


def test_cost_names_what_differs_from_the_paper(tmp_path: Path) -> None:
    """The dry run reads GPT-2's vocabulary from a path with blanks and non-ASCII letters."""
    vocabulary, merges = tmp_path / "my vocäbulary.json", tmp_path / "my mërges.txt"
    for file, name in zip(gpt2_files(), (vocabulary, merges), strict=True):
        name.symlink_to(file)
    flags = ["2", "100", "4", "64", "2", "--", "--lr", "1e-3", "--moe-router-topk", "2", "--weight-decay", "0.1"]
    flags += ["--eval-iters", "32", "--seed", "1", "--no-moe-relu-l1-reg-load-balancing"]
    environment = {"DATA_PATH": "pile", "GPU": "a100"}
    output = dry_run("182m_remoe", *flags, **environment, VOCAB_FILE=str(vocabulary), MERGE_FILE=str(merges))
    found = set(re.findall(r"^  --(\S+) (.*?) +\((paper|fork): (.*)\)$", output, re.MULTILINE))
    assert found == {
        ("lr", "0.001", "paper", "0.0005"), ("train-iters", "100", "paper", "60000"),
        ("num-experts", "64", "paper", "8"), ("moe-router-topk", "2", "paper", "1"),
        ("moe-granularity", "2", "paper", "1"), ("moe-relu-l1-reg-load-balancing", "off", "paper", "on"),
        ("weight-decay", "0.1", "fork", "0.01"), ("eval-iters", "32", "fork", "100"),
        ("micro-batch-size", "4", "fork", "16"), ("seed", "1", "fork", "1234"),
        ("data-path", "pile", "fork", "01 to 29, equally"),
    }  # fmt: skip
    assert "Plan: 2 x a100 (80 GiB, 312 TFLOP/s dense bf16)" in output
    assert "With --moe-relu-max-experts 8 it takes " in output  # 4 · k for 64 experts, before granularity 2 splits them


@pytest.mark.parametrize(("gpus_per_node", "leaves_node"), [("8", True), ("16", False)])
def test_expert_parallelism_over_nodes(gpus_per_node: str, leaves_node: bool) -> None:
    """With TP 2, experts on EP 8 need 16 GPUs."""
    layout = {"NNODES": "4", "MASTER_ADDR": "x", "TP": "2", "PP": "2", "EP": "8"}
    output = dry_run("978m_remoe", gpus_per_node, "60000", "16", **layout)
    assert ("WARNING: expert-parallel groups of 16 GPUs do not fit in nodes of 8" in output) == leaves_node
    assert re.search("at best [0-9.]+ hours", output)


@pytest.mark.parametrize(("given", "weights"), [("{}", [1]), ("1.0 {0} 3.0 {0}", [0.25, 0.75])])
def test_epochs(given: str, weights: list[float], data: Path) -> None:
    """The epochs are those of 100 · 512 · 64 tokens. So few documents get another split than the paper's."""
    flags = ["--", "--seq-length", "64", "--max-position-embeddings", "64"]
    output = dry_run("182m_dense", "8", "100", "16", *flags, DATA_PATH=given.format(data))
    found = re.search(r"Data: .* in \d data sets?; ([0-9.e+]+)(?: to ([0-9.e+]+))? epochs", output)
    split = re.findall(r"--split (\d+),(\d+),(\d+)", output)[-1]
    share = int(split[0]) / sum(map(int, split))
    tokens = share * data.with_suffix(".bin").stat().st_size / 2  # uint16
    assert found is not None and share < 0.969
    epochs = [100 * 512 * 64 * weight / tokens for weight in weights]
    assert [float(number) for number in found.groups() if number] == pytest.approx(epochs, rel=0.01)


def test_cost_refuses_a_layout_that_megatron_refuses() -> None:
    output = dry_run("182m_moe", "8", "--", "--micro-batch-size", "3", DATA_PATH="pile", code=2)
    assert "must be divisible by" in output
