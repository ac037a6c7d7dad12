"""Simulate the ranks of a training and report."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...console.errors import ToolError
from ...console.files import write_json
from ...runs.running import run_tool
from . import build, report
from .arguments import parse_arguments
from .flags import data_of, number, rehearsed, value_of

DENSE_SHARE = 0.5  # share of active pairs while routing is dense
BELOW_LIMIT = 0.9  # on the way to the target, as a share of the bound on activations: just before chunks begin
PROGRESS = "rehearsal:"


def check_can_rehearse(flags: Sequence[str]) -> None:
    """Refuse trainings that a rehearsal cannot simulate.

    Raises:
        ToolError: a flag asks for something that has sizes from the GPU, or that is not installed.
    """
    dispatcher = value_of(flags, "--moe-token-dispatcher-type") or "allgather"
    if number(flags, "--num-experts", 0) and dispatcher == "allgather":
        raise ToolError(
            "--moe-token-dispatcher-type allgather, Megatron's default, cannot be rehearsed: its sizes come from the "
            "GPU. Give --moe-token-dispatcher-type alltoall."
        )
    layers = value_of(flags, "--transformer-impl") or "transformer_engine"
    if layers == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise ToolError(
            "--transformer-impl transformer_engine, Megatron's default, cannot be rehearsed: Transformer Engine is not "
            "installed here. Install it, or give --transformer-impl local."
        )


def shares_of(flags: Sequence[str], stage: str | None) -> dict[str, float]:
    """Return stage → computed share of the (token, expert) pairs; there is one stage without ReLU routing."""
    experts, topk = number(flags, "--num-experts", 0), number(flags, "--moe-router-topk", 2)
    steady = topk / experts if experts else 0.0
    shares = {"steady": steady}
    if "--moe-relu-routing" in flags and experts:
        dense = min(DENSE_SHARE, number(flags, "--moe-relu-max-experts", experts) / experts)
        limit = number(flags, "--moe-relu-activation-limit", 2.0) * steady
        way = {"way": BELOW_LIMIT * limit} if steady < limit < dense else {}
        shares = {"dense": max(dense, steady), **way, "steady": steady}
    if stage is not None and stage not in shares:
        raise ToolError(f"--stage {stage}: this training has none; it has {', '.join(shares)}.")
    return {stage: shares[stage]} if stage else shares


def steps_of(shares: dict[str, float], flags: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return the steps to simulate: one to start, one for each stage's memory, one for events, one for the roofline.

    A step that Megatron captures as a CUDA graph comes last.
    """
    first, last = next(iter(shares)), next(reversed(shares))
    purposes = [(first, "start"), *((stage, "memory") for stage in shares), (last, "events"), (last, "roofline")]
    purposes += [(last, "graph")] * (value_of(flags, "--cuda-graph-impl") == "full_iteration")
    return [{"stage": stage, "for": purpose} for stage, purpose in purposes]


def ranks_of(flags: Sequence[str], world: int, wanted: int | None) -> dict[int, str]:
    """Return the ranks to simulate, and their kinds in words."""
    if wanted is not None:
        return {wanted: f"rank {wanted}"}
    stages = int(number(flags, "--pipeline-model-parallel-size", 1))
    if stages < 2 or world % stages:
        return {0: "each rank"}
    named = {0: "first pipeline stage", stages // 2: "a middle pipeline stage", stages - 1: "last pipeline stage"}
    return {stage * (world // stages): title for stage, title in sorted(named.items())}


def simulate(rank: int, options: argparse.Namespace, flags: Sequence[str], folder: Path) -> dict[str, Any]:
    """Simulate one rank; return its record, with "rank", "starts" and "error"."""
    shares = shares_of(flags, options.stage)
    steps = steps_of(shares, flags)
    record, log = folder / f"rank{rank}.json", folder / f"rank{rank}.log"
    if options.log is not None:
        log = options.log.with_name(f"{options.log.name}.rank{rank}")
    request = {"rank": rank, "world": options.gpus, "gpus_per_node": options.gpus_per_node, "record": str(record)}
    request |= {"shares": shares, "steps": steps, "rates": options.rates, "data": data_of(flags)}
    environment = os.environ | build.environment_of(options.gpu, options.gpus_per_node)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, str(Path(__file__).with_name("rank_entry.py")), json.dumps(request)]
    process = subprocess.Popen(
        [*command, *rehearsed(flags, len(steps))], env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    with process, log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            if line.startswith(PROGRESS):
                print(line, end="", file=sys.stderr, flush=True)
    found = json.loads(record.read_text()) if record.exists() else {"stages": {}, "model": {}}
    starts = process.returncode == 0 and "roofline" in found
    error = None if starts else report.error_in(log.read_text(encoding="utf-8"), process.returncode)
    return found | {"rank": rank, "starts": starts, "error": error}


def rehearse(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Simulate the ranks one after another and print the figures; return 1 if the training does not start."""
    check_can_rehearse(flags)
    for path in filter(None, (options.json, options.log)):
        path.parent.mkdir(parents=True, exist_ok=True)
    build.libraries()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rank, kind in ranks_of(flags, options.gpus, options.rank).items():
            print(f"{PROGRESS} {options.gpus} x {options.gpu}, {kind}: starting", file=sys.stderr, flush=True)
            records.append({"kind": kind} | simulate(rank, options, flags, Path(folder)))
            if not records[-1]["starts"]:
                break
    found = report.summary(records, options)
    print("\n".join(report.lines(found, options)))
    if options.json is not None:
        write_json(options.json, found)
    return 0 if found["starts"] else 1


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 0, 1 if the training does not start or cannot be rehearsed, 130 after an interruption."""
    options, flags = parse_arguments(arguments)
    return run_tool("rehearse", lambda: rehearse(options, flags))
