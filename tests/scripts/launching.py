"""Run, plan and rehearse the paper's launch scripts."""

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import megatron.training.arguments  # noqa: F401  # so that plans read flags in this process
from tests.entry import shared_entry
from tests.training_runs import REPOSITORY
from tools.recipes.data import PLACEHOLDER
from tools.recipes.launch import make_launch, read_recipe
from tools.recipes.layout import NAMES
from tools.train import main

SCRIPTS = REPOSITORY / "scripts"
SETTINGS = {
    *NAMES,
    *"MODEL KERNELS GPU DATA_PATH DATA_DIR DRY_RUN REHEARSE REHEARSE_JSON PYTORCH_CUDA_ALLOC_CONF".split(),
}
PLAIN = ("--transformer-impl", "local")  # so that plans do not depend on an installed Transformer Engine


def alone(environment: dict[str, str]) -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | environment


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script with bash; the environment has PATH, HOME and `environment` only."""
    command = ["bash", str(SCRIPTS / f"train_llama_{script}.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=alone(environment))


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


@dataclass(frozen=True)
class Launch:
    """A launch script: dense, moe or remoe; Megatron's flags after "--"; the script's environment; a size; GPUs."""

    routing: str = "remoe"
    flags: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    size: str = "182m"
    gpus: int = 8

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        """Return this process's environment without `SETTINGS`, plus the script's settings and `more`."""
        plain = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        return plain | {"PYTHON": sys.executable} | self.settings | more

    def rehearse(self) -> dict[str, Any]:
        """Return the figures of the script's rehearsal, as REHEARSE_JSON holds them."""
        script = ["bash", str(SCRIPTS / f"train_llama_{self.size}_{self.routing}.sh"), str(self.gpus)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            environment = self.environment({"REHEARSE": "1", "REHEARSE_JSON": str(path)})
            result = subprocess.run([*script, "--", *self.flags], env=environment, capture_output=True, text=True)
            assert path.exists(), f"{self}: {result.stdout}{result.stderr}"
            return json.loads(path.read_text())

    def plan(self) -> tuple[dict[str, str], list[str]]:
        """Return the environment variables and the flags of the training run."""
        environment = self.environment({"DRY_RUN": "command", "DATA_PATH": PLACEHOLDER})
        recipe = read_recipe(self.size, self.routing, [str(self.gpus), "--", *self.flags], environment)
        training = make_launch(recipe, environment)
        return training.settings, training.flags
