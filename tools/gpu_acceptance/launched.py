"""The 182M ReMoE of the launch script on one GPU: its flags, and what its rehearsal said of it.

python tools/gpu_acceptance/launched.py      rehearse it and write rehearsed.json, where a compiler is at hand
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.files import write_json  # noqa: E402
from tools.common.places import ROOT  # noqa: E402
from tools.rehearse.flags import rehearsed  # noqa: E402
from tools.rehearse.scripts import PLAIN, Launch  # noqa: E402

EXPECTED = Path(__file__).with_name("rehearsed.json")
SEQUENCES = 64  # one GPU's of the eight that share the paper's 512
LENGTH = 1024  # tokens of a sequence
OWN_FLAGS = ("--global-batch-size", str(SEQUENCES), *PLAIN)  # what was rehearsed, on any machine
STAGES = {"dense": 0.5, "steady": 0.125}  # active share of the pairs
# Kept at the target, where training would come after hundreds of steps: weights hardly move.
AT_TARGET = "--lr 1e-7 --min-lr 0 --lr-warmup-fraction 0".split()


@cache
def command() -> tuple[dict[str, str], list[str]]:
    """What the launch script gives: the environment's settings, and the entry's flags."""
    return Launch(flags=OWN_FLAGS, gpus=1).planned()


def flags(stage: str, steps: int) -> list[str]:
    """For `steps` steps of a stage on made-up tokens, with nothing saved and the script's log interval and workers."""
    found = [*rehearsed(command()[1], steps), *"--log-interval 10 --num-workers 2".split()]
    return [*found, *AT_TARGET] if stage == "steady" else found


def _rehearse(stage: str, path: Path) -> dict[str, Any]:
    settings, given = command()
    tool = [sys.executable, str(ROOT / "tools" / "rehearse"), "--gpus", "1", "--stage", stage, "--json", str(path)]
    subprocess.run([*tool, "--", *given], env=os.environ | settings, check=True)
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = found["stages"][stage] | {"host_syncs": found["host_syncs"], "launches": found["launches"]["step"]}
    roofline = {name: found["roofline"][name] for name in ("mfu", "model_flops", "seconds", "bytes", "rates")}
    return kept | {"gpu": found["gpu"], "roofline": roofline}


def main() -> None:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {stage: _rehearse(stage, Path(folder) / f"{stage}.json") for stage in STAGES}
    write_json(EXPECTED, found)


if __name__ == "__main__":
    main()
