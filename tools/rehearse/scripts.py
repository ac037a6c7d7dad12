"""The launch scripts, rehearsed as a user would."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.places import ROOT

SETTINGS = set(
    "TP PP EP CP DRY_RUN REHEARSE REHEARSE_JSON DATA_PATH DATA_DIR GPU KERNELS PYTORCH_CUDA_ALLOC_CONF".split()
)
ONE_MICRO_BATCH = ("--global-batch-size", "128")  # of the 182M scripts on 8 GPUs; more repeat it
PLAIN = ("--transformer-impl", "local")  # whether or not Transformer Engine is installed


@dataclass(frozen=True)
class Launch:
    """A launch script for 8 GPUs.

    Attributes:
        routing: dense, moe or remoe.
        flags: of Megatron, behind "--".
        settings: environment of the script, as EP or KERNELS.
        size: of the model, as the scripts are named.
        root: the checkout.
    """

    routing: str = "remoe"
    flags: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    size: str = "182m"
    root: Path = ROOT

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it, with these settings besides its own."""
        script = ["bash", str(self.root / "scripts" / f"train_llama_{self.size}_{self.routing}.sh"), "8"]
        plain = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        settings = plain | {"PYTHON": sys.executable} | self.settings | environment
        return subprocess.run([*script, "--", *self.flags], env=settings, capture_output=True, text=True)

    def command(self) -> list[str]:
        """The training's flags."""
        words = shlex.split(self.run(DRY_RUN="command", DATA_PATH="made-up").stdout)
        return words[next(place for place, word in enumerate(words) if word.endswith("pretrain_gpt.py")) + 1 :]

    def rehearse(self) -> dict[str, Any]:
        """What its rehearsal says, as REHEARSE_JSON holds it.

        Raises:
            SystemExit: there was no rehearsal; has what the script printed.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.json"
            result = self.run(REHEARSE="1", REHEARSE_JSON=str(path))
            if not path.exists():
                raise SystemExit(f"{self}: {result.stdout}{result.stderr}")
            return json.loads(path.read_text())
