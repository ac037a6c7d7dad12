"""The paper's launch scripts, started with nothing else in the environment."""

import contextlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from tests.entry import shared_entry
from tests.trainings import REPOSITORY
from tools.recipes.command import main

SCRIPTS = REPOSITORY / "scripts"
SIZES = {"182m": ("12", "768", "12"), "469m": ("24", "1024", "16"), "978m": ("24", "1536", "16")}
ROUTINGS = ("dense", "moe", "remoe")


def alone(environment: dict[str, str]) -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | environment


def launch(
    script: str, *arguments: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does."""
    command = ["bash", str(SCRIPTS / f"train_llama_{script}.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=alone(environment), cwd=folder)


def planned(
    script: str, *arguments: str, folder: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do what a script does before a training starts, in this process."""
    output, errors = io.StringIO(), io.StringIO()
    given = alone({"DRY_RUN": "command", "DATA_PATH": "pile", "PYTHON": sys.executable} | environment)
    with (
        patch.dict(os.environ, given, clear=True), contextlib.chdir(folder),
        contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors),
    ):  # fmt: skip
        code = main([*script.split("_"), *arguments])
    return subprocess.CompletedProcess([], code, output.getvalue(), errors.getvalue())


def command(script: str, *arguments: str, **environment: str) -> list[str]:
    result = planned(script, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def dry_run(script: str, *arguments: str, code: int = 0, **environment: str) -> str:
    """Return what DRY_RUN=1 prints, with errors, in a Megatron that is imported already."""
    given = {"DRY_RUN": "1", "PYTHON": sys.executable} | environment
    program = REPOSITORY / "tools" / "recipes" / "__main__.py"
    found, output = shared_entry().run([*script.split("_"), *arguments], given, script=program, limit=120)
    assert found == code, output
    return output


def value(words: list[str], flag: str) -> str:
    """The last value of a flag, which is the one that counts."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def shards(folder: Path, names: list[str]) -> list[str]:
    """Data sets in a folder; returns their prefixes with the weights that the fork gives."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}_text_document.bin").touch()
    return [word for name in names for word in ("1.0", f"{folder}/{name}_text_document")]
