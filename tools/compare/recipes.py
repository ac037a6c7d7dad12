"""Define the rows of a comparison: routings, three of them tuned one setting at a time, and runs of the figures."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..common.flags import Settings
from ..sweep.plan import AXES, BASE_SIZE, FEW_EXPERTS, KINDS, MATCHED, PROTOCOLS, WHOLE, Run, partner
from ..sweep.run_log import Outcome
from ..sweep.tiny import MODELS

REFERENCE = "remoe"
QUICKSTARTS = ("dense", "moe", REFERENCE)
TUNED: Mapping[str, tuple[str, ...]] = {
    "tuned-dense": ("dense",),
    "tuned-moe": ("moe", "moe-sigmoid", "moe-lossfree", "moe-post"),
    "tuned-remoe": (REFERENCE,),
}
SETTINGS = ("aux-coeff", "gate", "lr")  # keys of `AXES`; a routing is tuned along those that it has
GRANULARITIES = (1, 2)
BEYOND = 2  # how many values to try beyond those of the sweep
OTHERS = ("moe-sigmoid", "moe-unbalanced", "moe-warmup", "moe-hash", "moe-random", "moe-expertchoice")
# In the order of training: the decisive ones first.
ROWS = (*QUICKSTARTS, "moe-lossfree", "tuned-moe", "tuned-dense", "tuned-remoe", *OTHERS, "remoe-unbalanced")
_MODEL, _PREFIX = "llama_", f"llama_{BASE_SIZE}_"
TITLES = {"dense": "dense", "moe": "top-k, softmax", REFERENCE: "ReMoE"}


@dataclass(frozen=True)
class Recipe:
    """A run of the sweep, with additional flags for Megatron."""

    run: Run
    flags: tuple[str, ...] = ()

    def options(self, axis: str = "") -> list[str]:
        """Return the options of scripts/sweep.sh for this run, or for all runs along a setting."""
        run, kinds = self.run, [self.run.kind]
        options = ["--granularities", str(run.granularity or WHOLE)]
        if run.size != BASE_SIZE:
            options = ["--figures", "size", "--sizes", run.size]
        elif axis or run.axis:
            options += ["--figures", axis or run.axis]
            options += [] if axis else [f"--{run.axis}s", f"{run.value:g}"]
        elif run.expansion > 1 or run.experts not in (None, FEW_EXPERTS):
            options += ["--figures", "experts", "--experts", str(run.experts or FEW_EXPERTS)]
        else:
            options += ["--figures", "granularity"]
        if run.kind == MATCHED:
            kinds.insert(0, partner(run).kind)
        return [*options, "--routings", *kinds]

    def __str__(self) -> str:
        fine = [f"k = G = {self.run.granularity}"] if (self.run.granularity or WHOLE) > WHOLE else []
        return ", ".join([title(self.run.kind), *fine, *([" ".join(self.flags)] if self.flags else [])])


def recipe_of(row: str) -> Recipe:
    """Return the recipe of a row that is not tuned.

    Raises:
        ValueError: there is no such row.
    """
    routing, _, protocol = row.partition("-")
    if row == "dense":
        return Recipe(Run(BASE_SIZE, row))
    if row in KINDS:
        return Recipe(Run(BASE_SIZE, routing, FEW_EXPERTS, WHOLE, protocol=protocol))
    run = Run.from_name(_PREFIX + row) or Run.from_name(_MODEL + row)
    if run is None:
        raise ValueError(f"{row}: no such row")
    return Recipe(run)


def is_routing(row: str) -> bool:
    """Return whether the row changes only the routing, or the settings it was tuned to."""
    return row in TUNED or row in KINDS


def row_of(run: Run) -> str:
    """Return the row of a figure's run: its routing if nothing else differs, else the run's name."""
    return run.kind if run == recipe_of(run.kind).run else run.name.removeprefix(_PREFIX).removeprefix(_MODEL)


def reference_of(row: str) -> str:
    """Return the row of the ReMoE to compare with: equally many experts of equal size, not tuned."""
    if is_routing(row):
        return REFERENCE
    run = recipe_of(row).run
    run = replace(run, experts=FEW_EXPERTS, granularity=WHOLE, expansion=1) if run.routing == "dense" else run
    return row_of(replace(partner(run), axis="", value=0.0))


def title(row: str) -> str:
    """Return the row's name in a table."""
    if row in TUNED:
        return f"{TITLES[row.removeprefix('tuned-')].split(',')[0]}, tuned"
    if row in TITLES:
        return TITLES[row]
    if row in KINDS:
        return f"{TITLES[row.partition('-')[0]].split(',')[0]}, {PROTOCOLS[row].title}"
    run = recipe_of(row).run
    told = [f"dense x {run.expansion}"] if run.expansion > 1 else [title(run.kind)]
    told += [f"{MODELS[run.size].layers} layers of {MODELS[run.size].hidden}"] if run.size != BASE_SIZE else []
    told += [f"E = {run.experts}"] if run.experts not in (None, FEW_EXPERTS) else []
    told += [f"G = {run.granularity}"] if (run.granularity or WHOLE) > WHOLE else []
    told += [f"{AXES[run.axis].label} = {run.value:g}"] if run.axis else []
    return ", ".join(told)


Found = Mapping[Run, Outcome]
Train = Callable[[Sequence[str], Sequence[str]], Found]


def tune(kinds: Sequence[str], train: Train, given: Settings) -> Recipe:
    """Return the routing, granularity and settings with the lowest validation loss.

    Train each routing at each granularity, then the best one along each of its settings, then with the best values of
    all settings. Go beyond the sweep's values of a setting while the best one is at their end.

    Args:
        kinds: routings, from `sweep.plan.KINDS`.
        train: takes options for scripts/sweep.sh and flags for Megatron; returns all outcomes so far by run.
        given: the flags of all runs; the tuned learning rate is a multiple of theirs.
    """
    granularities = map(str, GRANULARITIES)
    found = train(["--figures", "granularity", "--granularities", *granularities, "--routings", *kinds], ())
    first = min((run for run in found if not run.axis), key=lambda run: loss_of(found[run]))
    at = Recipe(first)
    losses: dict[tuple[str, ...], float] = {}
    together: tuple[str, ...] = ()
    for name in SETTINGS:
        if first.kind in AXES[name].kinds:
            along = _along(name, first, at, train)
            losses |= {added_flags(run, first, given): loss for run, loss in along.items()}
            together += added_flags(min(along, key=along.__getitem__), first, given)
    if together not in losses:
        losses[together] = loss_of(train(at.options(), together)[first])
    return replace(at, flags=min(losses, key=losses.__getitem__))


def _along(name: str, first: Run, at: Recipe, train: Train) -> dict[Run, float]:
    """Return the losses along a setting; extend it up to `BEYOND` times while the best value is at an end."""
    values = AXES[name].values
    for _ in range(1 + BEYOND):
        options = [*at.options(name), f"--{name}s", *(f"{value:g}" for value in values)]
        found = train(options, ())
        along = {run: loss_of(found[run]) for run in (first.at(name, value) for value in values)}
        place = min(range(len(values)), key=lambda place: along[first.at(name, values[place])])
        if place == 0:
            values = (_rounded(values[0] ** 2 / values[1]), *values)
        elif place == len(values) - 1:
            values = (*values, _rounded(values[-1] ** 2 / values[-2]))
        else:
            break
    return along


def _rounded(value: float) -> float:
    """Return the value with the digits that names and flags have."""
    return float(f"{value:g}")


def added_flags(run: Run, first: Run, given: Settings) -> tuple[str, ...]:
    """Return the flags that a run adds to those of `first`."""
    return tuple(run.flags(given)[len(first.flags(given)) :])


def loss_of(outcome: Outcome) -> float:
    """Return nats per token on the tuning text; infinite if the training has no such loss."""
    loss = outcome.validation_loss
    return math.inf if loss is None or math.isnan(loss) else loss
