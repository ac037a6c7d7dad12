"""The paper's launch commands, rehearsed in many forms: launches, waits and memory against the committed figures.

python tools/rehearse/golden.py             compare; exit code 1 where something is worse
python tools/rehearse/golden.py --update    write the figures anew, after a change that is meant to change them
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.files import write_json  # noqa: E402
from tools.common.places import ROOT  # noqa: E402
from tools.rehearse.scripts import ONE_MICRO_BATCH, PLAIN, Launch  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "rehearsal.json"
CASES = {
    "ReMoE": Launch(),
    "top-k": Launch("moe"),
    "dense": Launch("dense"),
    "ReMoE, EP8": Launch(settings={"EP": "8"}),
    "ReMoE, TP2": Launch(settings={"TP": "2"}),
    "ReMoE, PP2 with virtual stages": Launch(settings={"PP": "2", "VPP": "2"}),
    "ReMoE, hybrid": Launch(settings={"MODEL": "hybrid"}),
    "ReMoE, PP2 with virtual stages, hybrid": Launch(settings={"MODEL": "hybrid", "PP": "2", "VPP": "2"}),
    "ReMoE, G = 8": Launch(flags=("--moe-granularity", "8")),
    "ReMoE, MoE recomputed": Launch(flags=tuple("--recompute-granularity selective --recompute-modules moe".split())),
    "ReMoE, Megatron's layers": Launch(flags=("--no-local-layer-fusion",)),
    "ReMoE, Triton": Launch(settings={"KERNELS": "triton"}),
    "top-k, Triton": Launch("moe", settings={"KERNELS": "triton"}),
}
CASES = {name: replace(case, flags=(*ONE_MICRO_BATCH, *PLAIN, *case.flags)) for name, case in CASES.items()}
ALLOWED = 1.02  # a figure may be as much above the committed one before it counts as worse


def kept(found: dict[str, Any]) -> dict[str, float]:
    """The figures that are committed."""
    launches, waits = found["launches"], sum(wait["times"] for wait in found["host_syncs"])
    numbers = {"launches of a forward layer": launches["forward_layer"], "launches of λ's update": launches["update"]}
    numbers |= {"launches of a step": launches["step"], "waits of a step": waits}
    numbers["GB moved in a step"] = round(found["roofline"]["bytes"] / 1e9, 1)
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
    for name, case in CASES.items():
        found = case.rehearse()
        if not found["starts"]:
            raise SystemExit(f"{name} does not start:\n{found['error']}")
        all_found[name] = kept(found)
        problems = worse(all_found[name], expected.get(name, {}))
        failed = failed or bool(problems)
        print(f"{name}: {all_found[name]}" + "".join(f"\n  WORSE  {problem}" for problem in problems), flush=True)
    if options.update:
        write_json(GOLDEN, all_found)
        print(f"wrote {GOLDEN.relative_to(ROOT)}")
        return 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
