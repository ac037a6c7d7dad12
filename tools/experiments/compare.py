"""Compare ReMoE with other routings, by length, at equal steps and at equal FLOPs, each at its best learning rate.

remoe compare --experts 8 --arms moe --train-iters 400 1200 --seeds 1 2 3
remoe compare                                                        # everything: days
remoe compare [the same options] --collect                           # tables and picture so far

The learning rate is constant and falls in the last fifth of each run. A longer run continues a shorter one from the
step at which its rate began to fall, unless it reads the text more than once. At each length, an arm that used fewer
FLOPs than the --equal-flops arm gets a longer run with as many FLOPs, within 1 % or 5 steps. First, the rate and the
warm-up of each arm are tuned for each number of experts: by the loss on a split of the training text, with a different
seed, and with equally many runs for each arm. Run the same command again to continue after an interruption. Finished
runs keep a checkpoint of the step at which the rate began to fall.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ..console.errors import ToolError
from ..console.flags import above_zero, whole_number
from ..recipes import tiny
from ..text.corpora import dataset
from .arms import ARMS
from .grids import grid_parser, parse_words, run_grid, write_page
from .pictures import draw_final_losses
from .results import Results, Row, finished, read_folder
from .run import STEP, Run, rounded
from .tables import Line, markdown

REFERENCE, NONE = "remoe", "none"
USUAL = """dense moe moe-lossfree moe-hash moe-expert-threshold moe-topp moe-normalized remoe remoe-capped
    remoe-normalized remoe-deco""".split()
TUNING_SEED = 1233
LEAST = 20  # smallest number of steps
EQUAL = 0.01  # a smaller relative difference of FLOPs counts as none
Choice = tuple[float, int]  # factor on the learning rate, and warm-up steps
Tuned = Mapping[tuple[int, str], Choice]  # by experts and arm


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; words after -- become `flags`."""
    parser = grid_parser("compare", __doc__, range(1, 9))
    parser.set_defaults(tokens=dataset.SUBWORDS)
    add, number, default = parser.add_argument, whole_number(1), "(default: %(default)s)"
    text = f"routings to compare, of {', '.join(ARMS)} (default: {' '.join(USUAL)})"
    add("--arms", nargs="+", choices=ARMS, default=USUAL, metavar="ARM", help=text)
    text = "measure gaps from this arm (default: that of --equal-flops)"
    add("--reference", choices=ARMS, metavar="ARM", help=text)
    text = f"also train the other arms to the FLOPs of this arm, or {NONE}"
    add("--equal-flops", choices=(*ARMS, NONE), default=REFERENCE, metavar="ARM", help=f"{text} {default}")
    text = "experts per layer (default: 8 32 128)"
    add("--experts", nargs="+", type=whole_number(2), default=[8, 32, 128], metavar="E", help=text)
    add("--granularity", type=number, default=1, metavar="G", help=f"split each expert into G {default}")
    add("--topk", type=number, default=1, metavar="K", help=f"experts per token, before granularity {default}")
    text = "; ".join(
        f"{name}: {size.layers} layers of {size.hidden}, batch {size.batch}" for name, size in tiny.SIZES.items()
    )
    add("--size", choices=tiny.SIZES, default=tiny.QUICKSTART, help=f"size of the tiny models, {text} {default}")
    text = "lengths in optimizer steps (default: 400 1200 3600 12000)"
    add("--train-iters", nargs="+", dest="steps", type=number, default=[400, 1200, 3600, 12000], metavar="N", help=text)
    text = "factors on the learning rate to tune over (default: 0.25 0.5 1 2)"
    add("--lr-factors", nargs="+", type=above_zero, default=[0.25, 0.5, 1.0, 2.0], metavar="X", help=text)
    text = "learning-rate warm-up steps to tune over; not shorter than the dense start, about 100 steps (default: 100)"
    add("--warmups", nargs="+", type=number, default=[100], metavar="N", help=text)
    add("--tuning-iters", type=number, default=1200, metavar="N", help=f"length of a tuning run {default}")
    args = parse_words(parser, words)
    args.output_dir /= args.corpus
    args.reference = args.reference or (REFERENCE if args.equal_flops == NONE else args.equal_flops)
    args.arms = [arm for arm in ARMS if arm in (*args.arms, args.reference, args.equal_flops)]
    args.is_tuned = len(args.lr_factors) * len(args.warmups) > 1
    for flag, values in (("--train-iters", args.steps), ("--tuning-iters", [args.tuning_iters] * args.is_tuned)):
        for steps in values:
            if steps % STEP or steps < LEAST or Run(REFERENCE, steps=steps).decay_start < max(args.warmups):
                remedy = f"Give a multiple of {STEP} of at least {LEAST}, with --warmups in the first four fifths."
                parser.error(f"{flag} {steps}: {remedy}")
    return args


def base_run(args: argparse.Namespace, experts: int) -> Run:
    """Return a run with the fields that all runs with this number of experts share."""
    return Run(REFERENCE, size=args.size, experts=experts, granularity=args.granularity, topk=args.topk,
               tokens=args.tokens, is_wsd=True)  # fmt: skip


def tuning_runs(args: argparse.Namespace) -> list[Run]:
    """Return the runs that tune each arm for each number of experts; none if there is only one choice."""
    runs = (
        replace(base_run(args, experts), arm=arm, seed=TUNING_SEED, steps=args.tuning_iters, rate=rate, warmup=warmup,
                is_tuning=True)
        for experts in args.experts
        for arm in args.arms
        for rate in args.lr_factors
        for warmup in args.warmups
    )  # fmt: skip
    return [*dict.fromkeys(runs)] if args.is_tuned else []


def read_tuning(args: argparse.Namespace, results: Results) -> dict[tuple[int, str], dict[Choice, float]]:
    """Return experts and arm → factor on the rate and warm-up → loss."""
    losses: dict[tuple[int, str], dict[Choice, float]] = {}
    for run in tuning_runs(args):
        if run in results:
            losses.setdefault((run.experts, run.arm), {})[run.rate, run.warmup or 0] = results[run].loss or 0.0
    return losses


def choose_rates(args: argparse.Namespace, results: Results) -> dict[tuple[int, str], Choice]:
    """Return experts and arm → the factor and the warm-up with the lowest loss, or the only ones given."""
    if not args.is_tuned:
        only = args.lr_factors[0], args.warmups[0]
        return {(experts, arm): only for experts in (*args.experts, 0) for arm in args.arms}
    return {key: min(losses, key=losses.__getitem__) for key, losses in read_tuning(args, results).items()}


def pair_runs(args: argparse.Namespace, tuned: Tuned, experts: int) -> Iterator[tuple[Run, Run]]:
    """Yield the tuned runs with `experts` experts, each with the run of the same seed and length that sets its FLOPs.

    For each seed, runs of the arm that sets FLOPs come first. With `--equal-flops none` each run is paired with itself.
    """

    def tuned_run(arm: str, seed: int, steps: int) -> Run | None:
        run = replace(base_run(args, experts), arm=arm, seed=seed, steps=steps)
        choice = tuned.get((run.experts, arm))
        return replace(run, rate=choice[0], warmup=choice[1]) if choice else None

    for seed in args.seeds:
        for arm in sorted(args.arms, key=lambda arm: arm != args.equal_flops):
            for steps in args.steps:
                run = tuned_run(arm, seed, steps)
                reference = run if args.equal_flops == NONE else tuned_run(args.equal_flops, seed, steps)
                if run is not None and reference is not None:
                    yield run, reference


def run_of_equal_flops(run: Run, reference: Run, results: Results) -> Run | None:
    """Return the longer run that uses the FLOPs of `reference`; the same run if it is the reference.

    While the returned run has no result, its steps are an estimate, which assumes that further steps compute as many
    experts per token as the last ones. If a run misses by more than `EQUAL`, a better estimate follows if there is one.

    Returns:
        The run; None if `run` or `reference` has no result, or if it would not be longer.
    """
    if run == reference:
        return run
    wanted, matched, tried = results.get(reference), run, set[Run]()
    while (result := results.get(matched)) is not None:
        if wanted is None or wanted.flops is None or result.flops is None or not result.step_flops:
            return None
        if tried and abs(wanted.flops - result.flops) <= EQUAL * wanted.flops:
            return matched
        steps = rounded(matched.steps + (wanted.flops - result.flops) / result.step_flops)
        if steps <= run.steps:
            return None
        tried.add(matched)
        if (better := replace(run, steps=steps)) in tried:
            return matched  # no multiple of STEP is nearer
        matched = better
    return matched if tried else None


def make_lines(args: argparse.Namespace, results: Results, experts: int) -> list[Line]:
    """Return the table's lines for a number of experts: one line for each length and arm."""
    lines: dict[tuple[str, str], Line] = {}
    for run, matching in pair_runs(args, choose_rates(args, results), experts):
        if run in results:
            titles, reference = (f"{run.steps}", run.arm), (f"{run.steps}", args.reference)
            line = lines.setdefault(titles, Line(titles, {}, reference=reference))
            line.seeds[run.seed] = vars(results[run])
            matched = None if args.equal_flops == NONE else run_of_equal_flops(run, matching, results)
            if matched is not None and matched in results:
                line.matched[run.seed] = vars(results[matched])
    for (steps, _), line in lines.items():  # seeds that need no longer run, if others do
        seeds = lines[steps, args.equal_flops].seeds if line.matched else {}
        for seed in seeds.keys() & line.seeds.keys() - line.matched.keys():
            wanted, flops = seeds[seed]["flops"], line.seeds[seed]["flops"]
            if wanted and flops and abs(wanted - flops) <= EQUAL * wanted:
                line.matched[seed] = line.seeds[seed]
    return sorted(lines.values(), key=lambda line: (int(line.titles[0]), args.arms.index(line.titles[1])))


def tuning_lines(args: argparse.Namespace, results: Results, experts: int) -> Iterator[str]:
    """Yield a line for each arm that was tuned with this number of experts."""
    for (tuned_experts, arm), losses in read_tuning(args, results).items():
        if tuned_experts in (0, experts):
            cells = (f"{rate:g} and {warmup}: {loss:.4f}" for (rate, warmup), loss in sorted(losses.items()))
            yield f"- {arm} tuned, loss by factor on the learning rate and warm-up: {', '.join(cells)}"


def show(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Write the tables and the picture of the finished runs. Raise ToolError if there are none to collect."""
    results, text, panels = finished(rows), list[str](), dict[str, dict[str, dict[int, float]]]()
    for experts in args.experts:
        if lines := make_lines(args, results, experts):
            text += ["", f"E = {experts}, {args.size}, {args.corpus}:", "", *tuning_lines(args, results, experts), ""]
            text += markdown(["steps", "arm"], lines)
            for line in lines:
                steps, arm = line.titles
                losses = {seed: values["loss"] for seed, values in line.seeds.items()}
                panels.setdefault(f"E = {experts}, {steps} steps", {})[arm] = losses
        arms = {run.arm for run in results if run.experts in (0, experts) and not run.is_tuning}
        if missing := arms.intersection(args.arms) - {line.titles[1] for line in lines}:
            text += ["", f"E = {experts}: the runs of {', '.join(sorted(missing))} have different flags; not shown."]
    if (args.results or args.collect) and not panels:
        paths = " ".join(map(str, args.results or [args.output_dir]))
        raise ToolError(f"{paths}: no run has these flags. Give those that the runs had.")
    picture = partial(draw_final_losses, panels=panels, base=args.reference)
    write_page(args, rows, text, picture if panels else None)


def main(arguments: Sequence[str]) -> int:
    """Compare and return the exit code."""
    args = parse_arguments(arguments)

    def rounds() -> Iterator[list[Run]]:
        if tuning := tuning_runs(args):
            yield tuning
        tuned = choose_rates(args, finished(read_folder(args.output_dir)))
        pairs = [pair for experts in args.experts for pair in pair_runs(args, tuned, experts)]
        runs = [*dict.fromkeys(run for run, _ in pairs)]
        tried = set[Run]()  # a run that ends with NaN has no result
        while runs:
            yield runs
            results = finished(read_folder(args.output_dir))
            tried.update(runs)
            matched = (run_of_equal_flops(*pair, results) for pair in pairs)
            runs = [*dict.fromkeys(run for run in matched if run is not None and run not in tried)]

    return run_grid("compare", args, rounds, lambda rows: show(args, rows))
