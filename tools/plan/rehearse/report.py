"""Turn the records of a rehearsal into figures and text."""

import argparse
import math
import statistics
from collections.abc import Iterator
from typing import Any

from .cards import CARDS, CONTEXT

LINES_OF_ERROR = 6
PARTS = ("attention", "router", "count", "plan", "experts")  # of a layer, in the order of their work
RINGS = {"all_reduce": 2.0}  # how often a ring sends (n - 1)/n of the bytes; others once
POINT_TO_POINT = ("isend", "irecv")
MEMORY = {
    "peak_allocated_gib": "allocated at most",
    "peak_reserved_gib": "reserved at most",
    "forecast_gib": "forecast",
}


def error_in(log: str, code: int) -> str:
    """Return the words with which a training ended, which a cluster's console would show last."""
    lines = log.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("pretrain_gpt.py: error: ")]
    if starts:
        return "\n".join(lines[starts[-1] : starts[-1] + LINES_OF_ERROR])
    return f"exit code {code}; the end of its output:\n" + "\n".join(lines[-2 * LINES_OF_ERROR :])


def summary(records: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures: of the rank that needs most memory, and under "ranks" of each rank that was simulated."""
    fullest = max(records, key=lambda one: max((s["peak_allocated_gib"] for s in one["stages"].values()), default=0))
    forecasts = fullest["model"].get("forecast_gib", {})
    return {
        "rehearsal": "nothing was trained, and no GPU used",
        "gpus": options.gpus,
        "gpu": options.gpu,
        "starts": all(record["starts"] for record in records),
        "error": next((record["error"] for record in records if record["error"]), None),
        "rank": fullest["rank"],
        "kind": fullest["kind"],
        "stages": {name: peaks | {"forecast_gib": forecasts[name]} for name, peaks in fullest["stages"].items()},
        "launches": _launches(fullest) if "parts" in fullest else None,
        "host_syncs": fullest.get("host_syncs"),
        "late_waits": fullest.get("late_waits"),
        "collectives": timed(fullest.get("collectives", []), options.rates),
        "roofline": _roofline(fullest, options) if "roofline" in fullest else None,
        "ranks": records,
    }


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
    """Return the collectives of more than one rank, the longest first, with the seconds of latency and bytes."""
    counted = []
    for one in found:
        sent = one["bytes"] * (1 if one["kind"] in POINT_TO_POINT else (one["ranks"] - 1) / one["ranks"])
        rate = rates["link" if one["within_node"] else "network"] * 1e9
        latency = rates["latency" if one["within_node"] else "network_latency"] * 1e-6 * math.log2(one["ranks"])
        counted.append(one | {"seconds": RINGS.get(one["kind"], 1.0) * sent / rate + one["times"] * latency})
    return sorted((one for one in counted if one["ranks"] > 1), key=lambda one: -one["seconds"])


def _roofline(record: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    parts, model = record["roofline"], record["model"]
    total = {name: sum(part[name] for part in parts.values()) for name in ("operations", "bytes", "flops", "seconds")}
    counted, host, bubble = model["flops_per_sequence"], record["host"], model["bubble"]
    flops = counted and counted * model["sequences_per_gpu"]
    found = {"rates": options.rates, "model_flops": flops, **total, "parts": parts, "bubble": bubble}
    found |= {"host_seconds": host["seconds"], "host_calls": host["calls"], "stands_seconds": host["step_seconds"]}
    for name in ("", "stands_"):
        seconds = found[f"{name}seconds"] * bubble
        found[f"{name}mfu"] = flops and flops / seconds / (CARDS[options.gpu].tflops * 1e12)
    return found | {"guessed": record["guessed"]}


def lines(found: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    """Yield the text of a `summary`."""
    yield f"Rehearsal on {options.gpus} x {options.gpu}, with made-up tokens. Nothing was trained, and no GPU was used."
    if found["starts"]:
        yield "The training starts and takes its steps."
    else:
        yield f"THE TRAINING DOES NOT START ({found['ranks'][-1]['kind']}):"
        yield from (f"  {line}" for line in (found["error"] or "").splitlines())
    if found["stages"]:
        yield from _memory(found, options.gpu)
    if found["launches"] is not None:
        yield from _launch_lines(found["launches"])
        yield f"\nThe host waits for the device {sum(wait['times'] for wait in found['host_syncs'])} times in a step"
        yield from (f"  {wait['times']:4d} x {wait['where']}" for wait in found["host_syncs"])
        if found["late_waits"]:
            yield f"and {found['late_waits']} times for sizes, while what it launched since still runs"
    if found["collectives"]:
        yield f"\n{'Collectives of a step':<58}{'ranks':>6}{'times':>7}{'GB':>10}{'ms':>9}"
    for one in found["collectives"]:
        title = f"  {one['kind']}, {one['group']}{'' if one['within_node'] else ' (over nodes)'}"
        yield f"{title:<58}{one['ranks']:>6}{one['times']:>7}{one['bytes'] / 1e9:>10.3f}{one['seconds'] * 1e3:>9.2f}"
    if found["roofline"] is not None:
        yield from _roofline_lines(found["roofline"])


def _memory(found: dict[str, Any], gpu: str) -> Iterator[str]:
    stages = found["stages"]
    yield f"\nMemory of the fullest rank ({found['kind']}), GiB" + "".join(f"{name:>10}" for name in stages)
    for key, title in MEMORY.items():
        yield f"  {title:<45}" + "".join(f"{stage[key]:10.2f}" for stage in stages.values())
    yield f"  {gpu}: {CARDS[gpu].memory:g} GiB, of them about {CONTEXT:g} for the driver; forecast: remoe cost"
    if not found["starts"] and "out of memory" in (found["error"] or ""):
        yield "  It does not fit: take a smaller micro-batch, more expert (EP), tensor or pipeline parallelism, or"
        yield "  --recompute-granularity selective --recompute-modules moe."


def _launch_lines(launches: dict[str, Any]) -> Iterator[str]:
    yield f"\nLaunches of a step    {launches['step']:,} kernels, products, collectives, fills and copies"
    parts = ", ".join(f"{name} {number:g}" for name, number in launches["parts_of_layer"].items())
    if launches["forward_layer"] is not None:
        yield f"  a forward layer     {launches['forward_layer']:g} ({parts})"
    # --overlap-moe-expert-parallel-comm runs both passes together.
    if (forward := launches["micro_batch_forward"]) is not None:
        yield f"  a micro-batch       {forward:g} forward, {launches['micro_batch_backward']:g} backward"
    if launches["update"] is not None:
        yield f"  λ's update          {launches['update']:g}"


def _roofline_lines(roofline: dict[str, Any]) -> Iterator[str]:
    yield "\nA model of the step's time, not a measurement: no operation overlaps another, collectives not counted"
    yield "  rates (--rate): " + ", ".join(f"{name} {value:g}" for name, value in roofline["rates"].items())
    yield "  in TFLOP/s (products, grouped, attention), TB/s (bandwidth), GB/s (link, network), microseconds (smallest,"
    yield "  latencies of a collective for each doubling of its ranks, the host's frame and launch)"
    yield f"  {'part':<42}{'operations':>11}{'GB':>9}{'TFLOP':>9}{'ms':>9}{'':>8}"
    whole = roofline["seconds"]
    parts = sorted(roofline["parts"].items(), key=lambda item: -item[1]["seconds"])
    for name, part in [*parts, ("all", roofline)]:
        work = f"{part['operations']:>11,}{part['bytes'] / 1e9:>9.1f}{part['flops'] / 1e12:>9.2f}"
        yield f"  {name:<42}{work}{part['seconds'] * 1e3:>9.2f}{part['seconds'] / whole:>8.1%}"
    if roofline["guessed"]:
        yield f"  taken to pass over each argument once: {', '.join(roofline['guessed'])}"
    yield f"  the host: {roofline['host_calls']:,} calls of Python functions, {roofline['host_seconds'] * 1e3:.0f} ms"
    if (bubble := roofline["bubble"]) > 1:
        yield f"  the pipeline idles: below, times are {bubble:.2f} times a rank's work, (m v + p - 1) / (m v), of m"
        yield "  micro-batches, v virtual stages of a GPU and p GPUs of a pipeline"
    for title, start in (("with host waits", "stands_"), ("with a GPU that never waits for the host", "")):
        seconds, rate = roofline[f"{start}seconds"] * bubble, "MFU not known: some layers' FLOPs are not counted"
        if flops := roofline["model_flops"]:
            mfu = f"{roofline[f'{start}mfu']:.1%} of the card's (MFU)"
            rate = f"{flops / seconds / 1e12:.0f} TFLOP/s of the model, {mfu}"
        yield f"  {title}: {seconds * 1e3:.0f} ms, {rate}"
