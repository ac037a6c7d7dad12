"""The launch scripts, rehearsed as a user would."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.places import ROOT
from ..recipes.data import MADE_UP
from ..recipes.launch import plan
from ..recipes.layout import NAMES
from ..recipes.models import Training

SETTINGS = {
    *NAMES,
    *"MODEL KERNELS GPU DATA_PATH DATA_DIR DRY_RUN REHEARSE REHEARSE_JSON PYTORCH_CUDA_ALLOC_CONF".split(),
}
ONE_MICRO_BATCH = ("--global-batch-size", "128")  # of the 182M scripts on 8 GPUs; more repeat it
GPUS = 8
BATCH = Training().global_batch
FEW = 8  # micro-batches of a step that are all rehearsed
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
    gpus: int = GPUS

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        """Return this process's environment, but for what a script reads, with this script's settings and `more`."""
        plain = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        return plain | {"PYTHON": sys.executable} | self.settings | more

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script, with these settings on top of its own."""
        script = ["bash", str(ROOT / "scripts" / f"train_llama_{self.size}_{self.routing}.sh"), str(self.gpus)]
        command = [*script, "--", *self.flags]
        return subprocess.run(command, env=self._environment(environment), capture_output=True, text=True)

    def command(self) -> list[str]:
        """Return the training's flags."""
        return self.planned()[1]

    def planned(self) -> tuple[dict[str, str], list[str]]:
        """Return the environment's settings and the training's flags.

        Raises:
            RecipeError: the script refuses its settings.
        """
        environment = self._environment({"DRY_RUN": "command", "DATA_PATH": MADE_UP})
        launch = plan(self.size, self.routing, [str(self.gpus), "--", *self.flags], environment)
        return launch.settings, launch.flags

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


@dataclass(frozen=True)
class Step:
    """A step of `BATCH` sequences; with many micro-batches it is extrapolated from steps of one and of two.

    Attributes:
        error: why it does not start; None if it does, and all else holds.
        peak_gib: the most that PyTorch reserves in any stage.
        forward_layer: launches of a layer's forward pass; None if there is none.
        launches: of the step.
        bytes: that it moves.
        seconds: of the GPU's work.
        host: seconds of the host's work.
        stands: seconds of a step as it stands, in which the GPU waits for the host; see host.py.
        collectives: seconds, one after another.
        mfu: as it stands, with collectives, nothing of them hidden.
        free_mfu: the same, with a GPU that never waits for the host.
    """

    error: str | None
    peak_gib: float = 0.0
    forward_layer: float | None = None
    launches: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    host: float = 0.0
    stands: float = 0.0
    collectives: float = 0.0
    mfu: float = 0.0
    free_mfu: float = 0.0


def whole_step(launch: Launch, micro_batch: int) -> Step:
    """Rehearse a step of a launch script, data parallel over all GPUs, in micro-batches of so many sequences."""
    found: list[dict[str, Any]] = []
    whole = BATCH // (micro_batch * GPUS)
    for number in (1, 2) if whole > FEW else (whole,):
        sizes = ("--micro-batch-size", str(micro_batch), "--global-batch-size", str(micro_batch * GPUS * number))
        found.append(replace(launch, flags=(*launch.flags, *sizes)).rehearse())
        if not found[-1]["starts"]:
            return Step(found[-1]["error"])
    return drawn_on(found, whole)


def drawn_on(found: list[dict[str, Any]], whole: int) -> Step:
    """Extrapolate the step of `whole` micro-batches from rehearsals of one and of two; or return its own."""
    counted = [
        {
            "launches": seen["launches"]["step"],
            "bytes": seen["roofline"]["bytes"],
            "seconds": seen["roofline"]["seconds"],
            "host": seen["roofline"]["host_seconds"],
            "stands": seen["roofline"]["stands_seconds"],
            "collectives": sum(one["seconds"] for one in seen["collectives"]),
        }
        for seen in found
    ]
    drawn = {key: one + (whole - 1) * (counted[-1][key] - one) for key, one in counted[0].items()}
    roofline = found[-1]["roofline"]
    rehearsed = 2 if len(found) == 2 else whole
    ideal = whole / rehearsed * roofline["mfu"] * roofline["seconds"]  # at the card's rate
    return Step(
        None,
        max(peaks["peak_reserved_gib"] for peaks in found[-1]["stages"].values()),
        found[-1]["launches"]["forward_layer"],
        **drawn,
        mfu=ideal / (drawn["stands"] + drawn["collectives"]),
        free_mfu=ideal / (drawn["seconds"] + drawn["collectives"]),
    )
