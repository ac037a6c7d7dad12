"""Turn the records of a rehearsal into figures and text."""

import argparse
from collections.abc import Iterator
from typing import Any

from .gpus import CONTEXT, GPUS, format_duration, judge_memory
from .step_time import StepTime, collective_seconds, host_seconds, waiting_seconds

MEMORY = {"peak_allocated_gib": "allocated at most", "peak_reserved_gib": "reserved at most"}


def summarize(records: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the memory of the fullest rank and the step of the slowest rank; "ranks" has all records."""

    def peak(record: dict[str, Any]) -> float:
        return max((stage["peak_allocated_gib"] for stage in record["stages"].values()), default=0)

    fullest = max(records, key=peak)
    figures = fullest | {"gpus": options.gpus, "gpu": options.gpu, "rates": options.rates, "ranks": records}
    figures |= {"starts": records[-1]["starts"], "error": records[-1]["error"]}
    times = [_model_time(record, options) for record in records if "roofline" in record]
    return figures | max(times, key=lambda time: time["roofline"]["all"]["seconds"], default={})


def _model_time(record: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return a rank's collectives with their seconds, its roofline with the sum under "all", and its step's time."""
    calls = [call for call in record["collectives"] if call["ranks"] > 1]
    calls = [call | {"seconds": collective_seconds(call, options.rates)} for call in calls]
    parts, names = record["roofline"], ("operations", "bytes", "flops", "seconds")
    total = {name: sum(part[name] for part in parts.values()) for name in names}
    products = sum(part["seconds"] for part in parts.values() if part["flops"])
    links = sum(call["seconds"] for call in calls if call["within_node"])
    network = sum(call["seconds"] for call in calls if not call["within_node"])
    host = host_seconds(record["calls"], record["launches"], options.rates)
    waiting = waiting_seconds(host, total["seconds"])
    time = StepTime(products, total["seconds"] - products, waiting, links, network, record["model"]["bubble"])
    flops, peak = record["model"]["step_flops"], GPUS[options.gpu].tflops * 1e12
    return {name: record[name] for name in ("launches", "calls", "host_syncs")} | {
        "collectives": sorted(calls, key=lambda call: -call["seconds"]),
        "roofline": parts | {"all": total},
        "host_seconds": host,
        "time": vars(time),
        "mfu": flops / time.most / peak,
        "mfu_at_best": flops / time.least / peak,
    }


def write_lines(figures: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    """Yield the text of a summary. `options` also has "iterations", 0 if the number is not known."""
    yield f"Rehearsal on {options.gpus} x {options.gpu}, with made-up tokens. Nothing was trained, and no GPU was used."
    if figures["starts"]:
        yield "The training starts and takes its steps."
    else:
        yield f"THE TRAINING DOES NOT START ({figures['ranks'][-1]['kind']}):"
        yield from (f"  {line}" for line in figures["error"].splitlines())
    stages, gpu = figures["stages"], GPUS[options.gpu]
    if stages:
        yield f"\nMemory of the fullest rank ({figures['kind']}), GiB" + "".join(f"{name:>10}" for name in stages)
        rows = {title: [stage[key] for stage in stages.values()] for key, title in MEMORY.items()}
        rows["estimate"] = [figures["model"]["forecast_gib"][name] for name in stages]
        yield from (f"  {title:<45}" + "".join(f"{size:10.2f}" for size in row) for title, row in rows.items())
    if "time" in figures:
        yield from _step_lines(figures)
    yield ""
    if figures["starts"]:
        needed = max(stage["peak_reserved_gib"] for stage in stages.values()) + CONTEXT
        *advice, verdict = judge_memory(needed, gpu)
        *step, hours = time_lines(StepTime(**figures["time"]), options.iterations)
        yield from (*advice, *step, f"{verdict}; {hours}")
    elif "out of memory" in figures["error"]:
        yield from judge_memory(None, gpu)


def time_lines(time: StepTime, iterations: float) -> Iterator[str]:
    """Yield the time of a step, then the run's hours and their limit; `iterations` is 0 if unknown."""
    yield f"Time: {time.least * 1e3:,.0f} to {time.most * 1e3:,.0f} ms a step. Modelled, not measured"
    least, most = (format_duration(seconds * iterations) for seconds in (time.least, time.most))
    hours = f"at best {least}, {most} if nothing overlaps; " if iterations else ""
    yield f"{hours}limited by {time.limit()}"


def _step_lines(figures: dict[str, Any]) -> Iterator[str]:
    waits, time = figures["host_syncs"], StepTime(**figures["time"])
    yield f"\nLaunches of a step    {figures['launches']:,} kernels, products, collectives, fills and copies"
    yield f"\nThe host waits for the device {sum(waits.values())} times in a step"
    yield from (f"  {times:4d} x {where}" for where, times in waits.items())
    yield f"\n{'Collectives of a step':<58}{'ranks':>6}{'times':>7}{'GB':>10}{'ms':>9}"
    for call in figures["collectives"]:
        title = f"  {call['kind']}, {call['group']}{'' if call['within_node'] else ' (over nodes)'}"
        size = f"{call['bytes'] / 1e9:>10.3f}{call['seconds'] * 1e3:>9.2f}"
        yield f"{title:<58}{call['ranks']:>6}{call['times']:>7}{size}"
    yield "\nA model of the step's time, not a measurement: no operation overlaps another"
    yield "  rates (--rate): " + ", ".join(f"{name} {value:g}" for name, value in figures["rates"].items())
    yield "  in TFLOP/s (products, grouped, attention), TB/s (bandwidth), GB/s (link, network), microseconds (smallest,"
    yield "  latencies of a collective for each doubling of its ranks, the host's frame and launch)"
    yield f"  {'work':<42}{'operations':>11}{'GB':>9}{'TFLOP':>9}{'ms':>9}"
    for name, part in figures["roofline"].items():
        work = f"{part['operations']:>11,}{part['bytes'] / 1e9:>9.1f}{part['flops'] / 1e12:>9.2f}"
        yield f"  {name:<42}{work}{part['seconds'] * 1e3:>9.2f}"
    yield f"  the host: {figures['calls']:,} calls of Python functions, {figures['host_seconds'] * 1e3:.0f} ms"
    yield f"  waits for the host: {time.waiting * 1e3:.0f} ms"
    if time.bubble > 1:
        yield f"  the pipeline idles: a step takes {time.bubble:.2f} times a rank's work"
    yield f"  MFU {figures['mfu']:.1%} to {figures['mfu_at_best']:.1%}: the model's FLOPs in the step's time"
