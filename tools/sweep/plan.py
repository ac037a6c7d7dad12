"""Which runs the figures take, and the command of each."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.places import ROOT

SIZES = ("182m", "469m", "978m")
EXPERTS = (4, 8, 16, 32, 64, 128)
GRANULARITIES = (1, 2, 4, 8, 16, 32, 64)
L1_INITS = (1e-16, 1e-12, 1e-8, 1e-4, 1.0)
L1_MULTIPLIERS = (1.05, 1.1, 1.2, 1.3, 1.5)
ROUTINGS = ("dense", "moe", "remoe")
# Top-k otherwise: a near-dense warm-up (k = 6 of 8 for 100 steps); further steps, to the FLOPs of the ReMoE beside it.
WARMUP, MATCHED = "moe-warmup", "moe-matched"
FIGURES = ("size", "experts", "granularity")
L1_FIGURES = ("l1-init", "l1-multiplier")
# Where the axes meet: each figure varies one of these and keeps the others.
SIZE, FEW_EXPERTS, WHOLE, L1_INIT, L1_MULTIPLIER = "182m", 8, 1, 1e-8, 1.2
VALUES: Mapping[str, Sequence[Any]] = {
    "size": SIZES,
    "experts": EXPERTS,
    "granularity": GRANULARITIES,
    "l1-init": L1_INITS,
    "l1-multiplier": L1_MULTIPLIERS,
}
WIDE = 8  # the paper's Dense x 8, as wide as 8 experts

_NAME = re.compile(
    rf"llama_({'|'.join(SIZES)})_(?:dense_ffn(\d+)|(moe|remoe)_e(\d+)g(\d+)(?:_(?!init|multiplier)([a-z]\w*)"
    r"|_(init|multiplier)([0-9.e-]+))?)"
)


@dataclass(frozen=True)
class Run:
    """One training; a dense one has no experts and no granularity.

    expansion: of a dense one's FFN over 4 x hidden.
    l1_init, l1_multiplier: λ₀ and α of ReMoE.
    protocol: "warmup" or "matched" for top-k trained otherwise (`WARMUP`, `MATCHED`); any other word stands for a run
        that was made elsewhere, for instance by the authors' fork.
    """

    size: str
    routing: str
    experts: int | None = None
    granularity: int | None = None
    expansion: int = 1
    l1_init: float = L1_INIT
    l1_multiplier: float = L1_MULTIPLIER
    protocol: str = ""

    @property
    def name(self) -> str:
        """The name that the launch scripts give to it, with what they do not know behind."""
        if self.routing == "dense":
            return f"llama_{self.size}_dense_ffn{4 * self.expansion}"
        name = f"llama_{self.size}_{self.routing}_e{self.experts}g{self.granularity}"
        name += f"_init{self.l1_init:g}" if self.l1_init != L1_INIT else ""
        name += f"_multiplier{self.l1_multiplier:g}" if self.l1_multiplier != L1_MULTIPLIER else ""
        return name + (f"_{self.protocol}" if self.protocol else "")

    @property
    def flags(self) -> list[str]:
        """What the run gives to Megatron beside the launch script."""
        flags = []
        if self.l1_init != L1_INIT:
            flags += ["--moe-relu-l1-reg-coeff-init", f"{self.l1_init:g}"]
        if self.l1_multiplier != L1_MULTIPLIER:
            flags += ["--moe-relu-l1-reg-coeff-multiplier", f"{self.l1_multiplier:g}"]
        if self.protocol == "warmup" and self.experts:
            flags += ["--moe-warmup-topk", str(self.experts * 6 // 8), "--moe-warmup-steps", "100"]
        return flags

    @classmethod
    def from_name(cls, name: str) -> "Run | None":
        """The run of a name, None where it is the name of something else."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        size, ffn, routing, experts, granularity, protocol, kind, value = match.groups()
        if ffn:
            run = cls(size, "dense", expansion=int(ffn) // 4)
        else:
            changes: dict[str, Any] = {f"l1_{kind}": float(value)} if kind else {}
            run = cls(size, routing, int(experts), int(granularity), protocol=protocol or "", **changes)
        return run if run.name == name else None


@dataclass(frozen=True)
class Launch:
    """What all runs have in common; `flags` go to Megatron behind the script's, to dense runs without --moe-... ones.

    iterations: of those runs that do not train for `train_iters`.
    """

    output: Path
    gpus_per_node: int
    train_iters: int
    micro_batch_size: int | None
    flags: tuple[str, ...] = ()
    iterations: Mapping[Run, int] = field(default_factory=dict)

    def folder(self, run: Run) -> Path:
        """Where the run leaves its files."""
        return self.output / run.name

    def arguments(self, run: Run) -> list[str]:
        """The launch script with its arguments."""
        micro_batch = "" if self.micro_batch_size is None else str(self.micro_batch_size)  # empty: the script's own
        words = [str(self.gpus_per_node), str(self.iterations.get(run, self.train_iters)), micro_batch]
        flags = [*self.flags, *run.flags]
        if run.experts is not None and run.granularity is not None:
            words += [str(run.experts), str(run.granularity)]
        else:
            words += [str(run.expansion)] if run.expansion > 1 else []
            flags = without_expert_flags(flags)
        behind = ["--", *flags] if flags else []
        return [str(ROOT / "scripts" / f"train_llama_{run.size}_{run.routing}.sh"), *words, *behind]

    def environment(self, run: Run, given: Mapping[str, str]) -> dict[str, str]:
        """What the run needs beside the `given` environment.

        EP is lowered to what divides the run's experts: one value serves a whole axis.
        """
        added = {"OUTPUT_DIR": str(self.folder(run))}
        if run.experts is not None and run.granularity is not None and given.get("EP", "").isdecimal():
            fitting = math.gcd(int(given["EP"]), run.experts * run.granularity)
            if fitting != int(given["EP"]):
                added["EP"] = str(fitting)
        return added


def without_expert_flags(flags: Sequence[str]) -> list[str]:
    """`flags` without --moe-... and their values: Megatron refuses some of them where there are no experts."""
    kept, dropping = [], False
    for word in flags:
        if word.startswith("--"):
            dropping = word.startswith("--moe-")
        if not dropping:
            kept.append(word)
    return kept


def runs_of_figure(figure: str, values: Mapping[str, Sequence[Any]], routings: Sequence[str]) -> list[Run]:
    """The runs of one figure; dense ones of the base size are reference lines where the size does not vary.

    Args:
        figure: one of `FIGURES` and `L1_FIGURES`.
        values: figure → the values along its axis.
        routings: those of `ROUTINGS`, `WARMUP` and `MATCHED` that are wanted; λ₀ and α are ReMoE's alone.
    """
    base = Run(SIZE, "remoe", FEW_EXPERTS, WHOLE)
    if figure in L1_FIGURES:
        return [replace(base, **{figure.replace("-", "_"): value}) for value in values[figure]] * ("remoe" in routings)
    runs = []
    for value in values[figure]:
        at = replace(base, **{figure: value})
        for routing in routings:
            if routing == "dense":
                runs.append(Run(at.size, "dense"))
                if figure == "experts":
                    runs.append(Run(SIZE, "dense", expansion=WIDE))
            else:
                kind, _, protocol = routing.partition("-")
                runs.append(replace(at, routing=kind, protocol=protocol))
    return runs


def plan(figures: Iterable[str], values: Mapping[str, Sequence[Any]], routings: Sequence[str]) -> list[Run]:
    """The runs of all figures, each once, in the order in which they are trained; see `runs_of_figure`."""
    runs = dict.fromkeys(run for figure in figures for run in runs_of_figure(figure, values, routings))
    return sorted(runs, key=lambda run: run.protocol == "matched")  # which wait for others


def partner(run: Run) -> Run:
    """The ReMoE whose FLOPs a matched run takes."""
    return replace(run, routing="remoe", protocol="")


def figures_of(run: Run) -> list[str]:
    """The figures in which a run is a point."""
    if run.routing == "dense":
        return ["size"] if run.expansion == 1 else []
    base = {
        "size": run.size == SIZE,
        "experts": run.experts == FEW_EXPERTS,
        "granularity": run.granularity == WHOLE,
        "l1-init": run.l1_init == L1_INIT,
        "l1-multiplier": run.l1_multiplier == L1_MULTIPLIER,
    }
    figures = [figure for figure in base if all(at for other, at in base.items() if other != figure)]
    return [figure for figure in figures if figure in FIGURES or (run.routing, run.protocol) == ("remoe", "")]
