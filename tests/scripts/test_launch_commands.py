"""The launch scripts' commands are those of a recorded table.

`python -m tests.scripts.test_launch_commands` records it anew, after a change that is meant to change commands.
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.launching import ROUTINGS, SIZES, planned
from tests.trainings import REPOSITORY

TABLE = Path(__file__).with_name("launch_commands.json")
TWO = {"NNODES": "2", "MASTER_ADDR": "first"}
# Script, arguments, environment. Data are in the folders that `make_data` makes.
CASES: list[tuple[str, str, dict[str, str]]] = [
    *((f"{size}_{routing}", "", {}) for size in SIZES for routing in ROUTINGS),
    *((f"{size}_{routing}", "2 100 4 2", {"TP": "2"}) for size in SIZES for routing in ROUTINGS),
    *((f"{size}_remoe", "4 10 8 16 4 mine", {"EP": "4", "WANDB_API_KEY": "x"}) for size in SIZES),
    *(("182m_" + routing, "", {"MODEL": "hybrid", "PP": "2", "VPP": "3"}) for routing in ROUTINGS),
    ("182m_dense", "2 100 4 8 mine", {"WANDB_API_KEY": "x", "OUTPUT_DIR": "runs here"}),
    ("182m_dense", "2 100 4 8 mine more", {}),
    ("182m_dense", "2 100 4 0", {}),
    ("182m_dense", "", {"EP": "3"}),
    ("182m_dense", "", {"EP": "x"}),
    ("978m_dense", "", {"MODEL": "hybrid", "TP": "4"}),
    ("469m_moe", "8", {"TP": "2", "PP": "2", "EP": "4", "NODE_RANK": "1", **TWO}),
    ("469m_moe", "8", {"CP": "2", "GPU": "b200", "MASTER_PORT": "1234", **TWO}),
    ("182m_moe", "8", {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "first"}),
    ("182m_moe", "8", {"RANK": "1", "SLURM_NODEID": "0", **TWO}),
    ("182m_moe", "8", {"RANK": "2", **TWO}),
    ("182m_moe", "8", {"NODE_RANK": "-1", **TWO}),
    ("182m_moe", "8", {"NNODES": "2"}),
    ("182m_moe", "8", {"NNODES": "two"}),
    ("182m_moe", "8 100 16 64 8", {"EP": "8", "KERNELS": "triton"}),
    ("182m_dense", "8", {"KERNELS": "triton", "TP": "2"}),
    ("182m_remoe", "8", {"KERNELS": "triton", "GPU": "a100"}),
    ("182m_remoe", "8", {"KERNELS": "cuda"}),
    ("182m_remoe", "8", {"MODEL": "mamba"}),
    ("182m_remoe", "8 -- --num-layers 2", {"MODEL": "hybrid"}),
    ("182m_remoe", "8 -- --num-layers=2", {"MODEL": "hybrid"}),
    ("182m_remoe", "8 -- --num-layers 2", {}),
    ("182m_remoe", "1 -- --cpu", {}),
    ("182m_remoe", "2 -- --cpu --lr 1e-3", {"TP": "2"}),
    ("182m_remoe", "8 -- --tokenizer-type NullTokenizer --vocab-size 257", {}),
    ("182m_remoe", "8 -- --transformer-impl local", {}),
    ("182m_remoe", "8 -- --transformer-impl=local --lr 1e-3", {}),
    ("182m_remoe", "8 -- --tensor-model-parallel-size 2 --sequence-parallel", {}),
    ("182m_remoe", "8 -- --tensor-model-parallel-size=1", {"TP": "2"}),
    ("182m_remoe", "8 -- --overlap-moe-expert-parallel-comm", {"TP": "2"}),
    ("182m_remoe", "8 -- --use-megatron-fsdp --use-torch-fsdp2", {"CP": "2"}),
    ("182m_remoe", "8 -- --cuda-graph-impl transformer_engine", {}),
    ("182m_remoe", "8 -- --cuda-graph-impl none --use-persistent-ckpt-worker", {}),
    ("182m_remoe", "8 -- --moe-z-loss-coeff 1e-3 -- more", {}),
    ("182m_remoe", "8 --", {}),
    ("182m_remoe", "8", {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "TP": "2", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ("182m_remoe", "8", {"CUDA_DEVICE_MAX_CONNECTIONS": "", "TP": "2", "GPU": "GB200"}),
    ("182m_remoe", "8", {"PYTORCH_ALLOC_CONF": "", "TP": "2", "GPU": "gh200"}),
    ("182m_remoe", "8", {"DATA_PATH": "1.0 a  0.5 b"}),
    ("182m_remoe", "8", {"DATA_PATH": "my data/ä b\n\n 0.5\tc d \n"}),
    ("182m_remoe", "8", {"DATA_PATH": "one data/it's mine"}),
    ("182m_remoe", "8", {"DATA_PATH": ""}),
    ("182m_remoe", "8", {"DATA_PATH": "", "DATA_DIR": "pile"}),
    ("182m_remoe", "8", {"DATA_PATH": "", "DATA_DIR": "pile/"}),
    ("182m_moe", "8", {"DATA_PATH": "", "DATA_DIR": "prefixed pile"}),
    ("182m_moe", "8", {"DATA_PATH": "", "DATA_DIR": "part"}),
    ("182m_moe", "8", {"DATA_PATH": "", "DATA_DIR": "one data"}),
    ("182m_moe", "8", {"DATA_PATH": "", "DATA_DIR": "twice"}),
    ("182m_moe", "8", {"DATA_PATH": "", "DATA_DIR": "nowhere"}),
    ("182m_moe", "8", {"VOCAB_FILE": "my vocab.json", "MERGE_FILE": "merges"}),
    ("182m_moe", "8", {"DATA_DIR": "part", "VOCAB_FILE": "v"}),
    ("182m_moe", "two", {}),
    ("182m_moe", "8 0", {}),
    ("182m_moe", "8 1 -1", {}),
    ("182m_moe", "8 1 1 08", {}),
    ("182m_moe", "8 1 1 8 1.5", {}),
    ("182m_moe", "8 1 1 8 1 a/b", {}),
    ("182m_moe", "8 1 1 8 1 p extra", {}),
    ("182m_moe", "3 10 2 3", {"EP": "3"}),
    ("182m_moe", "8 10 2 8", {"EP": "3"}),
    ("182m_moe", "8", {"TP": "8"}),
    ("182m_moe", "2", {"TP": "4"}),
    ("182m_moe", "8", {"PP": "2", "VPP": "5"}),
    ("182m_moe", "8", {"VPP": "2"}),
    ("182m_moe", "8", {"PP": "0"}),
    ("978m_moe", "8", {"PP": "4", "VPP": "2", "CP": "2"}),
]
EMPTY_ARGUMENTS = ("182m_remoe", ["8", "", "", "16"])


def make_data(folder: Path) -> None:
    """Make empty data sets and vocabularies in `folder`."""
    shards = [f"{number:02}_text_document" for number in range(30)]
    files = {
        "pile": ["gpt2-vocab.json", "gpt2-merges.txt", *(f"{name}.bin" for name in shards)],
        "prefixed pile": ["encoder.json", "vocab.bpe", "notes_document.bin", *(f"pile_{name}.bin" for name in shards)],
        "part": [f"{name}.bin" for name in shards[:3]],
        "one data": ["it's mine.bin", "a_document.bin", "a_document.idx"],
        "twice": ["07_text_document.bin", "pile_07_text_document.bin"],
        ".": ["gpt2-vocab.json", "gpt2-merges.txt"],
    }
    for name, contents in files.items():
        (folder / name).mkdir(exist_ok=True)
        for content in contents:
            (folder / name / content).touch()


def ask(folder: Path, script: str, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Return the exit code and the command that a script prints in `folder`, with placeholders for paths."""
    result = planned(script, *arguments, folder=folder, **environment)
    assert result.returncode == 0 or result.stdout == "", result.stdout
    printed = result.stdout.replace(sys.executable, "PYTHON").replace(str(REPOSITORY), "REPOSITORY")
    return result.returncode, shlex.join(shlex.split(printed))


def record(folder: Path) -> dict[str, Any]:
    """Return the table: pieces that commands have in common, and for each case its exit code and pieces."""
    pieces: dict[str, int] = {}
    cases = [(script, words.split(), environment) for script, words, environment in CASES]
    cases.append((*EMPTY_ARGUMENTS, {}))
    rows = []
    for script, arguments, environment in cases:
        code, printed = ask(folder, script, arguments, environment)
        places = [pieces.setdefault(piece, len(pieces)) for piece in printed.split(" --")] if printed else []
        rows.append([script, arguments, environment, code, places])
    return {"pieces": list(pieces), "cases": rows}


def read() -> list[Any]:
    """Return script, arguments, environment, exit code and printed command of each case."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return [[*case[:4], " --".join(table["pieces"][place] for place in case[4])] for case in table["cases"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("launches")
    make_data(made)
    return made


@pytest.mark.parametrize("case", read(), ids=lambda case: " ".join([case[0], *case[1], *case[2]]))
def test_command_is_as_recorded(case: list[Any], folder: Path) -> None:
    script, arguments, environment, code, printed = case
    assert ask(folder, script, arguments, environment) == (code, printed)


def main() -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name))
        table = record(Path(name))
    rows = [f" {json.dumps(row, ensure_ascii=False)}" for row in table["cases"]]
    pieces = [f" {json.dumps(piece, ensure_ascii=False)}" for piece in table["pieces"]]
    text = '{"pieces": [\n' + ",\n".join(pieces) + '\n], "cases": [\n' + ",\n".join(rows) + "\n]}\n"
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
