"""Another Megatron, put in front of the installed one without touching either."""

import filecmp
import runpy
import shutil
import subprocess
import sysconfig
import zipfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import Distribution, version
from importlib.util import find_spec
from pathlib import Path

from ..common.errors import ToolError

PACKAGE_INFO = Path("megatron/core/package_info.py")


@dataclass(frozen=True)
class Candidate:
    """A copy of a Megatron.

    Attributes:
        folder: for PYTHONPATH, whose parts of the namespace `megatron` stand before those of site-packages; it holds
            `megatron` and what tells its version, and no `tests` or `tools` that would take the place of ours. None is
            the installed Megatron.
        version: with the commit, where it is a checkout.
        date: of the commit or of the wheel's files.
    """

    folder: Path | None
    version: str
    date: str


def installed() -> Candidate:
    """The one that this project runs with."""
    return Candidate(None, version("megatron-core"), "")


def candidate(path: Path, folder: Path) -> Candidate:
    """Copy a checkout, a folder of installed packages or a wheel.

    Args:
        path: of it.
        folder: where the copy goes.

    Raises:
        ToolError: it holds no Megatron.
    """
    changed = ""
    if path.suffix == ".whl" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
            changed = date(*max(item.date_time for item in wheel.infolist())[:3]).isoformat()
    elif (path / PACKAGE_INFO).exists():
        # As a wheel has it: without the Makefile, which would compile the helpers for another Python.
        leave = shutil.ignore_patterns("__pycache__", "Makefile", "remoe")
        shutil.copytree(path / "megatron", folder / "megatron", ignore=leave)
        changed = _describe(path, folder)
    metadata = next(folder.glob("megatron_core-*.dist-info"), None)
    if metadata is None:
        raise ToolError(
            f"{path} is neither a Megatron-LM checkout, a folder that holds megatron/core, nor a wheel of it."
        )
    _add_helpers(folder)
    return Candidate(folder, Distribution.at(metadata).version, changed)


def _describe(path: Path, folder: Path) -> str:
    """Write what tells the version of a checkout, and return its date; both are copied from installed packages."""
    for metadata in path.glob("megatron_core-*.dist-info"):
        shutil.copytree(metadata, folder / metadata.name)
        return ""
    # A branch may call itself as a release that it is not.
    number = "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format(**runpy.run_path(str(path / PACKAGE_INFO)))
    commit, _, changed = _last_commit(path).partition(" ")
    number += f"+{commit or 'checkout'}"
    metadata = folder / f"megatron_core-{number}.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {number}\n"
    (metadata / "METADATA").write_text(text, encoding="utf-8")
    return changed


def _last_commit(path: Path) -> str:
    """Short hash and date; empty where it is no checkout."""
    if not (path / ".git").exists():
        return ""
    command = ["git", "-C", str(path), "log", "-1", "--format=%h %cs"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _add_helpers(folder: Path) -> None:
    """Take the installed helpers where they are of the same source and there are none for this Python."""
    name = f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    here = Path(spec.origin).parent / "datasets"
    there = folder / "megatron" / "core" / "datasets"
    if not (there / name).exists() and filecmp.cmp(here / "helpers.cpp", there / "helpers.cpp", shallow=False):
        shutil.copy2(here / name, there)
