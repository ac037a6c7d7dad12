"""Test that the imports of each room follow the table in docs/design.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from megatron import remoe
from tests.training_runs import REPOSITORY

PACKAGE = REPOSITORY / "megatron" / "remoe"
# Room → the rooms above it in this table that it may import.
ROOMS = {
    "kernels": set(),
    "routing": {"kernels"},
    "baselines": {"routing"},
    "transformer": {"kernels"},
    "layer": {"routing", "transformer", "kernels"},
    "files": set(),
    "start": {"routing", "files"},
    "patches": {"start", "routing", "transformer", "kernels", "files"},
    "training": {"routing", "baselines", "transformer", "layer", "kernels", "files", "start", "patches"},
    "hf": set(),
    "cpu": set(),
}
ROOMS["pretrain"] = {*ROOMS}
# Packages of Megatron that a room may import (default: core).
MEGATRON: dict[str, set[str]] = {"files": set(), "hf": set()}
MEGATRON |= dict.fromkeys(("start", "patches", "training", "cpu", "pretrain"), {"core", "training"})
# Packages outside the standard library that a room may import; rooms that are not here may import any.
PURE = {
    **dict.fromkeys(("routing", "baselines", "layer"), {"torch", "megatron"}),
    "transformer": {"torch", "megatron", "fla"},
    "kernels": {"torch", "triton", "megatron"},
    "hf": {"torch", "transformers", "huggingface_hub", "megatron"},
}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, including imports inside functions."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # transformers copies these files next to a model's weights, so they import each other relatively.
            assert not node.level or path.parent.name == "hf", f"{path}: relative import"
            package = "megatron.remoe.hf." if node.level else ""
            imported |= {f"{package}{node.module}.{alias.name}" for alias in node.names}
    return imported


def files(room: str) -> list[Path]:
    paths = sorted((PACKAGE / room).glob("*.py")) or [PACKAGE / f"{room}.py"]
    assert all(path.exists() for path in paths)
    return paths


def list_rooms(modules: set[str]) -> set[str]:
    return {module.split(".")[2] for module in modules if module.startswith("megatron.remoe.")}


def test_every_file_has_a_room() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms == {*ROOMS, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_downwards(room: str) -> None:
    assert ROOMS[room] <= {*[*ROOMS][: [*ROOMS].index(room)]}
    for path in files(room):
        modules = imports(path)
        assert list_rooms(modules) - {room} <= ROOMS[room], path
        megatrons = {module.split(".")[1] for module in modules if module.startswith("megatron.")} - {"remoe"}
        assert megatrons <= MEGATRON.get(room, {"core"}), path
        packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
        assert packages <= PURE.get(room, packages), path


def test_importing_the_package_or_the_entry_changes_nothing() -> None:
    lines = "import sys, signal, os; before = dict(os.environ), signal.getsignal(signal.SIGTERM)"
    lines += "; import megatron.remoe.pretrain"
    lines += "; assert before == (dict(os.environ), signal.getsignal(signal.SIGTERM))"
    lines += "; assert not {'torch', 'megatron.core', 'megatron.training'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", lines], cwd=REPOSITORY, check=True)


def test_public_names_are_there() -> None:
    for name in remoe.__all__:
        assert getattr(remoe, name).__module__.startswith("megatron.remoe."), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        remoe.nothing  # noqa: B018


def test_recipes_import_neither_plans_nor_models() -> None:
    for path in (REPOSITORY / "tools" / "recipes").glob("*.py"):
        above = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "level", 0) > 1]
        assert not {"plan", "models"} & {module.split(".")[0] for module in above}, path
