"""Test machines without a C compiler, Triton, a GPU, or a Transformer Engine that works."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
import tomllib
from contextlib import nullcontext
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

from megatron.remoe.files.errors import DataError, UsageError
from megatron.remoe.start import machine
from tests.trainings import REPOSITORY

IMPORT_MEGATRON = "import megatron.core.tensor_parallel.layers as layers; print('have', layers.HAVE_TE)"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Simulate a machine without any program and without settings of torch.compile."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "CC", "RANK"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    return monkeypatch


def add_program(folder: Path, name: str) -> None:
    (folder / name).touch(mode=0o755)


def double(values: torch.Tensor) -> torch.Tensor:
    return 2 * values


@pytest.mark.parametrize(
    ("program", "variables", "missing"),
    [
        ("gcc", {}, ""),
        ("gcc", {"CC": "icc"}, "no C compiler (icc)"),  # Triton uses it without a check
        ("other", {"TORCH_COMPILE_DISABLE": "1"}, ""),  # set by the user
        ("gcc", {"include": "elsewhere"}, "elsewhere/Python.h (of python3-dev)"),
    ],
)
def test_what_compiling_needs(
    program: str, variables: dict[str, str], missing: str, without, capsys, tmp_path: Path
) -> None:
    add_program(tmp_path, program)
    for name, value in variables.items():
        without.setenv(name, value)
    if "include" in variables:
        without.setattr(sysconfig, "get_path", lambda *_: variables["include"])
    machine.disable_compilation()
    said = capsys.readouterr().err
    assert missing in said and bool(said) == bool(missing)
    assert os.environ.get("TORCHDYNAMO_DISABLE") == ("1" if missing else None)
    if missing:
        assert torch.compile(double) is double, "the setting that the installed torch reads"


@pytest.mark.parametrize(
    ("on_cpu", "program", "interpreted", "words"),
    [
        (True, "gcc", "0", "no GPU"),
        (False, "other", "0", "no C compiler (gcc or clang)"),
        (False, "gcc", "0", ""),
        (True, "other", "1", ""),
    ],
)
def test_triton_kernels_where_they_can_run(
    on_cpu: bool, program: str, interpreted: str, words: str, without, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    add_program(tmp_path, program)
    without.setenv("TRITON_INTERPRET", interpreted)
    machine.check_kernels("torch", on_cpu)
    if not words:
        return machine.check_kernels("triton", on_cpu)
    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        machine.check_kernels("triton", on_cpu)
    assert refused.value.code == "REMOE-E102"


def test_triton_kernels_without_triton(without, tmp_path: Path) -> None:
    add_program(tmp_path, "gcc")
    without.setitem(sys.modules, "triton", None)
    with pytest.raises(UsageError, match=r"Triton cannot be imported \(\w+: .*triton"):
        machine.check_kernels("triton", on_cpu=False)


def engine(folder: Path, start: str) -> None:
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f"{start}\n__version__ = '2.20.2'\n")
    (package / "pytorch.py").touch()


def python(lines: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{path}:{REPOSITORY}", "RANK": "0"}
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_broken_engine_counts_as_not_installed(on_cpu: bool, tmp_path: Path) -> None:
    engine(tmp_path, "raise RuntimeError('curand shared object not found.\\nand more')")
    assert "curand shared object not found" in python(IMPORT_MEGATRON, tmp_path).stderr, "Megatron bears it by now"
    call = f"from megatron.remoe.start import machine; machine.disable_unavailable({on_cpu})\n"
    result = python(2 * call + IMPORT_MEGATRON, tmp_path)
    assert "have False" in result.stdout, result.stderr
    expected = "Transformer Engine cannot be imported (RuntimeError: curand shared object not found.) and counts as"
    assert result.stderr.count(expected) == (0 if on_cpu else 1)


def test_an_engine_that_works_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    engine(tmp_path, "")
    monkeypatch.syspath_prepend(tmp_path)
    machine.disable_broken_engine(notify=True)
    assert all(sys.modules.pop(name) for name in ("transformer_engine.pytorch", "transformer_engine"))
    assert not capsys.readouterr().err


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA brings none of them")
@pytest.mark.parametrize("library", ["cudnn", "nvrtc", "curand"])
def test_the_gpu_extra_has_what_the_engine_loads(library: str) -> None:
    """The libraries that Transformer Engine's common/__init__.py must load by name come with torch or the extra."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    brought = [*(requires("torch") or []), *project["optional-dependencies"]["gpu"]]
    assert any(library in requirement for requirement in brought)


@pytest.mark.parametrize("local", ["", "4", "2"])
def test_only_node_may_have_no_gpu(local: str, without: pytest.MonkeyPatch) -> None:
    without.setenv("WORLD_SIZE", "4")
    without.setenv("LOCAL_WORLD_SIZE", local)
    if not local:  # started without torchrun
        without.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(DataError, match=socket.gethostname()) if local == "2" else nullcontext():
        machine.check_node()
