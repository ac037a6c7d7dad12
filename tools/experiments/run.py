"""Define a run: a recipe with its routing, sizes, seed and schedule, and the training text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..console.flags import group_by_flag, without
from ..recipes import tiny
from ..recipes.layout import RecipeError
from ..recipes.models import Routing, Training
from ..text.corpora import dataset
from .arms import ARMS, RATE, SETTINGS

CAP = 4  # largest number of experts per token of capped arms, for k = 1 and without granularity
DECAY = 0.2  # share of a WSD schedule's steps in which the learning rate falls
STEP = 5  # steps of a WSD schedule are multiples of it, so that a line of the log has their exact FLOPs
SAVED = 200  # wanted number of steps between two checkpoints of a WSD schedule
TUNING = "--split 95,5,0 --eval-iters 40"  # tuning runs hold out 5 % of the training text
TRAINED = 0.94  # at least this share of the text's tokens is for training: --split counts documents


@dataclass(frozen=True)
class Text:
    """A corpus as data sets of one kind of tokens.

    Attributes:
        folder: of the data sets and their vocabulary.
        train_tokens: domain → tokens of its training text.
        inputs: fingerprint of the data sets.
        per_byte: set ("" for a part of the training text, else a domain's held-out text) → tokens per byte.
    """

    folder: Path
    train_tokens: Mapping[str, int]
    inputs: str
    per_byte: Mapping[str, float]

    @classmethod
    def read(cls, folder: Path) -> "Text":
        """Read the manifest in a folder of data sets."""
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokens, sizes = manifest["tokens"], manifest["bytes"]
        share = {name: number / sizes["heldout"][name] for name, number in tokens["heldout"].items()}
        share[""] = sum(tokens["train"].values()) / sum(sizes["train"].values())
        return cls(folder, tokens["train"], manifest["inputs"], share)


@dataclass(frozen=True)
class Run:
    """One training run; every field is part of its name.

    Attributes:
        arm: key of `ARMS`.
        seed: of weights and the order of the text.
        steps: optimizer steps.
        size: of the launch script, or key of `tiny.SIZES`.
        experts: of a layer, before granularity splits them; 0 for a dense model.
        granularity: number of smaller experts that each expert is split into.
        topk: active experts of a token, before granularity.
        expansion: a dense model's FFN width, as a multiple of the recipe's.
        setting, value: key of `SETTINGS` and its value, if not at its base; "" for none.
        rate: factor on the recipe's learning rate.
        warmup: steps in which the learning rate rises; None for the recipe's share.
        is_wsd: the rate is constant and falls linearly in the last fifth; else it follows a cosine.
        is_tuning: evaluates on a split of the training text instead of the held-out text.
        is_tiny: one of `tiny.SIZES` on the CPU; else a launch script's model.
        tokens: key of `dataset.TOKENS`, for tiny runs.
    """

    arm: str
    seed: int = tiny.SEED
    steps: int = tiny.TRAINING.iterations
    size: str = tiny.BASE_SIZE
    experts: int = 8
    granularity: int = 1
    topk: int = 1
    expansion: int = 1
    setting: str = ""
    value: float = 0.0
    rate: float = 1.0
    warmup: int | None = None
    is_wsd: bool = False
    is_tuning: bool = False
    is_tiny: bool = True
    tokens: str = dataset.BYTES

    def __post_init__(self) -> None:
        if self.arm == "dense":  # one run for all numbers of experts
            for name, value in (("experts", 0), ("granularity", 1), ("topk", 1)):
                object.__setattr__(self, name, value)

    @property
    def routing(self) -> str:
        """Return dense, moe or remoe."""
        return self.arm.partition("-")[0]

    @property
    def name(self) -> str:
        """Return the name of the run's folder; no other run has it."""
        parts = [
            self.size, self.arm,
            f"ffn{self.expansion}" if not self.experts else f"e{self.experts}g{self.granularity}k{self.topk}",
            f"{self.setting}{self.value:g}" if self.setting else "",
            f"lr{self.rate:g}" if self.rate != 1 else "",
            f"warmup{self.warmup}" if self.warmup is not None else "",
            "" if self.is_tiny else "gpu", self.tokens if self.tokens != dataset.BYTES else "",
            "wsd" if self.is_wsd else "", f"steps{self.steps}", f"seed{self.seed}", "tuning" if self.is_tuning else "",
        ]  # fmt: skip
        return "_".join(filter(None, parts))

    @property
    def decay_start(self) -> int:
        """Return the step at which the rate of a WSD schedule begins to fall."""
        return self.steps - rounded(DECAY * self.steps)

    def vary(self, setting: str, value: float) -> "Run":
        """Return the run at a different value of a setting."""
        if setting == RATE:
            return replace(self, rate=value)
        return self if value == SETTINGS[setting].base else replace(self, setting=setting, value=value)

    def training(self) -> Training:
        """Return the batches, rates and schedule of a tiny run."""
        base = tiny.TRAINING
        decay = self.steps - self.decay_start if self.is_wsd else None
        lr, min_lr = self.rates(base)
        return replace(base, iterations=self.steps, warmup_steps=self.warmup, decay_steps=decay, lr=lr, min_lr=min_lr)

    def rates(self, base: Training) -> tuple[str, str]:
        """Return the run's highest and lowest learning rate, given the recipe's."""
        if self.rate == 1:
            return base.lr, base.min_lr
        return f"{self.rate * float(base.lr):g}", f"{self.rate * float(base.min_lr):g}"

    def added_flags(self) -> list[str]:
        """Return the flags that the run's arm and setting add to its recipe."""
        numbers = {"most": min(CAP * self.topk, self.experts), "near_dense": max(self.topk + 1, self.experts * 6 // 8)}
        words = ARMS[self.arm].flags.format(**numbers).split()
        return [*words, SETTINGS[self.setting].flag, f"{self.value:g}"] if self.setting else words

    def tiny_flags(self, text: Text, given: Sequence[str]) -> list[str]:
        """Return Megatron's flags for a tiny run, with those `given` for all runs, but without its folders."""
        size = tiny.SIZES[self.size]
        size = replace(size, ffn=size.ffn * self.expansion)
        routing = Routing(self.routing, self.experts, self.granularity, self.topk)
        flags = tiny.common_flags(size, self.training(), self.seed) + routing.flags(size.ffn)
        if self.experts:
            flags.append("--moe-per-layer-logging")
        if self.is_wsd:
            # Longer runs continue from the checkpoint at the start of the decay. Only the newest of the others is kept.
            start = self.decay_start
            divisors = (steps for steps in range(1, start + 1) if start % steps == 0)
            every = min(divisors, key=lambda steps: max(steps / SAVED, SAVED / steps))
            flags += f"--log-interval {STEP} --save-interval {every} --save-retain-interval {start}".split()
            flags.append("--override-opt_param-scheduler")
        if self.is_tuning:
            flags += [*dataset.vocabulary_flags(text.folder), *TUNING.split()]
            flags += ["--data-path", *dataset.weighted_training_sets(text.folder, text.train_tokens)]
        else:
            flags += dataset.data_flags(text.folder, text.train_tokens)
        return [*flags, *self.added_flags(), *self.fitting(given)]

    def fitting(self, given: Sequence[str]) -> list[str]:
        """Return the `given` flags, for a dense model without --moe-... ones: Megatron refuses some of those."""
        expert_flags = {flag for flag in group_by_flag(given) if flag.startswith("--moe-")}
        return [*given] if self.experts else without(given, expert_flags)


RATES = ("--lr", "--min-lr")
# A run's fields and its folder set these flags.
CHOSEN = {
    "--seed", "--train-iters", "--train-samples", "--num-experts", "--moe-router-topk", "--moe-granularity",
    "--moe-relu-routing", "--micro-batch-size", "--save", "--load", "--tensorboard-dir",
}  # fmt: skip
SCHEDULE = {
    "--lr-decay-style", "--lr-decay-iters", "--lr-warmup-iters", "--lr-warmup-fraction", "--lr-wsd-decay-style",
    "--lr-wsd-decay-iters", "--log-interval", "--save-interval", "--save-retain-interval", "--split", "--eval-iters",
}  # fmt: skip
# A tiny run's text is compared by its fingerprint, not by its path.
PATH_FLAGS = {"--data-path", "--train-data-path", "--valid-data-path", "--vocab-file", "--merge-file"}


def check_flags(given: Sequence[str], runs: Sequence[Run]) -> None:
    """Refuse Megatron flags after -- that the runs set themselves.

    Raises:
        RecipeError: names the flag and the run.
    """
    for flag in group_by_flag(given):
        for run in runs:
            varied = {*(RATES if run.rate != 1 else ()), *(SCHEDULE if run.is_wsd else ())}
            varied |= PATH_FLAGS if run.is_tiny else set()
            if flag in {*CHOSEN, *varied, *group_by_flag(run.added_flags())} or (run.expansion > 1 and "ffn" in flag):
                raise RecipeError(f"{flag} after --: {run.name} sets it. Choose it with the options before --.")


def rounded(steps: float) -> int:
    """Return the nearest multiple of `STEP`, at least one of them."""
    return max(1, round(steps / STEP)) * STEP


def run_from_fields(fields: Mapping[str, Any]) -> Run:
    """Return the run with these fields; unknown ones are ignored."""
    return Run(**{name: value for name, value in fields.items() if name in Run.__dataclass_fields__})
