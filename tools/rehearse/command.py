"""Rehearse a training on GPUs that are not there: whether it starts, its memory, waits, launches and collectives.

python tools/rehearse --gpus 8 -- <Megatron flags>      or      REHEARSE=1 bash scripts/train_llama_978m_remoe.sh 8

PyTorch, Megatron and this project run as they would on a node, over a CUDA that does nothing; no real GPU is touched,
nothing is trained and nothing kept. The times are a model's, by rates that --rate changes, and no measurement.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.errors import ToolError
from ..common.files import write_json
from ..common.flags import split
from ..common.places import ROOT
from ..common.running import run_to_the_end
from . import build, report
from .cards import CARDS, rates
from .flags import data_of, number, rehearsed, value_of

GPUS_PER_NODE = 8
DENSE_SHARE = 0.5  # of the pairs, while routing is dense
BELOW_LIMIT = 0.9  # of the bound on activations, on the way: nearly as much as is kept without chunks
PROGRESS = "rehearsal:"


@dataclass(frozen=True)
class Rank:
    """One rank that is played: its number, what is special about it, and flags behind those of the training."""

    number: int
    kind: str
    flags: tuple[str, ...] = ()


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own flags, and those of the training behind "--"."""
    parser = argparse.ArgumentParser(
        prog="tools/rehearse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="of the whole training (default: 8)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help=f"default: {GPUS_PER_NODE}, or all if fewer")
    parser.add_argument("--gpu", choices=CARDS, default="h100", help="the card that is played (default: h100)")
    parser.add_argument(
        "--rank",
        default="each-kind",
        metavar="R|all|each-kind",
        help="ranks to play, one after another (default: each-kind, of the first, a middle and the last stage)",
    )
    parser.add_argument(
        "--stage",
        choices=("dense", "way", "steady"),
        help="one stage of ReMoE's training alone (default: all, as they come; launches and times are of the last)",
    )
    parser.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the model of time: products, grouped, attention (TFLOP/s), bandwidth (TB/s), link, network (GB/s), "
        "smallest, latency, network_latency (microseconds)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="save and resume as well: a checkpoint without values in a temporary folder (with --gpus 1 alone: a rank "
        "cannot load what others should have saved)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep what rank R printed in FILE.rankR")
    own, flags = split(arguments)
    options = parser.parse_args(own)
    options.gpus_per_node = options.gpus_per_node or min(GPUS_PER_NODE, options.gpus)
    if options.gpus < 1 or options.gpus % options.gpus_per_node:
        parser.error(f"--gpus {options.gpus}: give a multiple of --gpus-per-node {options.gpus_per_node}")
    if not flags:
        parser.error("give the training's flags behind --")
    if options.resume and options.gpus > 1:
        parser.error(f"--resume with --gpus {options.gpus}: one rank cannot load what others should have saved; give 1")
    options.rates = rates(options.gpu)
    for rate in options.rate:
        name, _, value = rate.partition("=")
        if name not in options.rates:
            parser.error(f"--rate {rate}: is none of {', '.join(options.rates)}")
        try:
            options.rates[name] = float(value)
        except ValueError:
            parser.error(f"--rate {rate}: {value!r} is no number")
    return options, flags


def refuse_what_cannot_be_played(flags: Sequence[str]) -> None:
    """Refuse trainings that might start on GPUs, and of which a rehearsal cannot say so.

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
    """Stage → active share of the (token, expert) pairs; one stage without ReLU routing."""
    experts, topk = number(flags, "--num-experts", 0), number(flags, "--moe-router-topk", 2)
    steady = topk / experts if experts else 0.0
    shares = {"steady": steady}
    if "--moe-relu-routing" in flags:
        limit = number(flags, "--moe-relu-activation-limit", 2.0) * steady
        way = {"way": BELOW_LIMIT * limit} if steady < limit < DENSE_SHARE else {}
        shares = {"dense": max(DENSE_SHARE, steady), **way, "steady": steady}
    if stage is not None and stage not in shares:
        raise ToolError(f"--stage {stage}: this training has none; it has {', '.join(shares)}.")
    return {stage: shares[stage]} if stage else shares


def steps_of(shares: dict[str, float]) -> list[dict[str, str]]:
    """What is played: a step to start, one for each stage's memory, then one each for events and the roofline."""
    first, last = next(iter(shares)), next(reversed(shares))
    purposes = [(first, "start"), *((stage, "memory") for stage in shares), (last, "events"), (last, "roofline")]
    return [{"stage": stage, "for": purpose} for stage, purpose in purposes]


def ranks_of(flags: Sequence[str], world: int, wanted: str) -> list[Rank]:
    """The ranks to play.

    Raises:
        ToolError: `wanted` is no rank of this world.
    """
    if wanted == "all":
        return [Rank(rank, f"rank {rank}") for rank in range(world)]
    if wanted != "each-kind":
        if not wanted.isdecimal() or int(wanted) >= world:
            raise ToolError(f"--rank {wanted}: give a number below {world}, all, or each-kind.")
        return [Rank(int(wanted), f"rank {wanted}")]
    stages = int(number(flags, "--pipeline-model-parallel-size", 1))
    if stages < 2 or world % stages:
        return [Rank(0, "each rank")]
    named = {0: "first pipeline stage", stages // 2: "a middle pipeline stage", stages - 1: "last pipeline stage"}
    return [Rank(stage * (world // stages), title) for stage, title in sorted(named.items())]


def resumed(rank: Rank, steps: int, folder: Path) -> list[Rank]:
    """The rank as it saves after its last step, and as it goes on from there."""
    saving = f"--train-iters {2 * steps} --exit-interval {steps} --save-interval {steps} --save"
    resuming = f"--train-iters {2 * steps} --exit-on-missing-checkpoint --load"
    return [
        replace(rank, kind="saving", flags=(*saving.split(), str(folder))),
        replace(rank, kind="resumed", flags=(*resuming.split(), str(folder))),
    ]


def play(rank: Rank, options: argparse.Namespace, flags: Sequence[str], folder: Path) -> dict[str, Any]:
    """Play one rank; its record, with "starts" and "error"."""
    shares = shares_of(flags, options.stage)
    steps = steps_of(shares)
    record, log = folder / f"rank{rank.number}.json", folder / f"rank{rank.number}.log"
    if options.log is not None:
        log = options.log.with_name(f"{options.log.name}.rank{rank.number}")
    told = {"rank": rank.number, "world": options.gpus, "gpus_per_node": options.gpus_per_node, "record": str(record)}
    told |= {"shares": shares, "steps": steps, "rates": options.rates, "data": data_of(flags)}
    environment = os.environ | build.environment_of(options.gpu, options.gpus_per_node)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, str(Path(__file__).with_name("rank_entry.py")), json.dumps(told)]
    process = subprocess.Popen(
        [*command, *rehearsed(flags, len(steps)), *rank.flags], env=environment, cwd=ROOT, stdin=subprocess.DEVNULL,
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
    found |= {"kind": rank.kind, "rank": rank.number, "starts": starts, "error": None}
    if not starts:
        found["error"] = report.error_in(log.read_text(encoding="utf-8"), process.returncode)
    return found


def rehearse(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Play the ranks one after another and tell what was seen; the exit code is 1 where the training does not start."""
    refuse_what_cannot_be_played(flags)
    build.libraries()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        ranks = ranks_of(flags, options.gpus, options.rank)
        if options.resume:
            ranks = resumed(ranks[0], len(steps_of(shares_of(flags, options.stage))), Path(folder) / "checkpoint")
        for rank in ranks:
            print(f"{PROGRESS} {options.gpus} x {options.gpu}, {rank.kind}: starting", file=sys.stderr, flush=True)
            records.append(play(rank, options, flags, Path(folder)))
            if not records[-1]["starts"]:
                break
    found = report.summary(records, options)
    print("\n".join(report.lines(found, options)))
    if options.json is not None:
        write_json(options.json, found)
    return 0 if found["starts"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where the training does not start or there can be no rehearsal, 130 after an interruption."""
    options, flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return run_to_the_end(lambda: rehearse(options, flags))
