"""The parts, in their order: what each runs, what it finds, and what it has to find."""

import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.models import FIT_STEPS, GPU_FLAGS, WATCHED_STEPS

from ..common.data_sets import write_documents
from ..common.log_reader import read_log
from ..common.places import ROOT
from ..cost.gpus import ACCELERATORS
from ..golden_run import EARLY, FLAGS, GOLDEN, TEXT, TOLERANCE, TOLERANCE_EARLY, difference
from ..rehearse.cards import CARDS
from . import launched
from .programs import NotRehearsed, PartError, Programs

GIB = 2**30
BENCHMARKS = ROOT / "benchmarks"
TIMED_ENTRY = BENCHMARKS / "timed_entry.py"
OUTCOMES = ("failure", "error", "skipped")
KERNEL_TESTS = (ROOT / "tests" / "kernels", ROOT / "tests" / "local" / "test_grouped_swiglu.py")
ALLOWED_MEMORY = 1.05  # of the rehearsed peak; a card's own libraries take a little
ALLOWED_WAITS = 1.1  # of the rehearsed ones: chunks of the dense stage depend on the routing
WARM_UP = FIT_STEPS + 1 + WATCHED_STEPS + 1  # steps
STEPS = {"dense": 50, "steady": 30}
FASTER = 0.98  # of PyTorch's time, from where on Triton's kernels are recommended: less is noise
Figures = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a part is given.

    Attributes:
        programs: run its programs.
        folder: for files in between.
        before: figures of the parts that are done, by name.
        card: as nvidia-smi names it.
    """

    programs: Programs
    folder: Path
    before: dict[str, Figures]
    card: str

    @property
    def is_rehearsed(self) -> bool:
        """Whether there is no GPU, and numbers mean nothing."""
        return self.programs.rehearsal is not None

    def python(self, *words: object, **options: Any) -> str:
        """As `Programs.python`."""
        return self.programs.python(*map(str, words), **options)


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        title: what it does, in a line.
        limit: seconds at most.
        run: finds its figures; "failures" among them are the reasons why it does not pass.
    """

    title: str
    limit: int
    run: Callable[[Work], Figures]


def environment(work: Work) -> Figures:
    """Card, driver, versions, what is missing, and the card's rates."""
    printed = work.python(Path(__file__).with_name("environment.py"))
    return json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))


def tests(work: Work) -> Figures:
    """Those marked `gpu`, but the benchmarks', which other parts run, and those of kernels."""
    if "pytest" in work.before.get("environment", {}).get("missing", {}):
        raise PartError("pytest is not installed: carry the wheels of pytest, pluggy, iniconfig, packaging, pygments")
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    found = _run_tests(work, "-m", "gpu", *(path for path in marked if path.name != "test_benchmarks.py"))
    if not work.is_rehearsed:
        found |= _run_tests(work, *KERNEL_TESTS, f"--ignore={KERNEL_TESTS[0] / 'test_compiles.py'}")  # needs none
    failures = [f"{name}: {result}" for name, result in found.items() if result not in ("passed", "skipped")]
    return {"results": found, "failures": failures}


def _run_tests(work: Work, *words: object) -> dict[str, str]:
    """Test → passed, skipped, failure or error; "pytest" → what it ended with before it could tell."""
    report = work.folder / "tests.xml"
    report.unlink(missing_ok=True)
    ended = "no report"
    try:
        work.python("pytest", "-v", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", *words)
    except PartError as error:
        ended = str(error)
    if not report.exists():
        return {"pytest": ended}
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = [child.tag for child in case if child.tag in OUTCOMES]
        found[f"{case.get('classname')}::{case.get('name')}"] = outcomes[0] if outcomes else "passed"
    return found


def golden(work: Work) -> Figures:
    """The golden run's training on the GPU, in fp32 and Megatron's own layers, against the committed CPU's."""
    found = _train_golden(work, "golden", FLAGS, [])
    expected = {int(key): value for key, value in json.loads(GOLDEN.read_text()).items()}
    failures = [] if work.is_rehearsed else _differences(found, expected)
    return {"found": found, "expected": expected, "failures": failures}


def launch(work: Work) -> Figures:
    """The dense stage, with which training starts, and the steady one."""
    stages, failures = _each({stage: partial(_train_launched, work, stage) for stage in launched.STAGES})
    return _beside_rehearsal(stages, failures, work.card)


def step(work: Work) -> Figures:
    """Benchmark a, every shape once."""
    few = ["--steps", "2", "--shapes", "(8, 8)"]
    return _benchmark(work, "step", "--rounds", "1", *(few if work.is_rehearsed else ["--steps", "20"]))


def layer(work: Work) -> Figures:
    """Benchmark c in bf16, with the peers that can be imported."""
    if work.is_rehearsed:
        raise NotRehearsed("peers split their tokens by numbers that they read from the device, where there are none")
    return _benchmark(work, "layer", "--bf16", "--repetitions", "9")


def memory(work: Work) -> Figures:
    """Benchmark e."""
    return _benchmark(work, "memory", *(["--experts", "8"] if work.is_rehearsed else []))


def kernels(work: Work) -> Figures:
    """`--moe-kernels torch` and `triton`: a tiny training, a layer, and the 182M model's step."""
    fused = [flag for flag in FLAGS if flag != "--no-local-layer-fusion"]
    ways = {way: ["--moe-kernels", way] for way in ("torch", "triton")}
    found, failures = _each(
        {
            "layer": lambda: _benchmark(work, "kernels", *(["--tokens", "256"] if work.is_rehearsed else [])),
            "launched": lambda: {way: _train_launched(work, "steady", more) for way, more in ways.items()},
            "trained": lambda: {way: _train_golden(work, "fused", fused, more) for way, more in ways.items()},
        }
    )
    if work.is_rehearsed:
        return found | {"failures": failures}
    failures += found.get("layer", {}).get("failures", [])
    if "trained" in found:
        failures += _differences(found["trained"]["triton"], found["trained"]["torch"])
    recommended, reason = "torch", failures[0] if failures else ""
    if "launched" in found and not failures:
        ratio = found["launched"]["triton"]["seconds"] / found["launched"]["torch"]["seconds"]
        recommended = "triton" if ratio < FASTER else "torch"
        reason = f"a step of the 182M model takes {ratio:.3f} of PyTorch's time"
    return found | {"failures": failures, "recommended": recommended, "reason": reason}


# Together a quarter of an hour.
PARTS = {
    "environment": Part("card, driver, versions, rates", 30, environment),
    "tests": Part("the tests that need a GPU", 130, tests),
    "golden": Part("the golden model: loss, S and λ against the CPU's", 60, golden),
    "launch": Part("the launch script's 182M ReMoE: time, memory and waits against the rehearsal's", 160, launch),
    "step": Part("benchmarks/step.py in bf16: a training step, ReMoE and top-k", 160, step),
    "layer": Part("benchmarks/layer.py in bf16: one MoE layer, and its peers", 60, layer),
    "memory": Part("benchmarks/memory.py in bf16: memory while routing is dense", 130, memory),
    "kernels": Part("--moe-kernels torch and triton: numbers and times", 170, kernels),
}


def _each(runs: dict[str, Callable[[], Figures]]) -> tuple[Figures, list[str]]:
    """What those found that came to their end, and why the others did not."""
    found, failures = {}, []
    for name, run in runs.items():
        try:
            found[name] = run()
        except PartError as error:
            failures.append(f"{name}: {error}")
    return found, failures


def _train_golden(work: Work, name: str, flags: list[str], more: list[str]) -> dict[int, dict[str, float]]:
    """Its figures by iteration, from weights that the CPU draws."""
    weights, text = work.folder / f"{name}.pt", work.folder / "text"
    if not text.with_suffix(".bin").exists():
        write_documents(text, TEXT.read_bytes().split(b"\n\n"))
    entry, data = Path(__file__).with_name("golden_entry.py"), ["--data-path", text]
    from_there = {"ACCEPTANCE_WEIGHTS": str(weights)}
    if not weights.exists():
        work.python(entry, *flags, *data, "--cpu", on_gpu=False, OMP_NUM_THREADS="1", **from_there)
    hardware = [flag for flag in GPU_FLAGS[: GPU_FLAGS.index("--log-interval")] if flag != "--bf16"]
    few = ["--exit-interval", "5"] if work.is_rehearsed else []
    printed = work.python(entry, *flags, *hardware, *data, *more, *few, share=0.125, **from_there)
    return {
        iteration: {figure: float(fields[figure]) for figure in TOLERANCE}
        for iteration, fields in read_log(printed).items()
    }


def _differences(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> list[str]:
    """Where the figures are out of the golden run's tolerance, which is that between two processors."""
    failures = [] if found.keys() == expected.keys() else [f"logged iterations are {sorted(found)}"]
    for iteration in sorted(found.keys() & expected.keys()):
        for figure, value in expected[iteration].items():
            off = difference(figure, found[iteration][figure], value)
            allowed = (TOLERANCE_EARLY if iteration <= EARLY else TOLERANCE)[figure]
            if not off <= allowed:
                failures.append(f"iteration {iteration}, {figure}: {found[iteration][figure]:g} instead of {value:g}")
    return failures


def _train_launched(work: Work, stage: str, more: Sequence[str] = ()) -> Figures:
    """Seconds of a step, memory and waits of the launch command in one stage, medians of the steps after the first."""
    steps = WARM_UP + 3 if work.is_rehearsed else STEPS[stage]
    record, at_target = work.folder / "record.json", {"BENCHMARK_AT_TARGET": "1"} if stage == "steady" else {}
    settings = launched.command()[0] | at_target | {"BENCHMARK_RECORD": str(record), "BENCHMARK_PROFILE": "waits"}
    words = [*launched.flags(stage, steps), *more]
    printed = work.python(TIMED_ENTRY, *words, share=launched.STAGES[stage], **settings)
    found = json.loads(record.read_text())
    after = slice(WARM_UP, None)
    losses = [float(fields["lm loss"]) for fields in read_log(printed).values()]
    allocated, reserved = (max(peak[kind] for peak in found["peaks"][after]) / GIB for kind in (0, 1))
    return {
        "seconds": statistics.median(found["steps"][after]),
        "losses": losses,
        "active": statistics.mean(found["active"][after]),
        "peak_allocated_gib": allocated,
        "peak_reserved_gib": reserved,
        "host_syncs": found["host_syncs"],
        "waits": statistics.median(sum(step.values()) for step in found["host_syncs"]),
        "matmul_tflops": found["peak_flops"] / 1e12,
        "update_seconds": found["median_update"],
    }


def _beside_rehearsal(stages: dict[str, Figures], failures: list[str], card: str) -> Figures:
    """The stages beside what was rehearsed, with tokens per second and MFU, and what is not as it should be."""
    expected = json.loads(launched.EXPECTED.read_text(encoding="utf-8"))
    kind = next((name for name, sort in CARDS.items() if sort.title in card), None)
    for stage, found in stages.items():
        rehearsed = expected[stage]
        flops = rehearsed["roofline"]["model_flops"] / found["seconds"]
        found["rehearsed"] = rehearsed
        found["tokens_per_second"] = launched.SEQUENCES * launched.LENGTH / found["seconds"]
        found["mfu"] = flops / (ACCELERATORS[kind].tflops * 1e12) if kind else None
        found["of_matmul_rate"] = flops / (found["matmul_tflops"] * 1e12)
        if not all(map(math.isfinite, found["losses"])):
            failures.append(f"{stage}: losses {found['losses']}")
        peak, waits = rehearsed["peak_allocated_gib"], sum(wait["times"] for wait in rehearsed["host_syncs"])
        if found["peak_allocated_gib"] > ALLOWED_MEMORY * peak:
            failures.append(f"{stage}: {found['peak_allocated_gib']:.2f} GiB at most instead of {peak:.2f}")
        if found["waits"] > ALLOWED_WAITS * waits:
            failures.append(f"{stage}: {found['waits']} waits of a step instead of {waits}")
    return stages | {"failures": failures}


def _benchmark(work: Work, name: str, *words: str) -> Figures:
    """What it wrote; "failures" where there were some. What it has measured is kept where it fails or is ended."""
    path = work.folder / f"{name}.json"
    path.unlink(missing_ok=True)
    error = ""
    try:
        work.python(BENCHMARKS / f"{name}.py", "--output", path, *words, share=0.125)
    except PartError as failed:
        if not path.exists():
            raise
        error = str(failed)
    found = json.loads(path.read_text(encoding="utf-8"))
    return {"failures": []} | found | ({"failures": [error]} if error else {})
