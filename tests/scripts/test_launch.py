"""Test the paper's launch scripts: errors, and behaviour that test_launch_commands.py does not record."""

import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data_sets import write_tokens
from tests.scripts.launching import launch, planned, value


def write_program(path: Path, lines: str) -> str:
    """Write a shell script, and return its path."""
    path.write_text(f"#!/usr/bin/env bash\n{lines}\n")
    path.chmod(0o755)
    return str(path)


def test_missing_and_double_shards_are_named(tmp_path: Path) -> None:
    names = [f"pile_{number:02}_text_document" for number in (0, *range(5, 30))]
    for name in names:
        (tmp_path / f"{name}.bin").touch()
    result = planned("182m_remoe", DATA_PATH="", DATA_DIR=str(tmp_path))
    assert "missing: 01 02 03 04;" in result.stderr and f"1.0 {tmp_path}/{names[0]}" in result.stdout
    (tmp_path / "07_text_document.bin").touch()
    result = planned("182m_remoe", DATA_PATH="", DATA_DIR=str(tmp_path))
    assert result.returncode == 2 and "shard 07 twice" in result.stderr


@pytest.mark.parametrize(("documents", "split"), [(1000, "969,30,1"), (100, "98,1,1"), (5, "34,33,33")])
def test_few_documents_have_a_split_that_leaves_no_part_empty(documents: int, split: str, tmp_path: Path) -> None:
    write_tokens(tmp_path / "a_document", np.arange(documents, dtype=np.uint16) % 300, [1] * documents)
    data = {"DATA_PATH": "", "DATA_DIR": str(tmp_path)}
    result = planned("182m_moe", **data)
    assert value(shlex.split(result.stdout), "--split") == split, result.stderr
    assert (f"Split: {split}" in result.stderr) == (split != "969,30,1")
    cache = value(shlex.split(result.stdout), "--data-cache-path")
    write_tokens(tmp_path / "a_document", np.arange(7, dtype=np.uint16), [1] * 7)
    result = planned("182m_moe", "8", "--", "--split", "8,1,1", **data)
    assert value(shlex.split(result.stdout), "--data-cache-path") != cache, "an index of other data"
    assert "Split" not in result.stderr and value(shlex.split(result.stdout), "--split") == "8,1,1"


@pytest.mark.parametrize(("given", "expected"), [
    ("a b", "30 a 10 b"),
    ("a\nb", "30 a 10 b"),
    ("2 a 1 b", "2 a 1 b"),
    ("1e-1 a\n2 b", "1e-1 a 2 b"),
    ("a c", "a c"),
])  # fmt: skip
def test_data_sets_are_weighted_by_size(given: str, expected: str, tmp_path: Path) -> None:
    """Megatron repeats only data sets with weights. A missing file is reported by the run."""
    for name, size in (("a", 30), ("b", 10)):
        (tmp_path / f"{name}.bin").write_bytes(bytes(size))
    words = shlex.split(planned("182m_moe", folder=tmp_path, DATA_PATH=given).stdout)
    assert " ".join(words[words.index("--data-path") + 1 : words.index("--split")]) == expected


ENGINE, APEX = "transformer_engine/__init__.py", "fused_weight_gradient_mlp_cuda.py"
HIDING, HIDDEN = "sitecustomize.py", "import sys; sys.modules['transformer_engine'] = None"
BROKEN = "raise RuntimeError('curand shared object not found.')"
UNFUSED = "--no-gradient-accumulation-fusion"
WITH_ENGINE = ["transformer_engine", "--moe-grouped-gemm"]


@pytest.mark.parametrize(("modules", "flags", "layers", "expected"), [
    ({APEX: "", HIDING: HIDDEN}, [], "plain PyTorch (Transformer Engine: not installed)", ["local"]),
    ({ENGINE: ""}, [], "Transformer Engine", [*WITH_ENGINE, UNFUSED]),
    ({ENGINE: "print('hello')", APEX: ""}, [], "Transformer Engine", WITH_ENGINE),
    ({ENGINE: BROKEN}, [], "RuntimeError: curand shared object not found.)", ["local", UNFUSED]),
    ({ENGINE: ""}, ["--transformer-impl", "local"], "not asked for", ["local", UNFUSED]),
])  # fmt: skip
def test_kernels(modules: dict[str, str], flags: list[str], layers: str, expected: list[str], tmp_path: Path) -> None:
    """The command uses only kernels that can be imported, and one line on stderr names the layers."""
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


@pytest.mark.parametrize(("name", "expected"), [("NVIDIA H100 80GB HBM3", "1"), ("NVIDIA GB200", "")])
def test_starts_on_gpus_as_it_says(name: str, expected: str, tmp_path: Path) -> None:
    """The training process gets the environment variables of the log's first line; nvidia-smi and Python are stubs."""
    answers = {
        "nvidia-smi": f'printf "%s\\n" "{name}" "{name}"',
        "python": f'[[ ${{2-}} == *device_count* ]] && echo 2 && exit\n[[ $1 == -m ]] || exec {sys.executable} "$@"\n'
        'echo "connections=${CUDA_DEVICE_MAX_CONNECTIONS-} memory=${PYTORCH_CUDA_ALLOC_CONF-}"',
    }
    for program, lines in answers.items():
        write_program(tmp_path / program, lines)
    for file in ("encoder.json", "vocab.bpe"):
        (tmp_path / file).touch()
    (tmp_path / HIDING).write_text(HIDDEN)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "TP": "2"}
    environment |= {"DATA_DIR": str(tmp_path), "DATA_PATH": "pile", "OUTPUT_DIR": str(tmp_path / "run")}
    environment["PYTHONPATH"] = str(tmp_path)
    result = launch("182m_remoe", "2", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"connections={expected} memory=expandable_segments:True"
    assert result.stderr == "Layers: plain PyTorch (Transformer Engine: not installed)\n"
    written = "env CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_CUDA" if expected else "env PYTORCH_CUDA"
    assert (tmp_path / "run" / "train.log").read_text().startswith(written)


@pytest.mark.parametrize(("rank", "written"), [("0", "train.log"), ("1", "train.node1.log")])
def test_each_node_has_its_own_log(rank: str, written: str, tmp_path: Path) -> None:
    """All nodes can share the folder."""
    python = write_program(tmp_path / "python", f'[ "$1" = -m ] || exec {sys.executable} "$@"')
    environment = TWO | {"NODE_RANK": rank, "DATA_PATH": "pile", "OUTPUT_DIR": str(tmp_path), "PYTHON": python}
    result = launch("182m_remoe", "1", "--", "--cpu", "--tokenizer-type", "NullTokenizer", **environment)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", written]


@pytest.mark.parametrize(("switch", "nodes", "code"), [("0", "2", 2), ("0", "1", 0), ("command", "2", 0)])
def test_several_nodes_do_not_choose_different_layers(switch: str, nodes: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / ENGINE).write_text(BROKEN)
    stub = f'case "$*" in *count*) echo 1;; -m*) ;; *) exec {sys.executable} "$@";; esac'
    environment = TWO | {"NNODES": nodes, "NODE_RANK": "0", "DATA_PATH": "pile", "PYTHONPATH": str(tmp_path)}
    environment |= {
        "OUTPUT_DIR": str(tmp_path / "run"),
        "PYTHON": write_program(tmp_path / "python", stub),
        "DRY_RUN": switch,
    }
    result = launch("182m_remoe", "1", "--", "--tokenizer-type", "NullTokenizer", **environment)
    assert result.returncode == code and ("--transformer-impl local" in result.stderr) == bool(code), result.stderr


TO_TRAIN, TWO = {"DRY_RUN": "0"}, {"NNODES": "2", "MASTER_ADDR": "first"}


@pytest.mark.parametrize(("words", "environment", "facts"), [
    ("", TO_TRAIN | {"DATA_PATH": ""}, "set DATA_PATH"),
    ("", {"DATA_PATH": "", "DATA_DIR": "/nowhere"}, "DATA_DIR=/nowhere"),
    ("", TO_TRAIN | {"DATA_DIR": "/nowhere"}, "VOCAB_FILE: /nowhere/encoder.json"),
    ("two", {}, "gpus_per_node 'two'"),
    ("8 1 1 8 1 p extra", {}, "extra"),
    ("8 -- --cpu --tokenizer-type NullTokenizer", TO_TRAIN | {"SLURM_NNODES": "2"}, "SLURM_NNODES=2 MASTER_ADDR"),
    ("8", TWO | {"RANK": "2"}, "RANK '2' NNODES=2"),
    ("8 -- --cpu --tokenizer-type NullTokenizer", TO_TRAIN | TWO | {"PYTHON": "true"}, "NODE_RANK NNODES=2"),
    ("8", {"PP": "2", "VPP": "5", "MODEL": "hybrid"}, "PP=2 VPP=5 12 layers"),
    ("8", {"MODEL": "mamba"}, "MODEL=mamba hybrid"),
    ("8 -- --num-layers 2", {"MODEL": "hybrid"}, "--num-layers --hybrid-layer-pattern"),
    ("8", {"KERNELS": "cuda"}, "KERNELS=cuda triton"),
    ("8", {"CP": "2"}, "CP=2 --transformer-impl"),
])  # fmt: skip
def test_errors(words: str, environment: dict[str, str], facts: str) -> None:
    result = planned("182m_remoe", *words.split(), **environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert all(fact in result.stderr for fact in facts.split()), result.stderr


def test_too_few_gpus(tmp_path: Path) -> None:
    """More processes than GPUs are refused; without GPUs each process would train on the CPU."""
    environment = {"PYTHON": write_program(tmp_path / "python", "echo 2"), "OUTPUT_DIR": str(tmp_path / "run")}
    result = planned("182m_remoe", "8", "--", "--tokenizer-type", "NullTokenizer", **TO_TRAIN, **environment)
    assert result.returncode == 2 and "sees 2 GPUs" in result.stderr and "--cpu" in result.stderr
    assert not (tmp_path / "run").exists()
