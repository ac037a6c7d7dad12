"""The paper's launch scripts: what they would run beyond the recorded commands, and their errors."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.data.indexed import IndexedWriter, token_type
from tests.scripts.launching import ROUTINGS, SCRIPTS, SIZES, command, launch, planned, shards, value
from tests.trainings import REPOSITORY
from tools.common.flags import parse


@pytest.mark.parametrize("size", SIZES)
def test_moe_and_remoe_differ_in_one_line(size: str) -> None:
    moe, remoe = (
        (SCRIPTS / f"train_llama_{size}_{routing}.sh").read_text().splitlines() for routing in ("moe", "remoe")
    )
    assert len([pair for pair in zip(moe, remoe, strict=True) if pair[0] != pair[1]]) == 1


def data_path(words: list[str]) -> list[str]:
    return words[words.index("--data-path") + 1 : words.index("--split")]


@pytest.mark.parametrize("form", ["{}", "pile_{}"])
def test_data_folder(form: str, tmp_path: Path) -> None:
    """A whole Pile: the fork's mixture, other files named. Else all with equal weights, missing shards named."""
    folder = tmp_path / "dätä of mine"
    names = [form.format(f"{number:02}") for number in range(30)]
    some = shards(folder, [names[0], *names[5:]])
    result = planned("182m_remoe", DATA_PATH="", DATA_DIR=str(folder))
    assert data_path(shlex.split(result.stdout)) == some
    assert "missing: 01 02 03 04; " in result.stderr and "shard 00 too" in result.stderr
    all_but_first = shards(folder, names[1:])
    result = planned("182m_remoe", DATA_PATH="", DATA_DIR=str(folder))
    assert data_path(shlex.split(result.stdout)) == all_but_first
    assert f"left out: {names[0]}_text_document\n" in result.stderr
    for name in ("pile_07", "07"):
        (folder / f"{name}_text_document.bin").touch()
    result = planned("182m_remoe", DATA_PATH="", DATA_DIR=str(folder))
    assert result.returncode == 2 and "shard 07 twice" in result.stderr


@pytest.mark.parametrize(("documents", "split"), [(1000, "969,30,1"), (100, "98,1,1"), (5, "34,33,33")])
def test_few_documents_have_a_split_that_leaves_no_part_empty(documents: int, split: str, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a_document", token_type(300)) as writer:
        writer.add(np.arange(documents) % 300, np.ones(documents, int))
        writer.finish()
        writer.publish()
    data = {"DATA_PATH": "", "DATA_DIR": str(tmp_path)}
    result = planned("182m_moe", **data)
    assert value(shlex.split(result.stdout), "--split") == split, result.stderr
    assert (f"Split: {split}" in result.stderr) == (split != "969,30,1")
    result = planned("182m_moe", "8", "--", "--split", "8,1,1", **data)
    assert "Split" not in result.stderr and value(shlex.split(result.stdout), "--split") == "8,1,1"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_models_differ_in_their_layers_alone(routing: str) -> None:
    gpt, hybrid = (parse(command(f"182m_{routing}", MODEL=model, PP="2", VPP="3")) for model in ("gpt", "hybrid"))
    assert hybrid.pop("--hybrid-layer-pattern") == ("|".join(["*-*-" if routing == "dense" else "*E*E"] * 6),)
    assert gpt.pop("--num-layers") == ("12",) and gpt.pop("--num-virtual-stages-per-pipeline-rank") == ("3",)
    assert gpt == hybrid


def test_what_is_said_beside_a_command() -> None:
    """And the node's rank: the first of three variables counts."""
    assert "FFN: 24576 = 8 x 4 x 768" in planned("182m_dense", "2", "100", "4", "8").stderr
    assert "--cross-entropy-loss-fusion" in planned("182m_remoe", KERNELS="triton").stderr
    words = command("182m_remoe", NNODES="4", MASTER_ADDR="first", RANK="1", NODE_RANK="2")
    assert value(words, "--node-rank") == "2"


ENGINE, APEX = "transformer_engine/__init__.py", "fused_weight_gradient_mlp_cuda.py"
BROKEN = "raise RuntimeError('curand shared object not found.\\nand more')"
UNFUSED = "--no-gradient-accumulation-fusion"
WITH_ENGINE = ["transformer_engine", "--moe-grouped-gemm"]


@pytest.mark.parametrize(
    ("modules", "flags", "layers", "expected"),
    [
        ({APEX: ""}, [], "plain PyTorch (Transformer Engine: not installed)", ["local"]),
        ({ENGINE: ""}, [], "Transformer Engine", [*WITH_ENGINE, UNFUSED]),
        ({ENGINE: "print('hello')", APEX: ""}, [], "Transformer Engine", WITH_ENGINE),
        ({ENGINE: "", APEX: "raise ImportError('libc10.so')"}, [], "Transformer Engine", [*WITH_ENGINE, UNFUSED]),
        ({ENGINE: BROKEN}, [], "RuntimeError: curand shared object not found.)", ["local", UNFUSED]),
        ({ENGINE: ""}, ["--transformer-impl", "local"], "not asked for", ["local", UNFUSED]),
    ],
)
def test_kernels(modules: dict[str, str], flags: list[str], layers: str, expected: list[str], tmp_path: Path) -> None:
    """What Megatron would not build is left out, and the path that is taken is said."""
    for name, text in modules.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        if name == ENGINE:
            (tmp_path / "transformer_engine" / "pytorch.py").touch()
    environment = {"DRY_RUN": "command", "DATA_PATH": "pile", "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    result = launch("182m_remoe", "2", "--", *flags, **environment)
    assert result.stderr.startswith("Layers: ") and layers in result.stderr and result.stderr.count("\n") == 1
    words = shlex.split(result.stdout)
    assert result.stdout.count("\n") == 1 and "torch.distributed.run" in words
    assert value(words, "--transformer-impl") == expected[0]
    assert [flag for flag in ("--moe-grouped-gemm", UNFUSED) if flag in words] == expected[1:]
    assert ("--no-persist-layer-norm" in words) == (expected[0] == "local")


def settings(words: list[str]) -> list[str]:
    """What is set in the environment of a command."""
    return words[1 : next(i for i, word in enumerate(words) if word.endswith("python"))] if words[0] == "env" else []


ONE, GROWING = "CUDA_DEVICE_MAX_CONNECTIONS=1", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({"CP": "2", "GPU": "a100"}, [], [ONE, GROWING]),
        ({}, ["--tensor-model-parallel-size=2"], [ONE, GROWING]),
        ({"TP": "2", "GPU": "b200"}, [], [GROWING]),
        ({"TP": "2"}, ["--use-torch-fsdp2"], [GROWING]),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, [], []),
        ({}, ["--use-nccl-ub"], []),
    ],
)
def test_environment_on_gpus(environment: dict[str, str], flags: list[str], expected: list[str]) -> None:
    assert settings(command("182m_moe", "4", "--", *flags, **environment)) == expected


@pytest.mark.parametrize(("capability", "expected"), [("9.0", "1"), ("10.0", ""), ("[N/A]", "1")])
def test_starts_on_gpus_as_it_says(capability: str, expected: str, tmp_path: Path) -> None:
    """On a machine whose GPUs and interpreter are played: what the training would find in its environment."""
    answers = {
        "nvidia-smi": f'[[ $1 == -L ]] && printf "GPU %s: H100\\n" 0 1 || printf "%s\\n" "{capability}" "{capability}"',
        "python": f'[[ $1 == -m ]] || exec {sys.executable} "$@"\n'
        'echo "connections=${CUDA_DEVICE_MAX_CONNECTIONS-} memory=${PYTORCH_CUDA_ALLOC_CONF-}"',
    }
    for name, lines in answers.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).touch()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "TP": "2"}
    environment |= {"DATA_DIR": str(tmp_path), "DATA_PATH": "pile", "OUTPUT_DIR": str(tmp_path / "run")}
    result = launch("182m_remoe", "2", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"connections={expected} memory=expandable_segments:True"
    assert result.stderr == "Layers: plain PyTorch (Transformer Engine: not installed)\n"
    written = settings(shlex.split((tmp_path / "run" / "command.sh").read_text()))
    assert written == ([ONE, GROWING] if expected else [GROWING])


TOO_LARGE = "18446744073709551617"  # 2^64 + 1
TO_TRAIN, TWO = {"DRY_RUN": "0"}, {"NNODES": "2", "MASTER_ADDR": "first"}


@pytest.mark.parametrize(
    ("words", "environment", "facts"),
    [
        ("", TO_TRAIN | {"DATA_PATH": ""}, "set DATA_PATH"),
        ("", {"DATA_PATH": ""}, "set DATA_PATH"),
        ("", {"DATA_PATH": "", "DATA_DIR": "/nowhere"}, "DATA_DIR=/nowhere"),
        ("", TO_TRAIN | {"DATA_DIR": "/nowhere"}, "VOCAB_FILE: /nowhere/encoder.json"),
        ("", TO_TRAIN | {"DATA_PATH": "my pile"}, "my.bin blanks"),
        ("two", {}, "gpus_per_node 'two'"),
        ("8 0", {}, "train_iters '0'"),
        (f"8 1 1 {TOO_LARGE}", {}, f"num_experts '{TOO_LARGE}'"),
        ("8 1 1 1024 1024", {}, "num_experts granularity '1048576'"),
        ("8 1 1 8 1 p extra", {}, "extra"),
        ("8 1 1 8 1 a/b", {}, "project_name 'a/b'"),
        ("8", TWO | {"NNODES": TOO_LARGE}, f"NNODES '{TOO_LARGE}'"),
        ("8", {"NNODES": "2"}, "MASTER_ADDR"),
        ("8", TWO | {"RANK": "2"}, "RANK '2' NNODES=2"),
        ("4 1 1 64", {"EP": "8"}, "EP=8 PP=1"),
        ("8 1 1 64", {"EP": "8", "TP": "2"}, "EP=8 TP=2"),
        ("2", {"EP": "3"}, "EP=3 8 experts"),
        ("2", {"TP": "4"}, "TP=4"),
        ("8", {"TP": "8"}, "TP=8 12 heads"),
        ("8", {"VPP": "2"}, "VPP=2 PP"),
        ("8", {"PP": "2", "VPP": "5"}, "PP=2 VPP=5 12 layers"),
        ("8", {"MODEL": "mamba"}, "MODEL=mamba hybrid"),
        ("8 -- --num-layers 2", {"MODEL": "hybrid"}, "--num-layers --hybrid-layer-pattern"),
        ("8", {"KERNELS": "cuda"}, "KERNELS=cuda triton"),
    ],
)
def test_errors(words: str, environment: dict[str, str], facts: str) -> None:
    result = planned("182m_remoe", *words.split(), **environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert all(fact in result.stderr for fact in facts.split()), result.stderr


def test_dense_models_and_experts_of_their_own_tensor_parallel_size() -> None:
    result = planned("182m_dense", "8", "1", "1", TOO_LARGE)
    assert result.returncode == 2 and f"ffn_expansion is '{TOO_LARGE}'" in result.stderr
    assert command("182m_remoe", "8", "1", "1", "64", "--", "--expert-tensor-parallel-size", "1", EP="8", TP="2")


@pytest.mark.parametrize(
    ("gpus", "visible", "asked", "message"),
    [
        (0, {}, "1", "is 1, and 0 GPUs"),
        (2, {}, "8", "is 8, and 2 GPUs"),
        (2, {"CUDA_VISIBLE_DEVICES": "1"}, "2", "is 2, and 1 GPUs"),
        (2, {"CUDA_VISIBLE_DEVICES": ""}, "1", "is 1, and 0 GPUs"),
    ],
)
def test_too_few_gpus(gpus: int, visible: dict[str, str], asked: str, message: str, tmp_path: Path) -> None:
    """Without this, Megatron would train on the CPU, one process for each missing GPU."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nseq -f 'GPU %g: H100' {gpus}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).touch()
    environment = {"DATA_DIR": str(tmp_path), "DATA_PATH": "pile", "OUTPUT_DIR": str(tmp_path / "run")} | visible
    result = planned("182m_remoe", asked, **TO_TRAIN, **environment, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 2 and message in result.stderr and "--cpu" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["8", "-h"]])
def test_help_has_arguments_and_environment(arguments: list[str]) -> None:
    result = launch("469m_moe", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: bash scripts/train_llama_469m_moe.sh [gpus_per_node] [train_iters]")
    assert re.search(r"^  DATA_PATH .*^  REHEARSE_JSON +a file for .*\Z", result.stdout, re.MULTILINE | re.DOTALL)


def test_help_of_the_data_script_is_its_header() -> None:
    script = [REPOSITORY / "data_preprocessing.sh", "--help"]
    told = subprocess.run(["bash", *script], capture_output=True, text=True, check=True).stdout
    assert told.startswith("Turns the shards") and "  INPUT_DIR " in told and told.endswith("--on-error skip\n")
