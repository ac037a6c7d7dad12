"""Run the paper's launch scripts in a minimal environment."""

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

import megatron.training.arguments  # noqa: F401  # so that plans read flags in this process
from tests.entry import shared_entry
from tests.training_runs import REPOSITORY
from tools.recipes.command import main

SCRIPTS = REPOSITORY / "scripts"
SIZES = {"182m": ("12", "768", "12"), "469m": ("24", "1024", "16"), "978m": ("24", "1536", "16")}
ROUTINGS = ("dense", "moe", "remoe")


def alone(environment: dict[str, str]) -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | environment


def launch(
    script: str, *arguments: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a launch script with bash; the environment has PATH, HOME and `environment` only."""
    command = ["bash", str(SCRIPTS / f"train_llama_{script}.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=alone(environment), cwd=folder)


def in_process(
    main: Callable[[list[str]], int], words: list[str], folder: str | Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a program in this process, with PATH, HOME and `environment` only, and without Transformer Engine."""
    output, errors = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with (
            patch.dict(os.environ, alone(environment), clear=True), contextlib.chdir(folder),
            pytest.MonkeyPatch.context() as patched,
            contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors),
        ):  # fmt: skip
            patched.setitem(sys.modules, "transformer_engine", None)
            code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess([], code, output.getvalue(), errors.getvalue())


def planned(
    script: str, *arguments: str, folder: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a launch script's program in this process; by default it prints the command and starts no training."""
    given = {"DRY_RUN": "command", "DATA_PATH": "pile", "PYTHON": sys.executable} | environment
    return in_process(main, [*script.split("_"), *arguments], folder, given)


def command(script: str, *arguments: str, **environment: str) -> list[str]:
    result = planned(script, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def dry_run(script: str, *arguments: str, code: int = 0, **environment: str) -> str:
    """Return stdout and stderr of DRY_RUN=1, run by a process that has already imported Megatron."""
    given = {"DRY_RUN": "1", "PYTHON": sys.executable} | environment
    program = REPOSITORY / "tools" / "__main__.py"
    actual, output = shared_entry().run(["train", *script.split("_"), *arguments], given, script=program, limit=120)
    assert actual == code, output
    return output


def value(words: list[str], flag: str) -> str:
    """Return the last value of a flag, which overrides earlier ones."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]
