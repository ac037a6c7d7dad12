"""The paper's launch scripts: what they would run, their errors, and one of them for real on the CPU."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripts.launching import SCRIPTS, SIZES, command, launch, shards, value
from tests.trainings import REPOSITORY, SMALL, records
from tools.common.flags import parse


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
    assert value(words, "--save").endswith("/runs/llama_182m_remoe_e16g2_mine/checkpoints")
    assert value(command("182m_remoe", WANDB_API_KEY="x"), "--wandb-exp-name") == "llama_182m_remoe_e8g1"


def test_ffn_expansion_is_the_forks() -> None:
    """Of 4 x hidden: the paper's Dense x 8 is 8."""
    for given, expansion in (("", 1), ("8", 8)):
        result = launch("182m_dense", "2", "100", "4", given, DRY_RUN="command", DATA_PATH="pile")
        assert result.stderr.startswith(f"FFN: {expansion * 4 * 768} = {expansion} x 4 x 768\n")
        words = shlex.split(result.stdout)
        assert value(words, "--ffn-hidden-size") == str(expansion * 4 * 768)
        assert value(words, "--save").endswith(f"/runs/llama_182m_dense_ffn{4 * expansion}/checkpoints")


def data_path(words: list[str]) -> list[str]:
    return words[words.index("--data-path") + 1 : words.index("--split")]


@pytest.mark.parametrize("form", ["{}", "pile_{}"])
def test_data_folder(form: str, tmp_path: Path) -> None:
    """A whole Pile: the fork's mixture, other files named. Else all with equal weights, missing shards named."""
    folder = tmp_path / "dätä of mine"
    names = [form.format(f"{number:02}") for number in range(30)]
    some = shards(folder, [names[0], *names[5:]])
    result = launch("182m_remoe", DRY_RUN="command", DATA_DIR=str(folder))
    assert data_path(shlex.split(result.stdout)) == some
    assert "missing: 01 02 03 04; " in result.stderr and "shard 00 too" in result.stderr
    all_but_first = shards(folder, names[1:])
    result = launch("182m_remoe", DRY_RUN="command", DATA_DIR=str(folder))
    assert data_path(shlex.split(result.stdout)) == all_but_first
    assert f"Data: the Pile's shards 01 to 29; left out: {names[0]}_text_document\n" in result.stderr
    (folder / "pile_07_text_document.bin").touch()
    (folder / "07_text_document.bin").touch()
    result = launch("182m_remoe", DRY_RUN="command", DATA_DIR=str(folder))
    assert result.returncode == 2 and "has shard 07 twice, as 07_text_document and as pile_07" in result.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("pile", ["pile"]),
        ("1.0 a  0.5 b", ["1.0", "a", "0.5", "b"]),
        ("my data/ä b\nc", ["my data/ä b", "c"]),
        ("1.0 my data/ä\n\n  0.5\tb c \n", ["1.0", "my data/ä", "0.5", "b c"]),
        ("1.0\na\n2\nb", ["1.0", "a", "2", "b"]),
        ("{folder}/one data set", ["{folder}/one data set"]),
    ],
)
def test_data_path_by_words_or_lines(given: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "one data set.bin").touch()
    words = command("182m_remoe", DATA_PATH=given.format(folder=tmp_path))
    assert data_path(words) == [word.format(folder=tmp_path) for word in expected]


def test_vocabulary_files_under_either_name(tmp_path: Path) -> None:
    data = tmp_path / "pile gpt2"
    data.mkdir()
    for files in (("../gpt2-vocab.json", "../gpt2-merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"),
                  ("encoder.json", "vocab.bpe")):  # fmt: skip
        for name in files:
            (data / name).touch()
        words = command("182m_remoe", DATA_DIR=str(data))
        assert (value(words, "--vocab-file"), value(words, "--merge-file")) == tuple(f"{data}/{name}" for name in files)


def test_kernels_that_are_asked_for() -> None:
    result = launch("182m_remoe", DRY_RUN="command", DATA_PATH="pile", KERNELS="triton")
    words, without = shlex.split(result.stdout), command("182m_remoe")
    fusions = {"--cross-entropy-loss-fusion", "--ddp-average-in-collective"}
    assert value(words, "--moe-kernels") == "triton" and fusions <= set(words)
    assert "KERNELS=triton: --moe-kernels triton --cross-entropy-loss-fusion" in result.stderr
    assert not {"--moe-kernels", *fusions} & set(without)
    left_out = {"--no-rope-fusion", "--no-gradient-accumulation-fusion"}
    assert left_out <= set(without) and not left_out & set(words)


def test_layout_and_nodes() -> None:
    words = command("469m_remoe", "8", TP="2", PP="2", EP="4", NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    assert value(words, "--expert-model-parallel-size") == "4"
    assert value(words, "--node-rank") == "1" and value(words, "--master-addr") == "first"
    assert "--sequence-parallel" in words and "--standalone" not in words


@pytest.mark.parametrize(("routing", "layer"), [("dense", "*-"), ("moe", "*E"), ("remoe", "*E")])
@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (2, 3)])
def test_models_differ_in_their_layers_alone(routing: str, layer: str, pp: int, vpp: int) -> None:
    layout = {"PP": str(pp), "VPP": str(vpp)}
    gpt, hybrid = (parse(command(f"182m_{routing}", MODEL=model, **layout)) for model in ("gpt", "hybrid"))
    assert hybrid.pop("--hybrid-layer-pattern") == ("|".join([layer * (12 // (pp * vpp))] * (pp * vpp)),)
    assert gpt.pop("--num-layers") == ("12",)
    assert gpt.pop("--num-virtual-stages-per-pipeline-rank", ("1",)) == (str(vpp),)
    assert gpt == hybrid


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, "0"), ({"SLURM_NODEID": "1"}, "1"), ({"SLURM_NODEID": "1", "RANK": "2"}, "2"),
     ({"RANK": "1", "NODE_RANK": "2"}, "2")],
)  # fmt: skip
def test_node_rank(environment: dict[str, str], rank: str) -> None:
    words = command("182m_remoe", NNODES="4", MASTER_ADDR="first", **environment)
    assert value(words, "--node-rank") == rank


ENGINE, APEX = "transformer_engine/__init__.py", "fused_weight_gradient_mlp_cuda.py"
BROKEN = "raise RuntimeError('curand shared object not found.\\nand more')"
UNFUSED = "--no-gradient-accumulation-fusion"


@pytest.mark.parametrize(
    ("modules", "flags", "layers", "expected"),
    [
        ({}, [], "plain PyTorch (Transformer Engine: not installed)", ["local", UNFUSED]),
        ({APEX: ""}, [], "plain PyTorch (Transformer Engine: not installed)", ["local"]),
        ({ENGINE: ""}, [], "Transformer Engine", ["transformer_engine", "--moe-grouped-gemm", UNFUSED]),
        ({ENGINE: "print('hello')", APEX: ""}, [], "Transformer Engine", ["transformer_engine", "--moe-grouped-gemm"]),
        (
            {ENGINE: "", APEX: "raise ImportError('libc10.so')"},
            [],
            "Transformer Engine",
            ["transformer_engine", "--moe-grouped-gemm", UNFUSED],
        ),
        (
            {ENGINE: BROKEN},
            [],
            "plain PyTorch (Transformer Engine cannot be imported: RuntimeError: curand shared object not found.)",
            ["local", UNFUSED],
        ),
        (
            {ENGINE: ""},
            ["--transformer-impl", "local"],
            "plain PyTorch (Transformer Engine: not asked for)",
            ["local", UNFUSED],
        ),
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
    assert result.stderr == f"Layers: {layers}\n"
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
        ({}, [], [GROWING]),
        ({"TP": "2"}, [], [ONE, GROWING]),
        ({"CP": "2", "GPU": "a100"}, [], [ONE, GROWING]),
        ({}, ["--tensor-model-parallel-size=2"], [ONE, GROWING]),
        ({"TP": "2"}, ["--tensor-model-parallel-size", "1"], [GROWING]),
        ({"TP": "2", "GPU": "b200"}, [], [GROWING]),
        ({"TP": "2", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}, [], ["CUDA_DEVICE_MAX_CONNECTIONS=8", GROWING]),
        ({"TP": "2"}, ["--overlap-moe-expert-parallel-comm"], [GROWING]),
        ({"TP": "2"}, ["--use-torch-fsdp2"], [GROWING]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, [], ["PYTORCH_CUDA_ALLOC_CONF=backend:native"]),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, [], []),
        ({}, ["--cuda-graph-impl", "transformer_engine"], []),
        ({}, ["--cuda-graph-impl", "none"], [GROWING]),
        ({}, ["--use-nccl-ub"], []),
        ({"TP": "2"}, ["--cpu"], []),
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


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {"DRY_RUN": "0", "DATA_PATH": ""}, "no data: set DATA_PATH"),
        ([], {"DRY_RUN": "command", "DATA_PATH": ""}, "no data: set DATA_PATH"),
        ([], {"DATA_PATH": "", "DATA_DIR": "/nowhere"}, "no *_document.bin in DATA_DIR=/nowhere"),
        ([], {"DRY_RUN": "0", "DATA_DIR": "/nowhere"}, "VOCAB_FILE: there is no /nowhere/encoder.json"),
        (["two"], {}, "gpus_per_node is 'two'"),
        (["8", "0"], {}, "train_iters is '0'"),
        (["8", "1", "1", "100000000000000000000"], {}, "num_experts is '100000000000000000000'"),
        (["8", "1", "1", "1024", "1024"], {}, "num_experts x granularity is '1048576'"),
        (["8"], {"NNODES": TOO_LARGE, "MASTER_ADDR": "first"}, f"NNODES is '{TOO_LARGE}'"),
        (["4", "1", "1", "64"], {"EP": "8"}, "EP=8 does not fit"),
        (["8", "1", "1", "64"], {"EP": "8", "TP": "2"}, "EP=8 does not fit"),
        (["8", "1", "1", "8", "1", "p", "extra"], {}, "too many arguments: extra"),
        (["2"], {"EP": "3"}, "EP=3 does not divide the 8 experts"),
        (["2"], {"TP": "4"}, "cannot be split into TP=4"),
        (["8"], {"TP": "8"}, "TP=8 does not divide the 12 attention heads"),
        (["8"], {"VPP": "2"}, "VPP=2 divides pipeline stages, and PP is 1: set PP to at least 2"),
        (["8"], {"PP": "2", "VPP": "5"}, "PP=2 x VPP=5 does not divide the 12 layers"),
        ([], {"MODEL": "mamba"}, "MODEL=mamba: choose gpt or hybrid"),
        (["8", "--", "--num-layers", "2"], {"MODEL": "hybrid"}, "takes no --num-layers: give --hybrid-layer-pattern"),
        (["8"], {"NNODES": "2"}, "needs MASTER_ADDR"),
        (["8"], {"NNODES": "2", "MASTER_ADDR": "first", "RANK": "2"}, "is '2': give a number below NNODES=2"),
        (["8", "1", "1", "8", "1", "a/b"], {}, "project_name is 'a/b': it becomes part of a folder's name"),
        (
            [],
            {"DRY_RUN": "0", "DATA_PATH": "my pile"},
            "there is no my.bin. If a prefix has blanks, give each data set",
        ),
        ([], {"KERNELS": "cuda"}, "KERNELS=cuda: choose triton, or leave it unset"),
    ],
)
def test_errors(arguments: list[str], environment: dict[str, str], message: str) -> None:
    result = launch("182m_remoe", *arguments, **({"DRY_RUN": "1", "DATA_PATH": "pile"} | environment))
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_dense_model_is_not_too_wide() -> None:
    result = launch("182m_dense", "8", "1", "1", TOO_LARGE, DRY_RUN="1")
    assert result.returncode == 2 and f"ffn_expansion is '{TOO_LARGE}'" in result.stderr


def test_experts_of_their_own_tensor_parallel_size() -> None:
    flags = ["--", "--expert-tensor-parallel-size", "1"]
    assert command("182m_remoe", "8", "1", "1", "64", *flags, EP="8", TP="2")


@pytest.mark.parametrize(
    ("gpus", "visible", "asked", "message"),
    [
        (0, {}, "1", "gpus_per_node is 1, and 0 GPUs were found"),
        (2, {}, "8", "gpus_per_node is 8, and 2 GPUs were found. Ask for at most 2"),
        (2, {"CUDA_VISIBLE_DEVICES": "1"}, "2", "gpus_per_node is 2, and 1 GPUs"),
        (2, {"CUDA_VISIBLE_DEVICES": ""}, "1", "and 0 GPUs were found"),
    ],
)
def test_too_few_gpus(gpus: int, visible: dict[str, str], asked: str, message: str, tmp_path: Path) -> None:
    """Without this, Megatron would train on the CPU, one process for each missing GPU."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nseq -f 'GPU %g: H100' " f"{gpus}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).touch()
    environment = {"DATA_DIR": str(tmp_path), "DATA_PATH": "pile", "OUTPUT_DIR": str(tmp_path / "run")} | visible
    result = launch("182m_remoe", asked, **environment, PATH=f"{tmp_path}:{os.environ['PATH']}")
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


FLAGS = [*SMALL, *"--split 90,10,0 --eval-iters 0 --save-interval 2".split()]


def training_environment(data: Path, tmp_path: Path) -> dict[str, str]:
    environment = {"DATA_PATH": str(data), "OUTPUT_DIR": str(tmp_path / "run"), "PYTHON": sys.executable}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def test_trains_and_resumes_on_the_cpu(data: Path, tmp_path: Path) -> None:
    """On paths with blanks and letters beyond ASCII."""
    folder = tmp_path / "dätä of mine"
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        (folder / f"a_document{suffix}").symlink_to(data.with_suffix(suffix))
    environment = training_environment(data, folder) | {"DATA_PATH": "", "DATA_DIR": str(folder)}
    for more, expected in ((["--exit-interval", "2"], [1, 2]), ([], [3, 4])):
        result = launch("182m_remoe", "1", "4", "2", "--", *FLAGS, *more, **environment)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
        assert list(records(result.stdout)) == expected
    assert {path.name for path in (folder / "run").iterdir()} == {
        "checkpoints",
        "command.sh",
        "tensorboard",
        "train.log",
    }
    # What a dry run tells of their number and size is what was written.
    environment |= {"DRY_RUN": "1"}
    result = launch("182m_remoe", "1", "4", "2", "--", *FLAGS, **environment)
    told = re.search(r"Checkpoints: (\d+) of (\S+) GB, (\S+) GB in all, one every 2 iterations", result.stdout)
    assert told is not None, result.stderr
    saved = list((folder / "run" / "checkpoints").glob("iter_*"))
    size = sum(path.stat().st_size for path in saved[0].iterdir()) / 1e9
    assert int(told[1]) == len(saved) == 2 and float(told[2]) == pytest.approx(size, rel=0.1, abs=0.05), size


RUN = """
import sys
from pathlib import Path
from tools.recipes.process import run_training
sys.exit(run_training(sys.argv[2:], Path(sys.argv[1])))
"""
LATE = """
import subprocess, sys, time
time.sleep(2)
subprocess.run([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_DFL); time.sleep(600)"])
"""


@pytest.mark.parametrize(("ending", "code"), [("exit 3", 3), ("kill -KILL $$", 137)])
def test_ends_with_the_trainings_exit_code_and_its_whole_log(ending: str, code: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    words = ["bash", "-c", f"echo out; echo err >&2; {ending}"]
    result = subprocess.run([sys.executable, "-c", RUN, log, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, "out\nerr\n")
    assert log.read_text() == "before\nout\nerr\n"


def test_a_signal_before_torchrun_has_children_is_not_lost(tmp_path: Path) -> None:
    words = [sys.executable, "-c", RUN, str(tmp_path / "log"), sys.executable, "-c", LATE]
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists():  # tee has started, and so has the training
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and output.splitlines()[0].startswith("Saving") and "Stopped" in output


@pytest.mark.parametrize("receivers", ["script", "all"])
def test_sigterm_saves_a_checkpoint(receivers: str, data: Path, tmp_path: Path) -> None:
    """A signal reaches the script alone (kill, docker stop), or every process of the job (a scheduler)."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    log, console = tmp_path / "run" / "train.log", tmp_path / "console"
    process = subprocess.Popen(
        [
            "bash",
            str(SCRIPTS / "train_llama_182m_remoe.sh"),
            "1",
            "100000",
            "2",
            "--",
            *FLAGS,
        ],
        stdout=console.open("w"),  # a pipe that nobody reads would fill and stop the training
        stderr=subprocess.STDOUT,
        env=kept | training_environment(data, tmp_path),
    )
    deadline = time.monotonic() + 120
    # Not before the first save: what that starts must survive the signal too.
    while not (log.exists() and "successfully saved checkpoint" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)
    targets = [process.pid]
    if receivers == "all":
        family = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = {int(pid): int(parent) for pid, parent in map(str.split, family.splitlines())}
        for _ in range(5):  # generations: script, job, torchrun, training
            targets += [pid for pid, parent in parents.items() if parent in targets and pid not in targets]
    for pid in targets:
        os.kill(pid, signal.SIGTERM)
    process.wait(timeout=60)
    output = console.read_text()
    assert process.returncode == 143, output
    assert output.splitlines()[-1].startswith("Stopped. The same command goes on from the last checkpoint")
    saved = int((tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved in (last := max(records(log.read_text())), last + 1)
    assert "exiting program after receiving SIGTERM" in log.read_text()
