"""The paper's launch scripts, started with nothing else in the environment."""

import os
import shlex
import subprocess
from pathlib import Path

from tests.trainings import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
SIZES = {"182m": ("12", "768", "12"), "469m": ("24", "1024", "16"), "978m": ("24", "1536", "16")}
ROUTINGS = ("dense", "moe", "remoe")


def launch(
    script: str, *arguments: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", str(SCRIPTS / f"train_llama_{script}.sh"), *arguments],
        capture_output=True,
        text=True,
        env=kept | environment,
        cwd=folder,
    )


def command(script: str, *arguments: str, **environment: str) -> list[str]:
    result = launch(script, *arguments, **({"DRY_RUN": "command", "DATA_PATH": "pile"} | environment))
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def value(words: list[str], flag: str) -> str:
    """The last value of a flag, which is the one that counts."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def shards(folder: Path, names: list[str]) -> list[str]:
    """Data sets in a folder; returns their prefixes with the weights that the fork gives."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}_text_document.bin").touch()
    return [word for name in names for word in ("1.0", f"{folder}/{name}_text_document")]
