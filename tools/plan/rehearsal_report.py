"""Turn the records of a rehearsal into figures and text."""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

from .gpus import CONTEXT, GPUS
from .step_time import StepTime, collective_seconds, conclude, host_seconds, waiting_seconds

MEMORY = {
    "peak_allocated_gib": "allocated at most",
    "peak_reserved_gib": "reserved at most",
    "forecast_gib": "estimate",
}


def summarize(records: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures: of the rank that needs most memory, and under "ranks" of each rank that was simulated."""
    fullest = max(records, key=lambda one: max((s["peak_allocated_gib"] for s in one["stages"].values()), default=0))
    forecasts = fullest["model"].get("forecast_gib", {})
    calls = [call for call in fullest.get("collectives", []) if call["ranks"] > 1]
    calls = [call | {"seconds": collective_seconds(call, options.rates)} for call in calls]
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
        "collectives": sorted(calls, key=lambda call: -call["seconds"]),
        "roofline": _roofline(fullest, calls, options) if "roofline" in fullest else None,
        "ranks": records,
    }


def _launches(record: dict[str, Any]) -> dict[str, Any]:
    by_part = {name: statistics.median(calls) for name, calls in record["parts"].items()}
    return {"step": record["launches"], "forward_layer": by_part.get("layer"), "update": by_part.get("update")}


def _roofline(record: dict[str, Any], calls: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    parts, model = record["roofline"], record["model"]
    total = {name: sum(part[name] for part in parts.values()) for name in ("operations", "bytes", "flops", "seconds")}
    products = sum(part["seconds"] for part in parts.values() if part["flops"])
    links, network = (
        sum(call["seconds"] for call in calls if call["within_node"] is within) for within in (True, False)
    )
    host = host_seconds(record["calls"], record["launches"], options.rates)
    waiting = waiting_seconds(host, total["seconds"])
    time = StepTime(products, total["seconds"] - products, waiting, links, network, model["bubble"])
    flops = model["step_flops"]
    least, most = (flops and flops / seconds / (GPUS[options.gpu].tflops * 1e12) for seconds in (time.least, time.most))
    figures = {"rates": options.rates, "model_flops": flops, **total, "parts": parts, "guessed": record["guessed"]}
    figures |= {"host_seconds": host, "host_calls": record["calls"], "seconds_with_waits": total["seconds"] + waiting}
    return figures | {"time": vars(time), "mfu": most, "mfu_at_best": least}


def write_lines(figures: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    """Yield the text of a summary. `options` also has "iterations", 0 if the number is not known."""
    yield f"Rehearsal on {options.gpus} x {options.gpu}, with made-up tokens. Nothing was trained, and no GPU was used."
    if figures["starts"]:
        yield "The training starts and takes its steps."
    else:
        yield f"THE TRAINING DOES NOT START ({figures['ranks'][-1]['kind']}):"
        yield from (f"  {line}" for line in (figures["error"] or "").splitlines())
    stages, gpu = figures["stages"], GPUS[options.gpu]
    if stages:
        yield f"\nMemory of the fullest rank ({figures['kind']}), GiB" + "".join(f"{name:>10}" for name in stages)
        for key, title in MEMORY.items():
            yield f"  {title:<45}" + "".join(f"{stage[key]:10.2f}" for stage in stages.values())
    if figures["launches"] is not None:
        yield from _launch_lines(figures["launches"])
        yield f"\nThe host waits for the device {sum(wait['times'] for wait in figures['host_syncs'])} times in a step"
        yield from (f"  {wait['times']:4d} x {wait['where']}" for wait in figures["host_syncs"])
    if figures["collectives"]:
        yield f"\n{'Collectives of a step':<58}{'ranks':>6}{'times':>7}{'GB':>10}{'ms':>9}"
    for one in figures["collectives"]:
        title = f"  {one['kind']}, {one['group']}{'' if one['within_node'] else ' (over nodes)'}"
        yield f"{title:<58}{one['ranks']:>6}{one['times']:>7}{one['bytes'] / 1e9:>10.3f}{one['seconds'] * 1e3:>9.2f}"
    time = None
    if (roofline := figures["roofline"]) is not None:
        yield from _roofline_lines(roofline)
        time = StepTime(**roofline["time"])
    yield ""
    if figures["starts"]:
        needed = max(stage["peak_reserved_gib"] for stage in stages.values()) + CONTEXT
        yield from conclude(time, options.iterations, needed, gpu.memory, options.gpu)
    elif "out of memory" in (figures["error"] or ""):
        yield from conclude(None, 0, None, gpu.memory, options.gpu)


def _launch_lines(launches: dict[str, Any]) -> Iterator[str]:
    yield f"\nLaunches of a step    {launches['step']:,} kernels, products, collectives, fills and copies"
    for key, title in {"forward_layer": "a forward layer", "update": "λ's update"}.items():
        if launches[key] is not None:
            yield f"  {title:<20}{launches[key]:g}"


def _roofline_lines(roofline: dict[str, Any]) -> Iterator[str]:
    yield "\nA model of the step's time, not a measurement: no operation overlaps another"
    yield "  rates (--rate): " + ", ".join(f"{name} {value:g}" for name, value in roofline["rates"].items())
    yield "  in TFLOP/s (products, grouped, attention), TB/s (bandwidth), GB/s (link, network), microseconds (smallest,"
    yield "  latencies of a collective for each doubling of its ranks, the host's frame and launch)"
    yield f"  {'part':<42}{'operations':>11}{'GB':>9}{'TFLOP':>9}{'ms':>9}{'':>8}"
    parts = sorted(roofline["parts"].items(), key=lambda item: -item[1]["seconds"])
    for name, part in [*parts, ("all", roofline)]:
        work = f"{part['operations']:>11,}{part['bytes'] / 1e9:>9.1f}{part['flops'] / 1e12:>9.2f}"
        yield f"  {name:<42}{work}{part['seconds'] * 1e3:>9.2f}{part['seconds'] / roofline['seconds']:>8.1%}"
    if roofline["guessed"]:
        yield f"  assumed to pass over each argument once: {', '.join(roofline['guessed'])}"
    yield f"  the host: {roofline['host_calls']:,} calls of Python functions, {roofline['host_seconds'] * 1e3:.0f} ms"
    yield f"  with the host's waits: {roofline['seconds_with_waits'] * 1e3:.0f} ms"
    if (bubble := roofline["time"]["bubble"]) > 1:
        yield f"  the pipeline idles: a step takes {bubble:.2f} times a rank's work, (m v + p - 1) / (m v), of m"
        yield "  micro-batches, v virtual stages of a GPU and p GPUs of a pipeline"
    if (least := roofline["mfu_at_best"]) is None:
        yield "  MFU not known: some layers' FLOPs are not counted"
    else:
        yield f"  MFU {roofline['mfu']:.1%} with waits and collectives, {least:.1%} with neither"
