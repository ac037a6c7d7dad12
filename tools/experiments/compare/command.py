"""Compare ReMoE with other ways of training, by length, at equal steps and at equal FLOPs.

remoe compare --experts 8 --arms moe --steps 400 1200 --seeds 1 2 3   # about an hour on 2 cores
remoe compare                                                        # everything: days
remoe compare --collect --picture gap.png                            # tables and picture so far

Each arm and seed trains one trunk with a constant learning rate. At each length a decay over the last fifth branches
off and is evaluated on all held-out text. Every other arm has one more decay for each length, where it has used exactly
the FLOPs of ReMoE at that length. First the learning rate of ReMoE, top-k and dense is tuned for each number of
experts, on another part of the text and with another seed, in as many trainings each. The same command continues after
a stop.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ...console.display import Display
from ...console.errors import ToolError
from ...console.files import lock
from ...console.flags import above_zero, number_of_cores, tool_parser, whole_number
from ...console.places import ROOT
from ...runs.running import run_tool
from ...text.corpora.dataset import CORPORA, MIXED, make_text
from ..sweep.plan import BASE_SIZE
from ..sweep.tiny import MODELS
from . import picture
from .experiment import Experiment, rates_of
from .plan import ARMS, LEAST, LOG_INTERVAL, REFERENCE, STARTS, TUNING_SEED, Training, trunk_steps
from .results import Results, markdown
from .significance import MARGIN
from .trunks import Runner

STEPS = (400, 1200, 3600, 12000)
EXPERTS = (8, 32, 128)
FACTORS = (0.25, 0.5, 1.0, 2.0)
SEEDS = tuple(range(1, 9))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = tool_parser("compare", __doc__)
    add, number, default = parser.add_argument, whole_number(1), "(default: %(default)s)"
    add("--corpus", choices=CORPORA, default=MIXED, help=f"text to train on {default}")
    text = f"of {', '.join(ARMS)} (default: the first {len(STARTS)})"
    add("--arms", nargs="+", choices=ARMS, default=[*STARTS], metavar="ARM", help=text)
    text = f"measure gaps from this arm; equal FLOPs are always those of remoe {default}"
    add("--reference", choices=ARMS, default=REFERENCE, metavar="ARM", help=text)
    add("--experts", nargs="+", type=number, default=[*EXPERTS], metavar="E", help=f"of a layer {default}")
    sizes = "; ".join(f"{name}: {model.layers} layers of {model.hidden}" for name, model in MODELS.items())
    add("--size", choices=MODELS, default=BASE_SIZE, help=f"of the tiny model, {sizes} {default}")
    add("--steps", nargs="+", type=number, default=[*STEPS], metavar="N", help=f"lengths of the trainings {default}")
    add("--seeds", nargs="+", type=number, default=[*SEEDS], metavar="N", help="a training each (default: 1 to 8)")
    text = "factors on the learning rate to tune over; one: no tuning"
    add("--lr-factors", nargs="+", type=above_zero, default=[*FACTORS], metavar="X", help=f"{text} {default}")
    add("--tuning-steps", type=number, default=1200, metavar="N", help=f"steps of a tuning run {default}")
    text = "learning-rate warm-up steps, longer than the dense start as in the paper"
    add("--lr-warmup-iters", type=number, default=Training.warmup, metavar="N", help=f"{text} {default}")
    text = "losses that differ by less count as equal"
    add("--margin", type=above_zero, default=MARGIN, metavar="NATS", help=f"{text} {default}")
    text = "number of parallel trainings, with one thread each (default: the number of cores)"
    add("--processes", type=number, default=number_of_cores(), metavar="N", help=text)
    add("--output-dir", type=Path, default=ROOT / "runs" / "compare", metavar="FOLDER", help="default: runs/compare")
    add("--collect", action="store_true", help="train nothing: show the output folder's results so far")
    add("--results", type=Path, metavar="FILE.json", help="train nothing: show this file, which --points wrote")
    add("--points", type=Path, metavar="FILE.json", help="also write all points to a small file")
    add("--picture", type=Path, metavar="FILE.png", help="also draw the gaps at equal FLOPs")
    args = parser.parse_args(arguments)
    args.arms = [arm for arm in ARMS if arm in (*args.arms, args.reference, REFERENCE)]
    for name in ("experts", "steps", "seeds", "lr_factors"):
        setattr(args, name, [*dict.fromkeys(getattr(args, name))])
    tuning = [args.tuning_steps] if len(args.lr_factors) > 1 else []
    for flag, values in (("--steps", args.steps), ("--tuning-steps", tuning)):
        if wrong := [value for value in values if value % LOG_INTERVAL or value < LEAST]:
            parser.error(f"{flag} {wrong[0]}: give a multiple of {LOG_INTERVAL} of at least {LEAST}.")
        if wrong := [value for value in values if trunk_steps(value) < args.lr_warmup_iters]:
            parser.error(f"{flag} {wrong[0]}: the last fifth starts before --lr-warmup-iters {args.lr_warmup_iters}.")
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds {TUNING_SEED}: reserved for tuning. Give another one.")
    return args


def show(args: argparse.Namespace, results: Results, display: Display) -> bool:
    """Print the tables, and write the picture and the points if asked for; return whether there is anything to show."""
    rates = rates_of(args, results)
    like = Training(0, REFERENCE, 0, warmup=args.lr_warmup_iters, size=args.size)
    found = {experts: results.by_arm(replace(like, experts=experts), args.seeds, rates) for experts in args.experts}
    found = {experts: {arm: of[arm] for arm in args.arms} for experts, of in found.items() if any(of.values())}
    for experts, points in found.items():
        lines = [*_tuning_lines(args, results, experts), *markdown(points, args.margin, args.reference)]
        size = "" if args.size == BASE_SIZE else f" {MODELS[args.size].layers} layers of {MODELS[args.size].hidden},"
        display.say("\n".join(["", f"E = {experts},{size} {args.corpus}:", "", *lines]))
    if args.picture and found:
        picture.draw(args.picture, found, args.margin, args.reference)
    if args.points:
        results.write_points(args.points)
    return bool(found)


def _tuning_lines(args: argparse.Namespace, results: Results, experts: int) -> Iterator[str]:
    """Yield a line for each routing that was tuned, and an empty one."""
    if len(args.lr_factors) == 1:
        return
    tunings = results.tunings(args.tuning_steps, args.lr_warmup_iters, args.size)
    routings = dict.fromkeys(ARMS[arm].routing for arm in args.arms)
    for routing in (routing for routing in routings if (experts, routing) in tunings):
        losses = (f"{factor:g}: {loss:.4f}" for factor, loss in sorted(tunings[experts, routing].items()))
        yield f"- {routing} tuned, loss by factor on the learning rate: {', '.join(losses)}"
    yield ""


def compare(args: argparse.Namespace, display: Display) -> None:
    """Train what is missing, and show the results.

    Raises:
        ToolError: something failed; the message names the remedy.
    """
    output = args.output_dir.expanduser().resolve() / args.corpus
    for path in filter(None, (args.points, args.picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.collect or args.results:
        path = args.results or output / "results.json"
        if not show(args, Results(path), display):
            raise ToolError(f"{path}: no results with these --experts, --arms and --seeds.")
        return
    with lock(output, "comparison") as held:
        results = Results(output / "results.json")
        try:
            text = make_text(output, args.corpus, display.say)
            manifest = json.loads((text / "manifest.json").read_text(encoding="utf-8"))
            Experiment(args, results, Runner(output / "trainings", text, manifest, held), display).run()
        finally:
            show(args, results, display)


def main(arguments: Sequence[str]) -> int:
    """Compare and return the exit code: 0, 1 after an error, 130 after a stop."""
    args = parse_arguments(arguments)
    return run_tool("compare", lambda: compare(args, Display()), "stopped. The same command goes on from here")
