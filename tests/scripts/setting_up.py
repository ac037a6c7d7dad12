"""Helpers for the setup tests: run the shell library, and create fake Pythons."""

import os
import subprocess
import sys
from pathlib import Path

from tools.console.places import ROOT

LIBRARY = "scripts/lib/environment.sh"
REAL = Path(getattr(sys, "_base_executable", sys.executable))


def run_bash(code: str, root: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after sourcing the library of the tree at `root`, as the scripts do."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "TORCH_INDEX_URL")}
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source "{root / LIBRARY}"; {code}'],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def make_python(path: Path, version: tuple[int, int, int], ensurepip: bool = True) -> Path:
    """Create a script that runs this Python but reports another version and can lack ensurepip."""
    prelude = f"import sys; sys.version_info = ({version[0]}, {version[1]}, {version[2]}, 'final', 0); "
    prelude += "" if ensurepip else "sys.modules['ensurepip'] = None; "
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{REAL}" -c "{prelude}exec(sys.argv[2])" "$@"\n')
    path.chmod(0o755)
    return path


def make_failing_shim(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "pyenv: {path.name}: command not found" >&2\nexit 127\n')
    path.chmod(0o755)
    return path
