"""What a rehearsal saw, as figures and as text."""

import argparse
import math
import re
import statistics
from collections.abc import Iterator
from typing import Any

from ..cost.gpus import ACCELERATORS
from .cards import CONTEXT

LINES_OF_ERROR = 6
PARTS = ("attention", "router", "count", "plan", "experts")  # of a layer, in the order of their work
RINGS = {"all_reduce": 2.0}  # how often a ring sends (n - 1)/n of the bytes; others once
POINT_TO_POINT = ("isend", "irecv")


def error_in(log: str, code: int) -> str:
    """The words with which a training ended: those that a cluster's console would show last."""
    lines = log.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"pretrain_gpt\.py: error: ", line)]
    if starts:
        return "\n".join(lines[starts[-1] : starts[-1] + LINES_OF_ERROR])
    return f"exit code {code}; the end of its output:\n" + "\n".join(lines[-2 * LINES_OF_ERROR :])


def summary(records: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """All figures: of the rank that needs most memory, and under "ranks" of each that was played.

    Args:
        records: what `rank_entry.Rehearsal` wrote for each rank.
        options: the tool's flags.
    """
    fullest = max(
        records, key=lambda record: max((s["peak_allocated_gib"] for s in record["stages"].values()), default=0)
    )
    stages = {
        name: peaks | {"forecast_gib": fullest["model"]["forecast_gib"][name]}
        for name, peaks in fullest["stages"].items()
    }
    found = {
        "rehearsal": "nothing was trained, and no GPU used",
        "gpus": options.gpus,
        "gpu": options.gpu,
        "starts": all(record["starts"] for record in records),
        "error": next((record["error"] for record in records if record["error"]), None),
        "rank": fullest["rank"],
        "kind": fullest["kind"],
        "stages": stages,
        "launches": None,
        "host_syncs": fullest.get("host_syncs"),
        "collectives": timed(fullest.get("collectives", []), options.rates),
        "roofline": _roofline(fullest, options),
    }
    if "parts" in fullest:
        found["launches"] = _launches(fullest)
    return found | {"ranks": records}


def _launches(record: dict[str, Any]) -> dict[str, Any]:
    by_part = {name: statistics.median(calls) for name, calls in record["parts"].items()}
    return {
        "step": record["launches"],
        "forward_layer": by_part.get("layer"),
        "update": by_part.get("update"),
        "micro_batch_forward": by_part.get("forward"),
        "micro_batch_backward": by_part.get("backward"),
        "parts_of_layer": {name: by_part[name] for name in PARTS if name in by_part},
    }


def timed(found: list[dict[str, Any]], rates: dict[str, float]) -> list[dict[str, Any]]:
    """Collectives of more than one rank, with the seconds of their latency and of their bytes on their ranks' links."""
    counted = []
    for one in found:
        sent = one["bytes"] * (1 if one["kind"] in POINT_TO_POINT else (one["ranks"] - 1) / one["ranks"])
        rate = rates["link" if one["within_node"] else "network"] * 1e9
        latency = rates["latency" if one["within_node"] else "network_latency"] * 1e-6 * math.log2(one["ranks"])
        counted.append(one | {"seconds": RINGS.get(one["kind"], 1.0) * sent / rate + one["times"] * latency})
    return sorted((one for one in counted if one["ranks"] > 1), key=lambda one: -one["seconds"])


def _roofline(record: dict[str, Any], options: argparse.Namespace) -> dict[str, Any] | None:
    if "roofline" not in record:
        return None
    parts, model = record["roofline"], record["model"]
    total = {name: sum(part[name] for part in parts.values()) for name in ("operations", "bytes", "flops", "seconds")}
    flops = model["flops_per_sequence"] * model["sequences_per_gpu"]
    mfu = flops / total["seconds"] / (ACCELERATORS[options.gpu].tflops * 1e12)
    found = {"rates": options.rates, "mfu": mfu, "model_flops": flops, **total, "parts": parts}
    return found | {"guessed": record["guessed"]}


def lines(found: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    """The text.

    Args:
        found: from `summary`.
        options: the tool's flags.
    """
    yield f"Rehearsal on {options.gpus} x {options.gpu}, with made-up tokens. Nothing was trained, and no GPU was used."
    if found["starts"]:
        more = (
            ", takes its steps, saves a checkpoint, and goes on from it." if options.resume else " and takes its steps."
        )
        yield f"The training starts{more}"
    else:
        yield f"THE TRAINING DOES NOT START ({found['ranks'][-1]['kind']}):"
        yield from (f"  {line}" for line in (found["error"] or "").splitlines())
    for write in (_memory_lines, _launch_lines, _wait_lines, _collective_lines, _roofline_lines):
        yield from write(found, options)


def _memory_lines(found: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    stages = found["stages"]
    if not stages:
        return
    memory = ACCELERATORS[options.gpu].memory
    yield ""
    yield f"Memory of the fullest rank ({found['kind']}), GiB" + "".join(f"{name:>10}" for name in stages)
    titles = {
        "peak_allocated_gib": "allocated at most",
        "peak_reserved_gib": "reserved at most",
        "forecast_gib": "forecast",
    }
    for key, title in titles.items():
        yield f"  {title:<45}" + "".join(f"{stage[key]:10.2f}" for stage in stages.values())
    article = "an" if options.gpu[0] in "aefhilmnorsx" else "a"  # an h100, a b200
    has = f"{article} {options.gpu} has {memory:g} GiB"
    yield f"  {has}, of which the driver takes about {CONTEXT:g}; forecast: tools/cost"
    if not found["starts"] and "out of memory" in (found["error"] or ""):
        yield "  It does not fit: take a smaller micro-batch, more expert (EP), tensor or pipeline parallelism, or"
        yield "  --recompute-granularity selective --recompute-modules moe."


def _launch_lines(found: dict[str, Any], _options: argparse.Namespace) -> Iterator[str]:
    launches = found["launches"]
    if launches is None:
        return
    yield ""
    yield f"Launches of a step    {launches['step']:,} kernels, products, collectives, fills and copies"
    parts = ", ".join(f"{name} {number:g}" for name, number in launches["parts_of_layer"].items())
    if launches["forward_layer"] is not None:
        yield f"  a forward layer     {launches['forward_layer']:g} ({parts})"
    forward, backward = launches["micro_batch_forward"], launches["micro_batch_backward"]
    yield f"  a micro-batch       {forward:g} forward, {backward:g} backward"
    if launches["update"] is not None:
        yield f"  λ's update          {launches['update']:g}"


def _wait_lines(found: dict[str, Any], _options: argparse.Namespace) -> Iterator[str]:
    waits = found["host_syncs"]
    if waits is None:
        return
    yield ""
    yield f"The host waits for the device {sum(wait['times'] for wait in waits)} times in a step"
    yield from (f"  {wait['times']:4d} x {wait['where']}" for wait in waits)


def _collective_lines(found: dict[str, Any], _options: argparse.Namespace) -> Iterator[str]:
    if not found["collectives"]:
        return
    yield ""
    yield f"{'Collectives of a step':<58}{'ranks':>6}{'times':>7}{'GB':>10}{'ms':>9}"
    for one in found["collectives"]:
        place = "" if one["within_node"] else " (over nodes)"
        title = f"  {one['kind']}, {one['group']}{place}"
        yield f"{title:<58}{one['ranks']:>6}{one['times']:>7}{one['bytes'] / 1e9:>10.3f}{one['seconds'] * 1e3:>9.2f}"


def _roofline_lines(found: dict[str, Any], _options: argparse.Namespace) -> Iterator[str]:
    roofline = found["roofline"]
    if roofline is None:
        return
    given = roofline["rates"]
    yield ""
    yield "A model of the step's time, no measurement: nothing hidden, the host free, collectives not counted"
    yield (
        f"  rates (--rate): products {given['products']:g}, grouped {given['grouped']:g}, attention "
        f"{given['attention']:g} TFLOP/s, bandwidth {given['bandwidth']:g} TB/s, link {given['link']:g}, network "
        f"{given['network']:g} GB/s, smallest {given['smallest']:g} µs; for each doubling of a collective's "
        f"ranks {given['latency']:g} µs (latency), over nodes {given['network_latency']:g} µs (network_latency)"
    )
    yield f"  {'part':<42}{'operations':>11}{'GB':>9}{'TFLOP':>9}{'ms':>9}{'':>8}"
    whole = roofline["seconds"]
    for name, part in sorted(roofline["parts"].items(), key=lambda item: -item[1]["seconds"]):
        yield f"  {name:<42}{_work(part)}{part['seconds'] / whole:>8.1%}"
    yield f"  {'all':<42}{_work(roofline)}{1:>8.1%}"
    if roofline["guessed"]:
        yield f"  taken to pass over each argument once: {', '.join(roofline['guessed'])}"
    rate = roofline["model_flops"] / whole / 1e12
    yield f"  {rate:.0f} TFLOP/s of the model's FLOPs: {roofline['mfu']:.1%} of the card's (MFU)"


def _work(part: dict[str, Any]) -> str:
    return (
        f"{part['operations']:>11,}{part['bytes'] / 1e9:>9.1f}{part['flops'] / 1e12:>9.2f}{part['seconds'] * 1e3:>9.2f}"
    )
