"""What the built wheel holds, how it is imported, and the versions of what it needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.common.places import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built in a copy, since setuptools leaves its traces beside the sources."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    shutil.copytree(ROOT / "megatron", copy / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "tools", "scripts"):
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
    assert "megatron/remoe/__init__.py" in sources
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    assert {name for name in names if name.endswith(".py")} == sources
    assert "megatron/__init__.py" not in names
    assert all(name.startswith("megatron/remoe/") for name in names)


def editable_here() -> bool:
    origins = [found.read_text("direct_url.json") or "{}" for found in distributions(name="megatron-remoe")]
    return any(json.loads(origin).get("url") == ROOT.as_uri() for origin in origins)


def imported_files(folder: Path, **variables: str) -> list[Path]:
    """Where megatron.core and megatron.remoe come from in a program that is run in `folder`."""
    code = "import megatron.core, megatron.remoe; print(megatron.core.__file__, megatron.remoe.__file__, sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [sys.executable, "-W", "ignore", "-c", code]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return [Path(line) for line in answer.stdout.splitlines()[-2:]]


def test_the_wheel_imports_beside_megatron_core(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    core, remoe = imported_files(tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert remoe == tmp_path / "site/megatron/remoe/__init__.py"
    assert core.exists() and not core.is_relative_to(tmp_path)


@pytest.mark.skipif(not editable_here(), reason="this tree is not installed in editable mode")
def test_the_editable_install_imports_beside_megatron_core_from_any_folder(tmp_path: Path) -> None:
    core, remoe = imported_files(tmp_path)
    assert remoe == ROOT / "megatron/remoe/__init__.py"
    assert core.exists() and not core.is_relative_to(ROOT / "megatron")


def test_every_direct_dependency_has_its_exact_version() -> None:
    pinned = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert [clause.operator for clause in requirement.specifier] == ["=="], line
            pinned[normalized(requirement.name)] = next(iter(requirement.specifier)).version
    of_cuda = {name for name in pinned if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert of_cuda == {"nvidia-cuda-crt"}, "torch pins the others itself"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[normalized(requirement.name)]), line


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
