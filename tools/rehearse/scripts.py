"""The launch scripts, rehearsed as a user would."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.places import ROOT
from .flags import MADE_UP

SETTINGS = set(
    "MODEL TP PP VPP EP CP KERNELS GPU DATA_PATH DATA_DIR DRY_RUN REHEARSE REHEARSE_JSON "
    "PYTORCH_CUDA_ALLOC_CONF".split()
)
ONE_MICRO_BATCH = ("--global-batch-size", "128")  # of the 182M scripts on 8 GPUs; more repeat it
GPUS = 8
BATCH = 512  # sequences of a step
FEW = 8  # micro-batches of a step that are all rehearsed
PLAIN = ("--transformer-impl", "local")  # whether or not Transformer Engine is installed


@dataclass(frozen=True)
class Launch:
    """A launch script.

    Attributes:
        routing: dense, moe or remoe.
        flags: of Megatron, behind "--".
        settings: environment of the script, as EP or KERNELS.
        size: of the model, as the scripts are named.
        gpus: of one machine.
        root: the checkout.
    """

    routing: str = "remoe"
    flags: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    size: str = "182m"
    gpus: int = GPUS
    root: Path = ROOT

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it, with these settings besides its own."""
        script = ["bash", str(self.root / "scripts" / f"train_llama_{self.size}_{self.routing}.sh"), str(self.gpus)]
        plain = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        settings = plain | {"PYTHON": sys.executable} | self.settings | environment
        return subprocess.run([*script, "--", *self.flags], env=settings, capture_output=True, text=True)

    def command(self) -> list[str]:
        """The training's flags."""
        return self.planned()[1]

    def planned(self) -> tuple[dict[str, str], list[str]]:
        """The environment's settings and the training's flags.

        Raises:
            RuntimeError: the script gives none; has what it printed.
        """
        result = self.run(DRY_RUN="command", DATA_PATH=MADE_UP)
        if result.returncode:
            raise RuntimeError(f"{self} gives no command:\n{result.stderr}")
        words = shlex.split(result.stdout)
        entry = next(place for place, word in enumerate(words) if word.endswith("pretrain_gpt.py"))
        settings = dict(word.split("=", 1) for word in words[1:entry] if words[0] == "env" and "=" in word)
        return settings, words[entry + 1 :]

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


@dataclass(frozen=True)
class Step:
    """A step of `BATCH` sequences; of many micro-batches it is drawn on from steps of one and of two.

    Attributes:
        error: why it does not start; None where it does, and all else holds.
        peak_gib: what PyTorch reserves at most in any stage.
        forward_layer, update: launches of a layer's forward pass, and of λ's update; None where there are none.
        launches: of the step.
        waits: of the host, but for those of the MoE layers for their counts.
        bytes, seconds: of the roofline.
        collectives: seconds, one after another.
        mfu: with nothing hidden, collectives counted.
        roofline_mfu: without collectives.
    """

    error: str | None
    peak_gib: float = 0.0
    forward_layer: float | None = None
    update: float | None = None
    launches: float = 0.0
    waits: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    collectives: float = 0.0
    mfu: float = 0.0
    roofline_mfu: float = 0.0


def whole_step(launch: Launch, micro_batch: int) -> Step:
    """The step of a launch script with data parallelism over all GPUs, in micro-batches of so many sequences."""
    found: list[dict[str, Any]] = []
    whole = BATCH // (micro_batch * GPUS)
    for number in (1, 2) if whole > FEW else (whole,):
        sizes = ("--micro-batch-size", str(micro_batch), "--global-batch-size", str(micro_batch * GPUS * number))
        found.append(replace(launch, flags=(*launch.flags, *sizes)).rehearse())
        if not found[-1]["starts"]:
            return Step(found[-1]["error"])
    return drawn_on(found, whole)


def drawn_on(found: list[dict[str, Any]], whole: int) -> Step:
    """The step of `whole` micro-batches from rehearsals of one and of two, or from its own alone."""
    counted = [
        {
            "launches": seen["launches"]["step"],
            "waits": sum(wait["times"] for wait in seen["host_syncs"] if "/remoe/moe/" not in wait["where"]),
            "bytes": seen["roofline"]["bytes"],
            "seconds": seen["roofline"]["seconds"],
            "collectives": sum(one["seconds"] for one in seen["collectives"]),
        }
        for seen in found
    ]
    drawn = {key: one + (whole - 1) * (counted[-1][key] - one) for key, one in counted[0].items()}
    roofline, launches = found[-1]["roofline"], found[-1]["launches"]
    rehearsed = 2 if len(found) == 2 else whole
    ideal = whole / rehearsed * roofline["mfu"] * roofline["seconds"]  # at the card's rate
    return Step(
        None,
        max(peaks["peak_reserved_gib"] for peaks in found[-1]["stages"].values()),
        launches["forward_layer"],
        launches["update"],
        **drawn,
        mfu=ideal / (drawn["seconds"] + drawn["collectives"]),
        roofline_mfu=ideal / drawn["seconds"],
    )
