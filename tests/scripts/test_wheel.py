"""Test the wheel: its contents, and the installed command."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny_model import SIZES
from tools.console.places import ROOT
from tools.runs.log_reader import read_log
from tools.text.corpora.dataset import byte_level_vocabulary


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build this tree's wheel in a copy, because setuptools writes next to the sources."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    for name in ("megatron", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "scripts"):
        (copy / name).mkdir()
        (copy / name / "stray.py").touch()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    built = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").iterdir()
    return path


def test_the_wheel_holds_the_package_and_leaves_the_namespace_open(wheel: Path) -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron").rglob("*.py")}
    tools = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").rglob("*.py")}
    sources |= {f"megatron/remoe/{path}" for path in tools}
    assert {"megatron/remoe/__init__.py", "megatron/remoe/tools/models/hf/opening.py"} <= sources
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        points = archive.read(entry_points).decode()
        assert "remoe-pretrain = megatron.remoe.pretrain:main" in points and "[vllm.general_plugins]\nremoe" in points
    assert {name for name in names if name.endswith(".py")} == sources
    others = {path.relative_to(ROOT) for suffix in ("json", "html") for path in (ROOT / "tools").rglob(f"*.{suffix}")}
    assert names >= {"megatron/remoe/py.typed", *(f"megatron/remoe/{path}" for path in others)}
    assert "megatron/__init__.py" not in names
    assert all(name.startswith("megatron/remoe/") for name in names)


def test_the_installed_command_preprocesses_and_trains(wheel: Path, tmp_path: Path) -> None:
    site, text = tmp_path / "site", tmp_path / "text.jsonl"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    given = os.environ | {"PYTHONPATH": str(site)}

    def remoe(*words: str, **variables: str) -> str:
        command = [sys.executable, str(site / "bin" / "remoe"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=given | variables, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        return done.stdout

    assert remoe("generate", "--help").startswith("usage: ") and "quickstart" in remoe()
    text.write_text("".join(json.dumps({"text": f"{number} " * 60}) + "\n" for number in range(50)))
    vocabulary = ["--vocab-file", "vocab.json", "--merge-file", "merges.txt"]
    byte_level_vocabulary(tmp_path)
    remoe("preprocess", "--input", str(text), "--output-prefix", "data", "--append-eod", *vocabulary,
          "--tokenizer-type", "GPT2BPETokenizer")  # fmt: skip
    small = [*SIZES, *"--global-batch-size 4 --eval-iters 1 --log-interval 1 --cpu".split()]
    trained = remoe("train", "182m", "remoe", "1", "2", "2", "--", *small, DATA_PATH="data_text_document",
                    VOCAB_FILE="vocab.json", MERGE_FILE="merges.txt")  # fmt: skip
    assert len(read_log(trained)) == 2
