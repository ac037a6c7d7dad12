"""Which runs the three figures take, and the command of each."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.places import ROOT

SIZES = ("182m", "469m", "978m")
EXPERTS = (4, 8, 16, 32, 64, 128)
GRANULARITIES = (1, 2, 4, 8, 16, 32, 64)
ROUTINGS = ("dense", "moe", "remoe")
FIGURES = ("size", "experts", "granularity")
# Where the axes meet: each figure varies one of these and keeps the others.
SIZE, FEW_EXPERTS, WHOLE = "182m", 8, 1

_NAME = re.compile(rf"llama_({'|'.join(SIZES)})_(?:dense_ffn4|(moe|remoe)_e(\d+)g(\d+))")


@dataclass(frozen=True)
class Run:
    """One training; a dense one has no experts and no granularity."""

    size: str
    routing: str
    experts: int | None = None
    granularity: int | None = None

    @property
    def name(self) -> str:
        """The name that the launch scripts give to it."""
        if self.routing == "dense":
            return f"llama_{self.size}_dense_ffn4"
        return f"llama_{self.size}_{self.routing}_e{self.experts}g{self.granularity}"

    @classmethod
    def from_name(cls, name: str) -> "Run | None":
        """The run of a name, None where it is the name of something else."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        size, routing, experts, granularity = match.groups()
        return cls(size, routing, int(experts), int(granularity)) if routing else cls(size, "dense")


@dataclass(frozen=True)
class Launch:
    """What all runs have in common; `flags` go to Megatron behind all others, to dense runs without --moe-... ones."""

    output: Path
    gpus_per_node: int
    train_iters: int
    micro_batch_size: int | None
    flags: tuple[str, ...] = ()

    def folder(self, run: Run) -> Path:
        """Where the run leaves its files."""
        return self.output / run.name

    def arguments(self, run: Run) -> list[str]:
        """The launch script with its arguments."""
        micro_batch = "" if self.micro_batch_size is None else str(self.micro_batch_size)  # empty: the script's own
        words, flags = [str(self.gpus_per_node), str(self.train_iters), micro_batch], list(self.flags)
        if run.experts is not None and run.granularity is not None:
            words += [str(run.experts), str(run.granularity)]
        else:
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


def runs_of_figure(
    figure: str, sizes: Sequence[str], experts: Sequence[int], granularities: Sequence[int], routings: Sequence[str]
) -> list[Run]:
    """The runs of one figure; the dense one of the base size is a reference line where the size does not vary."""
    if figure == "size":
        axis = [(size, FEW_EXPERTS, WHOLE) for size in sizes]
    elif figure == "experts":
        axis = [(SIZE, number, WHOLE) for number in experts]
    else:
        axis = [(SIZE, FEW_EXPERTS, number) for number in granularities]
    runs = []
    for size, number, granularity in axis:
        for routing in routings:
            runs.append(Run(size, "dense") if routing == "dense" else Run(size, routing, number, granularity))
    return runs


def plan(
    figures: Iterable[str],
    sizes: Sequence[str],
    experts: Sequence[int],
    granularities: Sequence[int],
    routings: Sequence[str],
) -> list[Run]:
    """The runs of all figures, each once, in the order in which they are trained."""
    runs = [run for figure in figures for run in runs_of_figure(figure, sizes, experts, granularities, routings)]
    return list(dict.fromkeys(runs))


def figures_of(run: Run) -> list[str]:
    """The figures in which a run is a point."""
    if run.routing == "dense":
        return ["size"]
    base = {"size": run.size == SIZE, "experts": run.experts == FEW_EXPERTS, "granularity": run.granularity == WHOLE}
    return [figure for figure in FIGURES if all(at for other, at in base.items() if other != figure)]
