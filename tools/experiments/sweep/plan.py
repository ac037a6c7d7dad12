"""List the runs of each figure and their commands."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...console.flags import Settings, parse, without
from ...console.places import ROOT
from ...recipes.launch import run_name
from ...recipes.models import PAPER, ROUTINGS, Routing, Training

SIZES = tuple(PAPER)
EXPERTS = (4, 8, 16, 32, 64, 128)
GRANULARITIES = (1, 2, 4, 8, 16, 32, 64)
FIGURES = ("size", "experts", "granularity")
COMPARED = "routing"  # the figure over routings, at the base of the others
# The base: each figure varies one thing and keeps the others.
BASE_SIZE, FEW_EXPERTS, WHOLE = "182m", 8, 1
VALUES: Mapping[str, Sequence[Any]] = {"size": SIZES, "experts": EXPERTS, "granularity": GRANULARITIES}
RATES: Mapping[str, tuple[str]] = {"--lr": (Training().lr,), "--min-lr": (Training().min_lr,)}
WIDE = 8  # the paper's Dense x 8, as wide as 8 experts


@dataclass(frozen=True)
class Protocol:
    """A variant of a launch script's routing, by `flags` for Megatron that override the script's."""

    title: str
    marker: str
    flags: str = ""


UNBALANCED = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0"
LOSS_FREE = f"--moe-router-score-function sigmoid --moe-router-enable-expert-bias {UNBALANCED}"
QUANTILE = "--moe-router-load-balancing-type quantile_balancing --moe-aux-loss-coeff 0"
POST_SOFTMAX = "moe-post"
# By the name of the routing and a word.
PROTOCOLS: Mapping[str, Protocol] = {
    "moe-warmup": Protocol("near-dense warm-up", "^", "--moe-warmup-topk {warmup_topk} --moe-warmup-steps 100"),
    "moe-unbalanced": Protocol("no load balancing", "D", UNBALANCED),
    POST_SOFTMAX: Protocol("softmax over the k", "P", "--no-moe-router-pre-softmax"),
    "moe-sigmoid": Protocol("sigmoid", "<", "--moe-router-score-function sigmoid"),
    "moe-lossfree": Protocol("sigmoid, loss-free balance", ">", LOSS_FREE),
    "moe-hash": Protocol("hash", "h", f"--moe-baseline-router hash {UNBALANCED}"),
    "moe-random": Protocol("random", "*", f"--moe-baseline-router random {UNBALANCED}"),
    "moe-expertchoice": Protocol(
        "expert choice, sees the future", "p", f"--moe-baseline-router expert_choice {UNBALANCED}"
    ),
    "moe-topp": Protocol("top-p", "v", f"--moe-baseline-router top_p {UNBALANCED}"),
    "moe-threshold": Protocol("expert threshold", "X", f"--moe-baseline-router expert_threshold {UNBALANCED}"),
    "moe-null": Protocol("null experts", "8", "--moe-baseline-router null_experts"),
    "moe-sequence": Protocol("sequence-level top-k", "H", "--moe-baseline-router sequence_topk"),
    "moe-routingfree": Protocol("routing-free", "$F$", f"--moe-baseline-router routing_free {UNBALANCED}"),
    "moe-quantile": Protocol("quantile balancing", "$Q$", QUANTILE),
    "remoe-unbalanced": Protocol("no load balancing", "d", "--no-moe-relu-l1-reg-load-balancing"),
}
KINDS = (*ROUTINGS, *PROTOCOLS)
AUXILIARY = ("moe", "moe-warmup", POST_SOFTMAX, "moe-sigmoid")  # with an auxiliary loss
# Rivals with a varying k, and Megatron's other way to balance top-k. At k = 1 top-p always takes one expert.
RIVALS = ("moe-topp", "moe-threshold", "moe-null", "moe-sequence", "moe-routingfree", "moe-quantile")
PAIRED = 2  # granularity, and so k, of the figure over them
# Figures over routings → their titles, granularity and routings.
GROUPS: Mapping[str, tuple[str, int, tuple[str, ...]]] = {
    COMPARED: ("Routings", WHOLE, tuple(kind for kind in KINDS if kind not in RIVALS)),
    "variable-k": ("Varying k", PAIRED, ("moe", "remoe", *RIVALS)),
}


@dataclass(frozen=True)
class Axis:
    """A number that runs of some routings vary.

    base: the value without any flag.
    flags: for Megatron, with {value}, or with {lr} and {min_lr}, the launch's rates times the value.
    """

    title: str
    label: str
    base: float
    values: tuple[float, ...]
    kinds: tuple[str, ...]
    flags: str
    is_log: bool = True


AXES: Mapping[str, Axis] = {
    "l1-init": Axis("L1 coefficient", "λ₀", 1e-8, (1e-16, 1e-12, 1e-8, 1e-4, 1.0),
                    ("remoe", "remoe-unbalanced"), "--moe-relu-l1-reg-coeff-init {value}"),
    "l1-multiplier": Axis("L1 multiplier", "α", 1.2, (1.05, 1.1, 1.2, 1.3, 1.5),
                          ("remoe", "remoe-unbalanced"), "--moe-relu-l1-reg-coeff-multiplier {value}", is_log=False),
    "warmup-length": Axis("Warm-up", "near-dense steps", 100, (50, 100, 500, 1000),
                          ("moe-warmup",), "--moe-warmup-steps {value}"),
    "aux-coeff": Axis("Auxiliary loss", "coefficient", 1e-2, (1e-4, 1e-3, 1e-2, 1e-1),
                      AUXILIARY, "--moe-aux-loss-coeff {value}"),
    "gate": Axis("First gate", "factor on the gates", 1, (1, 2, 4, 8),
                 (*AUXILIARY, "moe-lossfree"), "--moe-router-topk-scaling-factor {value}"),
    "lr": Axis("Learning rate", "factor on the learning rate", 1, (0.5, 1, 2, 4),
               KINDS, "--lr {lr} --min-lr {min_lr}"),
}  # fmt: skip
_WORDS = {name.rpartition("-")[2]: name for name in AXES}  # in names of runs
_PROTOCOLS = "|".join(dict.fromkeys(kind.partition("-")[2] for kind in PROTOCOLS))
_NAME = re.compile(
    rf"llama_({'|'.join(SIZES)})_(?:dense_ffn(\d+)|(moe|remoe)_e(\d+)g(\d+)(?:_({_PROTOCOLS}))?)"
    rf"(?:_({'|'.join(_WORDS)})(\d+(?:\.\d+)?(?:e[+-]\d+)?))?"
)


@dataclass(frozen=True)
class Run:
    """One training; a dense one has no experts and no granularity.

    expansion: a dense model's FFN over 4 x hidden.
    axis, value: of `AXES`, unless it is at the base.
    protocol: of `PROTOCOLS`, without the routing.
    """

    size: str
    routing: str
    experts: int | None = None
    granularity: int | None = None
    expansion: int = 1
    axis: str = ""
    value: float = 0.0
    protocol: str = ""

    @property
    def kind(self) -> str:
        """Routing and protocol."""
        return f"{self.routing}-{self.protocol}" if self.protocol else self.routing

    @property
    def name(self) -> str:
        """The launch scripts' name, followed by protocol and axis."""
        name = run_name(self.size, Routing(self.routing, self.experts or 0, self.granularity or 0), self.expansion)
        name += f"_{self.protocol}" if self.protocol else ""
        return name + (f"_{self.axis.rpartition('-')[2]}{self.value:g}" if self.axis else "")

    def flags(self, given: Settings) -> list[str]:
        """Return the flags that the run adds to the launch script's and to those `given` for all runs."""
        lr, min_lr = (float(given.get(flag, default)[0]) * self.value for flag, default in RATES.items())
        filled = {"lr": f"{lr:g}", "min_lr": f"{min_lr:g}", "value": f"{self.value:g}"}
        filled["warmup_topk"] = str((self.experts or 0) * 6 // 8)
        flags = [PROTOCOLS[self.kind].flags] if self.kind in PROTOCOLS else []
        flags += [AXES[self.axis].flags] if self.axis else []
        if self.expansion > 1 and "--ffn-hidden-size" in given:
            flags += [f"--ffn-hidden-size {int(given['--ffn-hidden-size'][0]) * self.expansion}"]
        if self.routing == "dense" and "--hybrid-layer-pattern" in given:
            flags += [f"--hybrid-layer-pattern {given['--hybrid-layer-pattern'][0].replace('E', '-')}"]
        return " ".join(flags).format(**filled).split()

    @classmethod
    def from_name(cls, name: str) -> "Run | None":
        """Return the run with this name; None if no run has it."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        size, ffn, routing, experts, granularity, protocol, word, value = match.groups()
        if ffn:
            run = cls(size, "dense", expansion=int(ffn) // 4)
        else:
            run = cls(size, routing, int(experts), int(granularity), protocol=protocol or "")
        run = run.at(_WORDS[word], float(value)) if word else run
        return run if run.name == name else None

    def at(self, axis: str, value: float) -> "Run":
        """Return the run at another value of an axis."""
        return self if value == AXES[axis].base else replace(self, axis=axis, value=value)


@dataclass(frozen=True)
class Launch:
    """What all runs have in common; `flags` override the script's; dense runs get no --moe-... ones.

    small: flags before these that make the model tiny, by the size of the launch script.
    data: environment variables for the text, if the environment has none.
    """

    output: Path
    gpus_per_node: int
    train_iters: int
    micro_batch_size: int | None
    flags: tuple[str, ...] = ()
    small: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    def folder(self, run: Run) -> Path:
        """Return the folder of the run's files."""
        return self.output / run.name

    def arguments(self, run: Run) -> list[str]:
        """Return the launch script with its arguments."""
        return [str(ROOT / "scripts" / f"train_llama_{run.size}_{run.routing}.sh"), *self.words(run)]

    def words(self, run: Run) -> list[str]:
        """Return the launch script's arguments."""
        micro_batch = "" if self.micro_batch_size is None else str(self.micro_batch_size)  # empty: the script's own
        words = [str(self.gpus_per_node), str(self.train_iters), micro_batch]
        common = (*self.small.get(run.size, ()), *self.flags)
        flags = [*common, *run.flags(parse(common))]
        if run.experts is not None and run.granularity is not None:
            words += [str(run.experts), str(run.granularity)]
        else:
            words += [str(run.expansion)] if run.expansion > 1 else []
            # Megatron refuses some of them where there are no experts.
            flags = without(flags, lambda flag: flag.startswith("--moe-"))
        return [*words, "--", *flags] if flags else words

    def environment(self, run: Run, given: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that the run adds to the `given` environment.

        EP is lowered to divide the run's experts: one value serves a whole axis.
        """
        added = {**self.data, "OUTPUT_DIR": str(self.folder(run))}
        if run.experts is not None and run.granularity is not None and given.get("EP", "").isdecimal():
            fitting = math.gcd(int(given["EP"]), run.experts * run.granularity)
            if fitting != int(given["EP"]):
                added["EP"] = str(fitting)
        return added


def runs_of_figure(figure: str, values: Mapping[str, Sequence[Any]], kinds: Sequence[str] | None) -> list[Run]:
    """Return the runs of one figure; dense ones of the base size are reference lines unless the size varies.

    Args:
        figure: one of `FIGURES`, `AXES` and `GROUPS`.
        values: figure → the values along its axis; a given granularity also holds for all but `FIGURES`.
        kinds: the wanted `KINDS`; None for `ROUTINGS`, for all of a figure over routings, and on an axis for those of
            `ROUTINGS` that have it, or all that have it if none does.
    """
    if figure in FIGURES:
        points = [{figure: value} for value in values.get(figure, VALUES[figure])]
        kinds = ROUTINGS if kinds is None else kinds
    else:
        _, usual, fitting = GROUPS.get(figure) or ("", WHOLE, AXES[figure].kinds)
        points = [{"granularity": value} for value in values.get("granularity", (usual,))]
        plain = [kind for kind in fitting if kind in ROUTINGS and figure in AXES] or fitting
        kinds = plain if kinds is None else [kind for kind in kinds if kind in fitting]
    base = Run(BASE_SIZE, "remoe", FEW_EXPERTS, WHOLE)
    runs = []
    for point in points:
        for kind in kinds:
            routing, _, protocol = kind.partition("-")
            run = replace(base, **point, routing=routing, protocol=protocol)
            if kind == "dense":
                run = Run(run.size, "dense")
                if figure == "experts":
                    runs += [run, replace(run, expansion=WIDE)]
                    continue
            elif kind == POST_SOFTMAX and run.granularity == WHOLE:
                continue  # a softmax over k = 1 is constant
            if figure in AXES:
                runs += [run.at(figure, value) for value in values.get(figure, AXES[figure].values)]
            else:
                runs.append(run)
    return runs


def plan(figures: Iterable[str], values: Mapping[str, Sequence[Any]], kinds: Sequence[str] | None) -> list[Run]:
    """Return the runs of all figures, each once, in the order of training; see `runs_of_figure`."""
    return [*dict.fromkeys(run for figure in figures for run in runs_of_figure(figure, values, kinds))]


def figures_of(run: Run) -> list[str]:
    """Return the figures in which a run is a point; a dense run is one along the size and along settings."""
    own: dict[str, Sequence[Any]] = {"size": (run.size,), "experts": (run.experts,), "granularity": (run.granularity,)}
    own |= {name: (run.value if run.axis else axis.base,) for name, axis in AXES.items()}
    candidates = ("size", *AXES, *GROUPS) if run.routing == "dense" else (*FIGURES, *AXES, *GROUPS)
    found = []
    for figure in candidates:
        values = own | ({"granularity": GROUPS[figure][1:2]} if figure in GROUPS else {})
        if run in runs_of_figure(figure, values, [run.kind]):
            found.append(figure)
    return found
