"""Compare ReMoE with other routings, by length, at equal steps and at equal FLOPs, each at its own learning rate.

remoe compare --experts 8 --arms moe --steps 400 1200 --seeds 1 2 3   # about an hour on 2 cores
remoe compare                                                        # everything: days
remoe compare --collect                                              # tables and picture so far

The learning rate is constant and falls in the last fifth of each run. A longer run goes on from a shorter one, from the
step at which its rate began to fall. Every other arm has one more run for each length, which has used the FLOPs of
ReMoE at that length. First, the rate and the warm-up of each arm are tuned for each number of experts, on another part
of the text and with another seed, in as many runs each. The same command continues after a stop.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console

from ..console.display import say
from ..console.flags import above_zero, tool_parser, whole_number
from ..recipes import tiny
from ..recipes.flops import flops_per_sequence
from ..runs.figure_reader import read_figures
from ..runs.running import run_tool
from .arms import ARMS
from .figures import BASE
from .grids import add_options, parse_words, prepare_text, read_rows, train_rounds, write_page
from .jobs import Grid, Job, make_job
from .pictures import Panel
from .results import Row, read_folder
from .run import STEP, Run, check_flags, rounded
from .tables import EQUAL_FLOPS, EQUAL_STEPS, Line, gaps, markdown

REFERENCE = "remoe"
USUAL = ("dense", "moe", "moe-lossfree", "moe-hash", "moe-expert-threshold", "moe-topp", "remoe", "remoe-capped")
TUNING_SEED = 1233
LEAST = 20  # steps of a run
Tuned = Mapping[tuple[int, str], tuple[float, int]]  # experts and arm → factor on the learning rate, and warm-up steps


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; words after -- become `flags`."""
    parser = tool_parser("compare", __doc__)
    add_options(parser, "compare", range(1, 9))
    add, number, default = parser.add_argument, whole_number(1), "(default: %(default)s)"
    text = f"of {', '.join(ARMS)}"
    add("--arms", nargs="+", choices=ARMS, default=[*USUAL], metavar="ARM", help=f"{text} {default}")
    text = f"measure gaps from this arm; equal FLOPs are always those of {REFERENCE}"
    add("--reference", choices=ARMS, default=REFERENCE, metavar="ARM", help=f"{text} {default}")
    add("--experts", nargs="+", type=number, default=[8, 32, 128], metavar="E", help=f"of a layer {default}")
    add("--granularity", type=number, default=1, metavar="G", help=f"smaller experts of each {default}")
    add("--topk", type=number, default=1, metavar="K", help=f"experts of a token, before granularity {default}")
    sizes = "; ".join(f"{name}: {model.layers} layers of {model.hidden}" for name, model in tiny.SIZES.items())
    add("--size", choices=tiny.SIZES, default=tiny.BASE_SIZE, help=f"of the tiny model, {sizes} {default}")
    add("--steps", nargs="+", type=number, default=[400, 1200, 3600, 12000], metavar="N", help=f"lengths {default}")
    text = "factors on the learning rate to tune over"
    add(
        "--lr-factors", nargs="+", type=above_zero, default=[0.25, 0.5, 1.0, 2.0], metavar="X", help=f"{text} {default}"
    )
    text = "learning-rate warm-up steps to tune over; longer than the dense start, as in the paper"
    add("--warmups", nargs="+", type=number, default=[300], metavar="N", help=f"{text} {default}")
    add("--tuning-steps", type=number, default=1200, metavar="N", help=f"steps of a tuning run {default}")
    args = parse_words(parser, words)
    args.arms = [arm for arm in ARMS if arm in (*args.arms, args.reference, REFERENCE)]
    for name in ("experts", "steps", "lr_factors", "warmups"):
        setattr(args, name, [*dict.fromkeys(getattr(args, name))])
    args.is_tuned = len(args.lr_factors) * len(args.warmups) > 1
    tuning = [args.tuning_steps] if args.is_tuned else []
    for flag, values in (("--steps", args.steps), ("--tuning-steps", tuning)):
        if wrong := [value for value in values if value % STEP or value < LEAST]:
            parser.error(f"{flag} {wrong[0]}: give a multiple of {STEP} of at least {LEAST}.")
        if wrong := [value for value in values if replace(BASE, steps=value).decay_start < max(args.warmups)]:
            parser.error(f"{flag} {wrong[0]}: the last fifth starts before --warmups {max(args.warmups)}.")
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds {TUNING_SEED}: reserved for tuning. Give another one.")
    return args


def base_run(args: argparse.Namespace) -> Run:
    """Return ReMoE's run with the fields that all runs share."""
    run = replace(BASE, size=args.size, granularity=args.granularity, topk=args.topk, tokens=args.tokens)
    return replace(run, is_wsd=True)


def tuning_runs(args: argparse.Namespace) -> list[Run]:
    """Return the runs that tune each arm for each number of experts; none if there is nothing to choose from."""
    runs = (
        replace(base_run(args), arm=arm, experts=experts, seed=TUNING_SEED, steps=args.tuning_steps, rate=rate,
                warmup=warmup, is_tuning=True)
        for experts in args.experts
        for arm in args.arms
        for rate in args.lr_factors
        for warmup in args.warmups
    )  # fmt: skip
    return [*dict.fromkeys(runs)] if args.is_tuned else []


def read_tuning(args: argparse.Namespace, rows: Sequence[Row]) -> dict[tuple[int, str], dict[tuple[float, int], float]]:
    """Return experts and arm → factor on the rate and warm-up → loss."""
    results = dict(rows)
    losses: dict[tuple[int, str], dict[tuple[float, int], float]] = {}
    for run in tuning_runs(args):
        result = results.get(run)
        if result is not None and result.loss is not None and run.warmup is not None:
            losses.setdefault((run.experts, run.arm), {})[run.rate, run.warmup] = result.loss
    return losses


def choose_rates(args: argparse.Namespace, rows: Sequence[Row]) -> dict[tuple[int, str], tuple[float, int]]:
    """Return experts and arm → the factor and the warm-up with the lowest loss, or the only ones given."""
    if not args.is_tuned:
        only = args.lr_factors[0], args.warmups[0]
        return {(experts, arm): only for experts in (*args.experts, 0) for arm in args.arms}
    return {key: min(losses, key=losses.__getitem__) for key, losses in read_tuning(args, rows).items()}


def planned_runs(args: argparse.Namespace, tuned: Tuned) -> list[Run]:
    """Return the runs of all arms, lengths and seeds, ReMoE's first."""
    runs = []
    for seed in args.seeds:
        for experts in args.experts:
            for arm in sorted(args.arms, key=lambda arm: arm != REFERENCE):
                run = replace(base_run(args), arm=arm, experts=experts, seed=seed)
                if (chosen := tuned.get((run.experts, arm))) is not None:
                    rate, warmup = chosen
                    runs += [replace(run, rate=rate, warmup=warmup, steps=steps) for steps in args.steps]
    return [*dict.fromkeys(runs)]


def runs_of_equal_flops(jobs: Sequence[Job]) -> list[Run]:
    """Return the runs with the FLOPs of ReMoE's run of the same seed and length, given the runs of equal steps."""
    references = [job for job in jobs if job.run.arm == REFERENCE and job.is_done]
    runs = []
    for job in (job for job in jobs if job.run.arm != REFERENCE and job.is_done):
        for other in references:
            if other.run.experts == (job.run.experts or other.run.experts) and is_like(other.run, job.run):
                steps = steps_with_flops(job, flops_of_job(other))
                # An arm that costs more than ReMoE has no such run: it would be shorter than its own length.
                runs += [replace(job.run, steps=steps)] if steps > job.run.steps else []
    return [*dict.fromkeys(runs)]


def is_like(reference: Run, run: Run) -> bool:
    """Return whether two runs have the same seed and length."""
    return (reference.seed, reference.steps) == (run.seed, run.steps)


def flops_of_job(job: Job) -> float:
    """Return the FLOPs of a finished run."""
    result = job.result()
    assert result is not None and result.flops is not None, job.title
    return result.flops


def steps_with_flops(job: Job, flops: float) -> int:
    """Return the steps after which a run has used these FLOPs, with k experts per token beyond its own steps.

    Baseline routers with a varying number go on with as many as in the decay.
    """
    figures = read_figures(job.folder)
    experts = figures.experts_per_token(np.array([job.run.decay_start, job.run.steps]))[-1]
    is_counted = figures.target_sparsity is None and math.isfinite(experts)
    sequence = flops_per_sequence(argparse.Namespace(**figures.args), experts if is_counted else None)
    step = figures.batches(np.array([job.run.steps]))[0] * sequence
    return rounded(job.run.steps + (flops - flops_of_job(job)) / step)


def make_lines(args: argparse.Namespace, rows: Sequence[Row], tuned: Tuned, experts: int) -> list[Line]:
    """Return the lines of the table of one number of experts: one for each length and arm.

    The run of an arm with the FLOPs of ReMoE's run is found by its FLOPs.
    """
    results = {run: result for run, result in rows if result is not None and result.loss is not None}
    lines: dict[tuple[str, str], Line] = {}
    of_any_length: dict[Run, list[Run]] = {}
    for run in results:
        of_any_length.setdefault(replace(run, steps=0), []).append(run)
    for run in planned_runs(argparse.Namespace(**vars(args) | {"experts": [experts]}), tuned):
        if run not in results:
            continue
        titles, reference = (f"{run.steps}", run.arm), (f"{run.steps}", args.reference)
        line = lines.setdefault(titles, Line(titles, {}, reference=reference if reference != titles else None))
        line.seeds[run.seed] = vars(results[run])
        rate, warmup = tuned.get((experts, REFERENCE), (1.0, 0))
        remoe = replace(base_run(args), experts=experts, seed=run.seed, steps=run.steps, rate=rate, warmup=warmup)
        flops = results[remoe].flops if remoe in results else None
        if flops is None:
            continue
        for other in of_any_length[replace(run, steps=0)]:
            used = results[other].flops
            if used is not None and abs(used - flops) <= STEP * used / other.steps:
                line.matched[run.seed] = vars(results[other])
    if not any(line.matched for titles, line in lines.items() if titles[1] != REFERENCE):
        for line in lines.values():
            line.matched = {}
    return sorted(lines.values(), key=lambda line: (int(line.titles[0]), args.arms.index(line.titles[1])))


def tuning_lines(args: argparse.Namespace, rows: Sequence[Row], experts: int) -> Iterator[str]:
    """Yield a line for each arm that was tuned with this number of experts."""
    for (tuned_experts, arm), losses in read_tuning(args, rows).items():
        if tuned_experts in (0, experts):
            cells = (f"{rate:g} and {warmup}: {loss:.4f}" for (rate, warmup), loss in sorted(losses.items()))
            yield f"- {arm} tuned, loss by factor on the learning rate and warm-up: {', '.join(cells)}"


def make_panel(lines: Sequence[Line], experts: int) -> Panel:
    """Return a panel of the gaps at equal FLOPs, or at equal steps if there are no others, over the length."""
    differences = gaps(lines)
    kinds = {kind for _, kind in differences}
    kind = EQUAL_FLOPS if EQUAL_FLOPS in kinds else EQUAL_STEPS
    drawn: dict[tuple[str, str], dict[float, list[float]]] = {}
    for (titles, kind_of_gap), values in differences.items():
        if kind_of_gap == kind:
            drawn.setdefault((titles[1], ""), {})[float(titles[0])] = values
    ticks = {float(line.titles[0]): line.titles[0] for line in lines}
    return Panel(f"E = {experts}, {kind}", "steps of ReMoE", drawn, ticks, is_log=True)


def compare(console: Console, args: argparse.Namespace) -> int:
    """Train what is missing, and show the results; return the exit code."""
    folder = args.output_dir / args.corpus

    def show(rows: Sequence[Row]) -> None:
        tuned, text, panels = choose_rates(args, rows), [], []
        for experts in args.experts:
            if lines := make_lines(args, rows, tuned, experts):
                text += ["", f"E = {experts}, {args.size}, {args.corpus}:", "", *tuning_lines(args, rows, experts), ""]
                text += markdown(["steps", "arm"], lines, args.margin)
                panels.append(make_panel(lines, experts))
        label = f"loss minus that of {ARMS[args.reference].title}"
        write_page(console, folder, rows, text, panels, label, args.margin)

    if args.collect or args.results:
        show(read_rows(args, folder))
        return 0
    check_flags(args.flags, planned_runs(args, {}) or [base_run(args)])
    grid = Grid(folder, args.flags, prepare_text(args, console))

    def rounds() -> Iterator[list[Job]]:
        if tuning := tuning_runs(args):
            yield [make_job(run, grid) for run in tuning]
        tuned = choose_rates(args, read_folder(folder))
        for (experts, arm), (rate, warmup) in tuned.items() if args.is_tuned else ():
            say(console, f"E = {experts}, {arm}: learning rate x {rate:g}, warm-up {warmup}")
        jobs = [make_job(run, grid) for run in planned_runs(args, tuned)]
        yield jobs
        yield [make_job(run, grid) for run in runs_of_equal_flops(jobs)]

    return train_rounds(args, console, grid, rounds(), "comparison", lambda: show(read_folder(folder)))


def main(arguments: Sequence[str]) -> int:
    """Compare and return the exit code."""
    args = parse_arguments(arguments)
    return run_tool("compare", lambda: compare(Console(), args), "stopped. The same command goes on from here")
