"""The results as lines and as the tables of docs/gpu.md."""

import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common.files import write_between
from ..common.markdown import table
from ..common.places import ROOT
from .parts import PARTS

DOCS = ROOT / "docs" / "gpu.md"
STATES = {"failed": "FAILED", "error": "ERROR", "out of time": "OUT OF TIME"}
Figures = dict[str, Any]


def line(name: str, result: Mapping[str, Any], is_rehearsed: bool) -> str:
    """A part's state, its time, and what it found in a few words."""
    state = "ran" if is_rehearsed and result["state"] == "passed" else result["state"]
    state = STATES.get(state, state)
    return f"{name:<12} {state:<13} {result['seconds']:>6.0f} s   {words(name, result, is_rehearsed)}".rstrip()


def words(name: str, result: Mapping[str, Any], is_rehearsed: bool) -> str:
    """What a part found, or why there is nothing."""
    if "figures" not in result:
        return _reason(result["error"])
    figures = result["figures"]
    failures = figures.get("failures") or []
    said = _reason(failures[0]) + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else "") if failures else ""
    return "; ".join(filter(None, (SAYS[name](figures, is_rehearsed), said)))


def summary(results: Mapping[str, Mapping[str, Any]], is_rehearsed: bool) -> list[str]:
    """The table at the end."""
    lines = [line(name, result, is_rehearsed) for name, result in results.items()]
    if is_rehearsed:
        lines.append("Nothing ran on a GPU: numbers and times mean nothing, and what compares them cannot pass.")
    return lines


def write_docs(path: Path) -> None:
    """Put the tables of these results into docs/gpu.md, where results of their kind belong."""
    found = json.loads(path.read_text(encoding="utf-8"))
    kind = "rehearsed" if found["rehearsal"] else "measured"
    begin, end = (f"<!-- gpu-acceptance {kind}: {side} -->" for side in ("begin", "end"))
    write_between(DOCS, begin, end, tables(found))


def tables(found: Mapping[str, Any]) -> str:
    """One table of all parts, and those of the parts that have one."""
    is_rehearsed, parts = found["rehearsal"], found["parts"]
    machine = found["machine"]
    lines = [
        f"{machine['card'].split(' (UUID')[0]}, torch {machine['torch']}, commit {machine['commit'] or 'unknown'}."
    ]
    rows = []
    for name in PARTS:
        if name in parts:
            result = parts[name]
            state = "ran" if is_rehearsed and result["state"] == "passed" else result["state"]
            seconds = "" if is_rehearsed else f"{result['seconds']:.0f}"
            rows.append([name, result["date"], state, seconds, words(name, result, is_rehearsed)])
    lines += ["", *table(["part", "date", "result", "seconds", "what it says"], rows)]
    for name, of_part in TABLES.items():
        if "figures" in parts.get(name, {}):
            lines += ["", *of_part(parts[name]["figures"], is_rehearsed)]
    return "\n".join(lines)


def _reason(text: str) -> str:
    """A message's first line, and of a program's output the last that tells of an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines[1:] if re.search(r"\berror\b|Error:", line)] or lines[1:]
    return ": ".join([lines[0].rstrip(":"), *errors[-1:]])[:300].replace("|", "/")


def _environment(figures: Figures, is_rehearsed: bool) -> str:
    said = f"{figures['card']}, driver {figures['driver']}, torch {figures['versions']['torch']}, "
    said += f"megatron-core {figures['versions']['megatron-core']}"
    if not is_rehearsed:
        said += f"; {figures['bf16_tflops']:.0f} TFLOP/s in bf16, copies at {figures['copy_tb_per_second']:.2f} TB/s"
    missing = ", ".join(figures["missing"])
    return said + (f"; not there: {missing}" if missing else "")


def _tests(figures: Figures, _is_rehearsed: bool) -> str:
    results = list(figures["results"].values())
    return f"{results.count('passed')} of {len(results)} passed"


def _golden(figures: Figures, is_rehearsed: bool) -> str:
    last = max(figures["found"], key=int)
    if is_rehearsed:
        return f"trained to iteration {last}; its figures are not compared"
    found, expected = figures["found"][last], figures["expected"][last]
    return f"iteration {last}: " + ", ".join(f"{name} {found[name]:g} (CPU: {expected[name]:g})" for name in expected)


def _launch(figures: Figures, is_rehearsed: bool) -> str:
    said = []
    for stage in [stage for stage in ("dense", "steady") if stage in figures]:
        found, rehearsed = figures[stage], figures[stage]["rehearsed"]
        waits = sum(wait["times"] for wait in rehearsed["host_syncs"])
        speed = "" if is_rehearsed else f"{found['tokens_per_second']:,.0f} tokens/s, MFU {_percent(found['mfu'])}, "
        said.append(
            f"{stage}: {speed}{found['peak_allocated_gib']:.2f} GiB ({rehearsed['peak_allocated_gib']:.2f}), "
            f"{found['waits']} waits ({waits})"
        )
    return "; ".join(said) + " (in brackets: tools/rehearse)"


def _step(figures: Figures, is_rehearsed: bool) -> str:
    shapes = figures["results"]
    if is_rehearsed:
        return f"{sum(map(len, shapes.values()))} trainings"
    ratios = {shape: found["ReMoE"]["seconds"] / found["top-k"]["seconds"] for shape, found in shapes.items()}
    return "ReMoE over top-k: " + ", ".join(f"{shape} {ratio:.3f}" for shape, ratio in ratios.items())


def _layer(figures: Figures, is_rehearsed: bool) -> str:
    peers = ", ".join(name for name in next(iter(figures["seconds"].values())) if name != "ReMoE, grouped")
    if is_rehearsed:
        return f"runs beside {peers}"
    best = 0
    for times in figures["seconds"].values():
        medians = {name: statistics.median(found) for name, found in times.items()}
        best += medians["ReMoE, grouped"] == min(medians.values())
    return f"fastest in {best} of {len(figures['seconds'])} cases, beside {peers}"


def _memory(figures: Figures, is_rehearsed: bool) -> str:
    if is_rehearsed:  # all of them have the same active share
        return f"{sum(map(len, figures['results'].values()))} trainings"
    said = []
    for experts, records in figures["results"].items():
        if {"dense stage", "at the target"} <= records.keys():
            ratio = records["dense stage"]["peak_bytes"] / records["at the target"]["peak_bytes"]
            said.append(f"E = {experts}: {ratio:.2f}")
    return "dense stage over target: " + ", ".join(said)


def _kernels(figures: Figures, is_rehearsed: bool) -> str:
    if is_rehearsed:
        return f"both ways run: {', '.join(name for name in figures if name != 'failures')}"
    return f"recommended: --moe-kernels {figures['recommended']} ({figures['reason']})"


SAYS: dict[str, Callable[[Figures, bool], str]] = {
    "environment": _environment,
    "tests": _tests,
    "golden": _golden,
    "launch": _launch,
    "step": _step,
    "layer": _layer,
    "memory": _memory,
    "kernels": _kernels,
}


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _tests_table(figures: Figures, _is_rehearsed: bool) -> list[str]:
    return table(["test", "result"], figures["results"].items())


def _golden_table(figures: Figures, is_rehearsed: bool) -> list[str]:
    if is_rehearsed:
        return []
    names = list(next(iter(figures["expected"].values())))
    rows = []
    for iteration, expected in figures["expected"].items():
        found = figures["found"].get(iteration, {})
        pairs = ((found.get(name, float("nan")), expected[name]) for name in names)
        rows.append([iteration, *(f"{value:g}" for pair in pairs for value in pair)])
    return table(["iteration", *(title for name in names for title in (name, "CPU"))], rows, text=0)


def _launch_table(figures: Figures, is_rehearsed: bool) -> list[str]:
    lines: list[tuple[str, str, str]] = []
    for stage in [stage for stage in ("dense", "steady") if stage in figures]:
        found, model = figures[stage], figures[stage]["rehearsed"]
        waits = sum(wait["times"] for wait in model["host_syncs"])
        rows: list[tuple[str, str, str]] = []
        if not is_rehearsed:
            rows += [("seconds a step", f"{found['seconds']:.3f}", f"{model['roofline']['seconds']:.3f} (a model)")]
            rows += [("tokens/s", f"{found['tokens_per_second']:,.0f}", "")]
            rows += [
                ("MFU, of the data sheet's rate", _percent(found["mfu"]), f"{model['roofline']['mfu']:.1%} (a model)")
            ]
            rows += [("of the measured matmul rate", _percent(found["of_matmul_rate"]), "")]
            rows += [("active experts per token", f"{found['active']:.2f}", "")]
        for kind in ("allocated", "reserved"):
            key = f"peak_{kind}_gib"
            rows.append((f"GiB {kind} at most", f"{found[key]:.2f}", f"{model[key]:.2f}"))
        rows.append(("waits of a step", str(found["waits"]), str(waits)))
        lines += [(f"{stage}: {title}", here, there) for title, here, there in rows]
    here = "this run" if is_rehearsed else "measured"
    return table(["182M ReMoE, one GPU, 4 micro-batches of 16", here, "rehearsal"], lines, text=1)


def _step_table(figures: Figures, is_rehearsed: bool) -> list[str]:
    if is_rehearsed:
        return []
    rows = []
    for shape, found in figures["results"].items():
        for variant, one in found.items():
            ratio, speed = one["seconds"] / found["ReMoE"]["seconds"], f"{one['tokens_per_second']:,.0f}"
            rows.append([shape, variant, f"{one['seconds']:.4g}", speed, f"{ratio:.3f}", f"{one['utilization']:.1%}"])
    titles = ["(E, G)", "variant", "s/step", "tokens/s", "over ReMoE", "of the matmul rate"]
    return table(titles, rows, text=2)


def _layer_table(figures: Figures, is_rehearsed: bool) -> list[str]:
    return [] if is_rehearsed else _by_case("layer", "ms", figures["seconds"], _milliseconds)


def _memory_table(figures: Figures, is_rehearsed: bool) -> list[str]:
    if is_rehearsed:
        return []
    return _by_case("E", "MiB", figures["results"], lambda record: f"{record['peak_bytes'] / 2**20:,.0f}")


def _by_case(
    case: str, unit: str, figures: Mapping[str, Mapping[str, Any]], written: Callable[[Any], str]
) -> list[str]:
    """A table with a line for each case and a column for each name, empty where there is no figure."""
    names = list(next(iter(figures.values())))
    rows = (
        [title, *(written(found[name]) if name in found else "" for name in names)] for title, found in figures.items()
    )
    return table([case, *(f"{name}, {unit}" for name in names)], rows, text=1)


def _milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.3g}"


def _kernels_table(figures: Figures, is_rehearsed: bool) -> list[str]:
    if is_rehearsed:
        return []
    rows = []
    for case, ways in figures.get("layer", {}).get("layers", {}).items():
        times = [_milliseconds(ways[way]["seconds"]) for way in ("torch", "triton")]
        errors = [f"{ways[way]['error']:.1e}" for way in ("torch", "triton")]
        rows.append([f"one layer, (E, G) = {case}", *times, *errors])
    if "launched" in figures:
        times = [f"{figures['launched'][way]['seconds'] * 1e3:.4g}" for way in ("torch", "triton")]
        rows.append(["a step of the 182M ReMoE", *times, "", ""])
    return table(["both ways", "torch, ms", "triton, ms", "largest error, torch", "triton"], rows, text=1)


TABLES: dict[str, Callable[[Figures, bool], list[str]]] = {
    "tests": _tests_table,
    "golden": _golden_table,
    "launch": _launch_table,
    "step": _step_table,
    "layer": _layer_table,
    "memory": _memory_table,
    "kernels": _kernels_table,
}
