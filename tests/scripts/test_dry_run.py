"""What a launch script says of a training before it starts: cost, and what differs from the paper."""

import re
import sys
from pathlib import Path

import pytest

from tests.gpt2_reference import gpt2_files
from tests.scripts.launching import ROUTINGS, SIZES, launch, shards

PAPER = {  # total parameters in units of 10^6, GFLOPs per sequence
    "182m": (777, 995),
    "469m": (2580, 2873),
    "978m": (5730, 5991),
}


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the names of the fork's shards."""
    folder = tmp_path_factory.mktemp("pile")
    shards(folder, [f"{number:02}" for number in range(1, 30)])
    return str(folder)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_cost_is_the_papers(size: str, routing: str, pile: str) -> None:
    """The entry's own parser and validation accept each script's flags, and model and settings are the paper's.

    Settings are those that tools/cost/paper.py names, with the values of the paper or, read by its parser, the fork.
    """
    result = launch(f"{size}_{routing}", DRY_RUN="1", DATA_DIR=pile, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    estimate, _, command_line = result.stdout.partition("\nCommand:\n")
    assert "torch.distributed.run" in command_line and "--bf16" in command_line
    parameters, gflops = PAPER[size]
    figures = {
        line.split("  ")[1].strip(): line.replace(",", "").split() for line in estimate.splitlines() if "  " in line
    }
    if routing != "dense":
        assert int(figures["total parameters"][2]) == pytest.approx(parameters * 1e6, rel=0.02)
    per_sequence = next(line for line in estimate.splitlines() if "G per sequence of 1024 tokens" in line)
    assert float(per_sequence.split()[0].replace(",", "")) == pytest.approx(gflops, rel=0.02)
    assert f"Settings that differ from the paper's {size.upper()} {routing}: none" in estimate
    assert "31,457,280,000 tokens" in estimate
    assert ("dense first stage, 4 of 8 experts" in estimate) == (routing == "remoe")
    assert (f"Checkpoints: {24 if size == '978m' else 12} of " in estimate) and "--save" in command_line


def test_cost_without_data() -> None:
    result = launch("182m_dense", DRY_RUN="1", PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert "PREFIX in the command" in result.stderr and "epochs" not in result.stdout
    assert " --data-path PREFIX " in result.stdout and "182,471,424" in result.stdout


def test_both_models_cost_the_same(pile: str) -> None:
    """Parameters, FLOPs and memory, and neither differs from the paper."""
    environment = {"DRY_RUN": "1", "DATA_DIR": pile, "PYTHON": sys.executable, "PP": "2", "VPP": "2"}
    gpt, hybrid = (
        launch("182m_remoe", MODEL=model, **environment).stdout.split("Command:") for model in ("gpt", "hybrid")
    )
    assert "--num-layers 12" in gpt[1] and "--hybrid-layer-pattern" in hybrid[1]
    assert "in the fullest of 2 pipeline stages" in gpt[0] and gpt[0] == hybrid[0]


def test_cost_names_what_differs_from_the_paper(tmp_path: Path) -> None:
    """With GPT-2's vocabulary, which is read, on a path with blanks and letters beyond ASCII."""
    vocabulary, merges = tmp_path / "my vocäbulary.json", tmp_path / "my mërges.txt"
    for file, name in zip(gpt2_files(), (vocabulary, merges), strict=True):
        name.symlink_to(file)
    flags = ["2", "100", "4", "16", "2", "--", "--lr", "1e-3", "--moe-router-topk", "2", "--weight-decay", "0.1"]
    flags += ["--eval-iters", "32", "--seed", "1", "--no-moe-relu-l1-reg-load-balancing"]
    environment = {"DRY_RUN": "1", "DATA_PATH": "pile", "PYTHON": sys.executable, "GPU": "a100", "UTILIZATION": "0.3"}
    environment |= {"VOCAB_FILE": str(vocabulary), "MERGE_FILE": str(merges)}
    result = launch("182m_remoe", *flags, **environment)
    assert result.returncode == 0, result.stderr
    for line in (
        "--lr 0.001   (paper: 0.0005)",
        "--train-iters 100   (paper: 60000)",
        "--num-experts 16   (paper: 8)",
        "--moe-router-topk 2   (paper: 1)",
        "--moe-granularity 2   (paper: 1)",
        "--moe-relu-l1-reg-load-balancing off   (paper: on)",
        "--weight-decay 0.1   (fork: 0.01)",
        "--eval-iters 32   (fork: 100)",
        "--micro-batch-size 4   (fork: 16)",
        "--seed 1   (fork: 1234)",
        "--data-path pile   (fork: 01 to 29, equally)",
        "Plan: 2 x a100 (80 GiB, 312 TFLOP/s dense bf16)",
        "at 30% utilization",
    ):
        assert line in result.stdout
    assert (result.stdout.count("(paper:"), result.stdout.count("(fork:")) == (6, 5)


def test_epochs(data: Path) -> None:
    """Of 100 steps of 512 sequences of 64 tokens, on a data set of which 969 of 1000 parts are trained on."""
    tokens = data.with_suffix(".bin").stat().st_size / 2  # uint16
    flags = ["--", "--seq-length", "64", "--max-position-embeddings", "64"]
    environment = {"DRY_RUN": "1", "PYTHON": sys.executable}
    for given, weights in ((str(data), [1]), (f"1.0 {data} 3.0 {data}", [0.25, 0.75])):
        result = launch("182m_dense", "8", "100", "16", *flags, DATA_PATH=given, **environment)
        told = re.search(r"Data: .* in \d data sets?; ([0-9.e+]+)(?: to ([0-9.e+]+))? epochs", result.stdout)
        assert told is not None, result.stdout + result.stderr
        epochs = [100 * 512 * 64 * weight / (0.969 * tokens) for weight in weights]
        assert [float(number) for number in told.groups() if number] == pytest.approx(epochs, rel=0.01)


def test_cost_refuses_a_layout_that_megatron_refuses() -> None:
    result = launch(
        "182m_moe", "8", "--", "--micro-batch-size", "3", DRY_RUN="1", DATA_PATH="pile", PYTHON=sys.executable
    )
    assert result.returncode == 2 and "must be divisible by" in result.stderr
