"""Plan and rehearse the training run that a launch script would start."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.console.places import ROOT
from tools.recipes.data import PLACEHOLDER
from tools.recipes.launch import plan
from tools.recipes.layout import NAMES

SETTINGS = {
    *NAMES,
    *"MODEL KERNELS GPU DATA_PATH DATA_DIR DRY_RUN REHEARSE REHEARSE_JSON PYTORCH_CUDA_ALLOC_CONF".split(),
}
PLAIN = ("--transformer-impl", "local")  # so that plans do not depend on an installed Transformer Engine


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
        script = ["bash", str(ROOT / "scripts" / f"train_llama_{self.size}_{self.routing}.sh"), str(self.gpus)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            environment = self.environment({"REHEARSE": "1", "REHEARSE_JSON": str(path)})
            result = subprocess.run([*script, "--", *self.flags], env=environment, capture_output=True, text=True)
            assert path.exists(), f"{self}: {result.stdout}{result.stderr}"
            return json.loads(path.read_text())


def planned(launch: Launch) -> tuple[dict[str, str], list[str]]:
    """Return the environment variables and the flags of a launch's training run."""
    environment = launch.environment({"DRY_RUN": "command", "DATA_PATH": PLACEHOLDER})
    training = plan(launch.size, launch.routing, [str(launch.gpus), "--", *launch.flags], environment)
    return training.settings, training.flags
