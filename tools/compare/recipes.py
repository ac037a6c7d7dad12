"""What is compared: routings as they are, and three of them tuned first, setting by setting."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..common.flags import Settings
from ..sweep.plan import AXES, PROTOCOLS, SIZE, WHOLE, Run
from ..sweep.run_log import Outcome

REFERENCE = "remoe"
QUICKSTARTS = ("dense", "moe", REFERENCE)
TUNED: Mapping[str, tuple[str, ...]] = {
    "tuned-dense": ("dense",),
    "tuned-moe": ("moe", "moe-sigmoid", "moe-lossfree", "moe-post"),
    "tuned-remoe": (REFERENCE,),
}
SETTINGS = ("aux-coeff", "gate", "lr")  # of `AXES`, of those that a routing has
GRANULARITIES = (1, 2)
OTHERS = ("moe-sigmoid", "moe-unbalanced", "moe-warmup", "moe-hash", "moe-random", "moe-expertchoice")
# In the order in which they are trained: what decides first.
ROWS = (*QUICKSTARTS, "moe-lossfree", "tuned-moe", "tuned-dense", "tuned-remoe", *OTHERS, "remoe-unbalanced")
TITLES = {"dense": "dense", "moe": "top-k, softmax", REFERENCE: "ReMoE"}


@dataclass(frozen=True)
class Recipe:
    """A routing of the sweep, with flags for Megatron behind its own."""

    kind: str
    granularity: int = WHOLE
    flags: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """For scripts/sweep.sh: one run."""
        return f"--figures granularity --granularities {self.granularity} --routings {self.kind}".split()

    def __str__(self) -> str:
        fine = [f"k = G = {self.granularity}"] if self.granularity > WHOLE else []
        return ", ".join([title(self.kind), *fine, *([" ".join(self.flags)] if self.flags else [])])


def title(row: str) -> str:
    """In words, for a table."""
    if row in TUNED:
        return f"{TITLES[row.removeprefix('tuned-')].split(',')[0]}, tuned"
    if row in TITLES:
        return TITLES[row]
    return f"{TITLES[row.partition('-')[0]].split(',')[0]}, {PROTOCOLS[row].title}"


Found = Mapping[Run, Outcome]
Train = Callable[[Sequence[str], Sequence[str]], Found]


def tune(kinds: Sequence[str], train: Train, given: Settings) -> Recipe:
    """The routing, granularity and settings with the lowest validation loss.

    First each routing at each granularity as it is, then the best of them along each setting that it has, then what was
    best of each setting together.

    Args:
        kinds: of `sweep.plan.KINDS`.
        train: takes options for scripts/sweep.sh and flags for Megatron behind them; returns the outcomes by run.
        given: the flags of all runs, whose learning rate is multiplied.
    """
    found: dict[Run, Outcome] = {}
    if kinds != ("dense",):
        granularities = map(str, GRANULARITIES)
        found |= train(["--figures", "granularity", "--granularities", *granularities, "--routings", *kinds], ())
    first = min(found, key=lambda run: loss_of(found[run])) if found else Run(SIZE, "dense")
    settings = [name for name in SETTINGS if first.kind in AXES[name].kinds]
    at = Recipe(first.kind, first.granularity or WHOLE)
    found |= train(["--figures", *settings, *at.options()[2:]], ())
    losses: dict[tuple[str, ...], float] = {}
    moved: list[str] = []
    for name in settings:
        along = {
            run: loss_of(outcome)
            for run, outcome in found.items()
            if replace(run, axis="", value=0.0) == first and run.axis in ("", name)
        }
        losses |= {flags_behind(run, first, given): loss for run, loss in along.items()}
        moved += flags_behind(min(along, key=along.__getitem__), first, given)
    together = tuple(moved)
    if together not in losses:
        (outcome,) = train(at.options(), together).values()
        losses[together] = loss_of(outcome)
    return replace(at, flags=min(losses, key=losses.__getitem__))


def flags_behind(run: Run, first: Run, given: Settings) -> tuple[str, ...]:
    """The flags that a run has more than `first`."""
    return tuple(run.flags(given)[len(first.flags(given)) :])


def loss_of(outcome: Outcome) -> float:
    """Nats per token on the text that settings are chosen by; infinite where the training came to none."""
    loss = outcome.validation_loss
    return math.inf if loss is None or math.isnan(loss) else loss
