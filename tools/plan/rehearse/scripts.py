"""Rehearse the launch scripts as a user would."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...console.places import ROOT
from ...recipes.layout import NAMES

SETTINGS = {
    *NAMES,
    *"MODEL KERNELS GPU DATA_PATH DATA_DIR DRY_RUN REHEARSE REHEARSE_JSON PYTORCH_CUDA_ALLOC_CONF".split(),
}
PLAIN = ("--transformer-impl", "local")  # whether or not Transformer Engine is installed


@dataclass(frozen=True)
class Launch:
    """A launch script.

    Attributes:
        routing: dense, moe or remoe.
        flags: Megatron's, behind "--".
        settings: the script's environment, such as EP or KERNELS.
        size: of the model, as in the script's name.
        gpus: of one machine.
    """

    routing: str = "remoe"
    flags: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    size: str = "182m"
    gpus: int = 8

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        """Return this process's environment with the script's settings and `more` in place of all that scripts read."""
        plain = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        return plain | {"PYTHON": sys.executable} | self.settings | more

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script, with these settings on top of its own."""
        script = ["bash", str(ROOT / "scripts" / f"train_llama_{self.size}_{self.routing}.sh"), str(self.gpus)]
        command = [*script, "--", *self.flags]
        return subprocess.run(command, env=self.environment(environment), capture_output=True, text=True)

    def rehearse(self) -> dict[str, Any]:
        """Return the figures of the script's rehearsal, as REHEARSE_JSON holds them.

        Raises:
            SystemExit: there was no rehearsal; has what the script printed.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.json"
            result = self.run(REHEARSE="1", REHEARSE_JSON=str(path))
            if not path.exists():
                raise SystemExit(f"{self}: {result.stdout}{result.stderr}")
            return json.loads(path.read_text())
