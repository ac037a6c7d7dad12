"""The paper's launch scripts: what they would run, their errors, and one of them for real on the CPU."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from trainings import REPOSITORY, records

SCRIPTS = REPOSITORY / "scripts"
SIZES = {"182m": ("12", "768", "12"), "469m": ("24", "1024", "16"), "978m": ("24", "1536", "16")}
ROUTINGS = ("dense", "moe", "remoe")


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", str(SCRIPTS / f"train_llama_{script}.sh"), *arguments],
        capture_output=True,
        text=True,
        env=kept | environment,
    )


def command(script: str, *arguments: str, **environment: str) -> list[str]:
    result = launch(script, *arguments, **({"DRY_RUN": "1", "DATA_PATH": "pile"} | environment))
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def value(words: list[str], flag: str) -> str:
    """The last value of a flag, which is the one that counts."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_paper_settings(size: str, routing: str) -> None:
    words = command(f"{size}_{routing}")
    layers, hidden, heads = SIZES[size]
    expected = {
        "--nproc-per-node": "8",
        "--num-layers": layers,
        "--hidden-size": hidden,
        "--num-attention-heads": heads,
        "--ffn-hidden-size": str(4 * int(hidden)),
        "--num-query-groups": "4",
        "--seq-length": "1024",
        "--global-batch-size": "512",
        "--train-iters": "60000",
        "--lr": "5e-4",
        "--min-lr": "5e-5",
        "--init-method-std": "0.01",
        "--rotary-base": "1000000",
        "--split": "969,30,1",
    }
    assert {flag: value(words, flag) for flag in expected} == expected
    assert ("--moe-relu-routing" in words) == (routing == "remoe")
    assert ("--moe-aux-loss-coeff" in words) == (routing == "moe")
    assert ("--num-experts" in words) == (routing != "dense")


@pytest.mark.parametrize("size", SIZES)
def test_moe_and_remoe_differ_in_one_line(size: str) -> None:
    moe, remoe = (
        (SCRIPTS / f"train_llama_{size}_{routing}.sh").read_text().splitlines() for routing in ("moe", "remoe")
    )
    assert len([pair for pair in zip(moe, remoe, strict=True) if pair[0] != pair[1]]) == 1


def test_positional_arguments_and_flags_behind_dashes() -> None:
    words = command("182m_remoe", "2", "100", "4", "16", "2", "mine", "--", "--lr", "1e-3", WANDB_API_KEY="x")
    expected = {
        "--nproc-per-node": "2",
        "--train-iters": "100",
        "--micro-batch-size": "4",
        "--num-experts": "16",
        "--moe-granularity": "2",
        "--wandb-project": "mine",
        "--lr": "1e-3",
    }
    assert {flag: value(words, flag) for flag in expected} == expected
    assert value(command("182m_dense", "2", "100", "4", "8"), "--ffn-hidden-size") == str(8 * 768)


def test_layout_and_nodes() -> None:
    words = command("469m_remoe", "8", TP="2", PP="2", EP="4", NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    assert value(words, "--expert-model-parallel-size") == "4"
    assert value(words, "--node-rank") == "1" and value(words, "--master-addr") == "first"
    assert "--sequence-parallel" in words and "--standalone" not in words


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {"DATA_PATH": "", "DATA_DIR": ""}, "no data: set DATA_PATH"),
        ([], {"DATA_PATH": "", "DATA_DIR": "/nowhere"}, "no *_document.bin in DATA_DIR=/nowhere"),
        ([], {"DRY_RUN": "0", "DATA_DIR": "/nowhere"}, "VOCAB_FILE: there is no /nowhere/encoder.json"),
        (["two"], {}, "gpus_per_node is 'two'"),
        (["8", "0"], {}, "train_iters is '0'"),
        (["8", "1", "1", "8", "1", "p", "extra"], {}, "too many arguments: extra"),
        (["2"], {"EP": "3"}, "EP=3 does not divide the 8 experts"),
        (["2"], {"TP": "4"}, "cannot be split into TP=4"),
        (["8"], {"TP": "8"}, "TP=8 does not divide the 12 attention heads"),
        (["8"], {"NNODES": "2"}, "needs MASTER_ADDR"),
    ],
)
def test_errors(arguments: list[str], environment: dict[str, str], message: str) -> None:
    result = launch("182m_remoe", *arguments, **({"DRY_RUN": "1", "DATA_PATH": "pile"} | environment))
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_trains_and_resumes_on_the_cpu(data: Path, tmp_path: Path) -> None:
    import sys

    small = """
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 128
        --seq-length 64 --max-position-embeddings 64 --global-batch-size 4 --make-vocab-size-divisible-by 8
        --tokenizer-type NullTokenizer --vocab-size 257 --split 90,10,0
        --eval-iters 0 --log-interval 1 --save-interval 2 --cpu
    """.split()
    environment = {"DATA_PATH": str(data), "OUTPUT_DIR": str(tmp_path / "run"), "PYTHON": sys.executable}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    for more, expected in ((["--exit-interval", "2"], [1, 2]), ([], [3, 4])):
        result = launch("182m_remoe", "1", "4", "2", "--", *small, *more, **environment)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
        assert list(records(result.stdout)) == expected
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints",
        "command.sh",
        "tensorboard",
        "train.log",
    }
