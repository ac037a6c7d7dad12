"""The paper's launch commands, rehearsed in many forms: launches, waits and memory against the committed figures.

python tools/rehearse/golden.py             compare; exit code 1 where something is worse
python tools/rehearse/golden.py --update    write the figures anew, after a change that is meant to change them
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.files import write_aside  # noqa: E402
from tools.common.places import ROOT  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "rehearsal.json"
ONE_MICRO_BATCH = ["--global-batch-size", "128"]  # a GPU; more repeat it
# name: routing of the script, its environment, flags behind "--"
CASES: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "ReMoE": ("remoe", {}, []),
    "top-k": ("moe", {}, []),
    "dense": ("dense", {}, []),
    "ReMoE, EP8": ("remoe", {"EP": "8"}, []),
    "ReMoE, TP2": ("remoe", {"TP": "2"}, []),
    "ReMoE, PP2 with virtual stages": ("remoe", {"PP": "2"}, ["--num-layers-per-virtual-pipeline-stage", "3"]),
    "ReMoE, G = 8": ("remoe", {}, ["--moe-granularity", "8"]),
    "ReMoE, MoE recomputed": ("remoe", {}, "--recompute-granularity selective --recompute-modules moe".split()),
    "ReMoE, Megatron's layers": ("remoe", {}, ["--no-local-layer-fusion"]),
}
SETTINGS = {"TP", "PP", "EP", "CP", "DRY_RUN", "REHEARSE", "DATA_PATH", "DATA_DIR", "GPU", "PYTORCH_CUDA_ALLOC_CONF"}
ALLOWED = 1.02  # a figure may be as much above the committed one before it counts as worse


def run_script(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The launch script of a case, with these settings besides its own."""
    routing, layout, flags = CASES[name]
    script = ["bash", str(ROOT / "scripts" / f"train_llama_182m_{routing}.sh"), "8", "--", *ONE_MICRO_BATCH, *flags]
    plain = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    settings = plain | layout | {"PYTHON": sys.executable} | environment
    return subprocess.run(script, env=settings, capture_output=True, text=True)


def command(name: str) -> list[str]:
    """The training's flags, as the launch script gives them."""
    words = shlex.split(run_script(name, DRY_RUN="command", DATA_PATH="made-up").stdout)
    return words[next(place for place, word in enumerate(words) if word.endswith("pretrain_gpt.py")) + 1 :]


def figures(name: str) -> dict[str, Any]:
    """What the rehearsal of a case says, as REHEARSE_JSON holds it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        result = run_script(name, REHEARSE="1", REHEARSE_JSON=str(path))
        if not path.exists():
            raise SystemExit(f"{name}: {result.stdout}{result.stderr}")
        return json.loads(path.read_text())


def kept(found: dict[str, Any]) -> dict[str, float]:
    """The figures that are committed."""
    launches, waits = found["launches"], sum(wait["times"] for wait in found["host_syncs"])
    numbers = {"launches of a forward layer": launches["forward_layer"], "launches of λ's update": launches["update"]}
    numbers |= {"launches of a step": launches["step"], "waits of a step": waits}
    for stage, peaks in found["stages"].items():
        numbers[f"GiB, {stage}"] = round(peaks["peak_allocated_gib"], 2)
    return {key: value for key, value in numbers.items() if value is not None}


def worse(found: dict[str, float], expected: dict[str, float]) -> list[str]:
    """The figures that are larger than the committed ones, or missing."""
    return [
        f"{key}: {found.get(key, 'missing')} instead of {value}"
        for key, value in expected.items()
        if found.get(key, float("inf")) > value * ALLOWED
    ]


def main() -> int:
    """Rehearse all cases; compare or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)} anew")
    options = parser.parse_args()
    expected = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    all_found, failed = {}, False
    for name in CASES:
        found = figures(name)
        if not found["starts"]:
            raise SystemExit(f"{name} does not start:\n{found['error']}")
        all_found[name] = kept(found)
        problems = worse(all_found[name], expected.get(name, {}))
        failed = failed or bool(problems)
        print(f"{name}: {all_found[name]}" + "".join(f"\n  WORSE  {problem}" for problem in problems), flush=True)
    if options.update:
        text = json.dumps(all_found, indent=1, ensure_ascii=False) + "\n"
        write_aside(GOLDEN, lambda aside: aside.write_text(text, encoding="utf-8"))
        print(f"wrote {GOLDEN.relative_to(ROOT)}")
        return 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
