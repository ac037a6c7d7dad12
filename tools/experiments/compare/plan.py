"""The arms of a comparison, and the flags of their trunks and decays."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...console.flags import SCHEDULE, Settings, parse
from ...text.corpora.dataset import data_flags
from ..sweep import tiny
from ..sweep.plan import BASE_SIZE, PAIRED, POST_SOFTMAX, PROTOCOLS, RIVALS, UNBALANCED, WHOLE, Launch, Run
from ..sweep.settings import planned_flags

REFERENCE = "remoe"
TUNING_SEED = 1233
LOG_INTERVAL = 5  # steps of all points are multiples of it, so that a line of the log has their exact FLOPs
DECAY = 0.2  # share of a point's steps in which the learning rate falls
LEAST = 20  # steps of a point
TRUNK = 50_000  # steps that a trunk is planned for: the order of its data and its constant rate depend on no point
REPLACED = """
--lr-warmup-fraction --save-retain-interval --eval-interval --save --load --tensorboard-dir --log-timers-to-tensorboard
--tensorboard-log-interval --wandb-project --wandb-exp-name --wandb-save-dir
""".split()


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        kind: routing, from `sweep.plan.KINDS`.
        title: for the picture.
        flags: additional ones.
        granularity: of its experts, and k.
    """

    kind: str
    title: str
    flags: str = ""
    granularity: int = WHOLE

    @property
    def routing(self) -> str:
        """Return dense, moe or remoe: arms of one routing have one learning rate."""
        return self.kind.partition("-")[0]


FASTER = "--moe-relu-l1-reg-start-power 3 --moe-relu-l1-reg-start-setback 12"
CAPPED = "--moe-relu-max-experts 4"
# The first 100 steps have 4 sequences instead of 32.
SMALL_STEPS, SMALL_BATCH = 100, 4
SMALL_BATCHES = f"--micro-batch-size {SMALL_BATCH}"
STARTS: Mapping[str, Arm] = {
    REFERENCE: Arm("remoe", "ReMoE"),
    "moe": Arm("moe", "top-k"),
    "moe-dense-start": Arm("moe-warmup", "top-k, dense start"),
    "remoe-faster": Arm("remoe", "ReMoE, faster λ", FASTER),
    "remoe-faster-floor": Arm("remoe", "ReMoE, faster λ above λ₀", f"{FASTER} --moe-relu-l1-reg-coeff-min 1e-8"),
    "remoe-capped": Arm("remoe", "ReMoE, at most 4 experts", CAPPED),
    "remoe-faster-capped": Arm("remoe", "ReMoE, faster λ, at most 4", f"{FASTER} {CAPPED}"),
    "remoe-sparse-start": Arm(
        "remoe", "ReMoE, sparse start", "--moe-relu-sparse-start --moe-relu-l1-reg-coeff-init 1e-3"
    ),
    "remoe-small-batches": Arm("remoe", "ReMoE, small batches at first", SMALL_BATCHES),
    "moe-expert-threshold": Arm(
        "moe", "top-k, expert threshold", f"{UNBALANCED} --moe-baseline-router expert_threshold"
    ),
}
_SHORT = {"moe": "top-k", "remoe": "ReMoE"}
ARMS: Mapping[str, Arm] = {
    **STARTS,
    "dense": Arm("dense", "dense"),
    **{
        kind: Arm(kind, f"{_SHORT[kind.partition('-')[0]]}, {protocol.title}")
        for kind, protocol in PROTOCOLS.items()
        if kind not in ("moe-warmup", POST_SOFTMAX, *RIVALS)  # moe-dense-start; needs k > 1; at k = 2 below
    },
    # k varies around 2, but for quantile balancing.
    **{kind: Arm(kind, f"{PROTOCOLS[kind].title}, k = 2", granularity=PAIRED) for kind in RIVALS},
    **{f"{kind}-k2": Arm(kind, f"{title}, k = 2", granularity=PAIRED) for kind, title in _SHORT.items()},
}


@dataclass(frozen=True)
class Training:
    """A trunk and its decays.

    Attributes:
        arm: key of `ARMS`.
        factor: on the recipe's learning rate.
        is_tuning: evaluates a part of the training text instead of the held-out text.
        warmup: steps in which the learning rate rises.
        size: of the model, key of `tiny.MODELS`.
    """

    experts: int
    arm: str
    seed: int
    factor: float = 1.0
    is_tuning: bool = False
    warmup: int = 300
    size: str = BASE_SIZE

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        name = f"{self.size}-" if self.size != BASE_SIZE else ""
        name += f"e{self.experts}-{self.arm}-seed{self.seed}-lr{self.factor:g}-warmup{self.warmup}"
        return name + ("-tuning" if self.is_tuning else "")

    @property
    def cost(self) -> float:
        """Return the time of a step in relation to other trainings, for the time left."""
        return 1.0 + self.experts / 32

    def tuned(self, rates: Mapping[tuple[int, str], float]) -> "Training":
        """Return the training at the best learning rate of its routing and number of experts."""
        return replace(self, factor=rates.get((self.experts, ARMS[self.arm].routing), 1.0))


def trunk_steps(steps: int) -> int:
    """Return the step of the trunk at which the decay to a point starts."""
    return steps - rounded(DECAY * steps)


def rounded(steps: float) -> int:
    """Return the nearest multiple of the log's interval, at least one interval."""
    return max(1, round(steps / LOG_INTERVAL)) * LOG_INTERVAL


def flags_of(training: Training, text: Path, tokens: Mapping[str, int], steps: int) -> Settings:
    """Return Megatron's flags for a trunk or a decay, without its folders.

    Args:
        training: the trunk, or that of the decay.
        text: the folder of the quickstart's data.
        tokens: domain → tokens of its training text.
        steps: to plan for: `TRUNK`, or those of the point.

    Raises:
        RecipeError: an environment variable is wrong.
    """
    arm = ARMS[training.arm]
    routing, _, protocol = arm.kind.partition("-")
    run = Run(training.size, routing, training.experts, arm.granularity, protocol=protocol)
    run = Run(training.size, routing) if routing == "dense" else run
    small = {name: tiny.flags(size, steps, os.environ) for name, size in tiny.MODELS.items()}
    launch = Launch(Path(), 1, steps, None, tuple(arm.flags.split()), small=small, data=tiny.text_in(text))
    settings = planned_flags(launch, run.at("lr", training.factor), anywhere=False)
    settings = {flag: values for flag, values in settings.items() if flag not in REPLACED}
    changed: dict[str, str] = {
        "--seed": str(training.seed), "--log-interval": str(LOG_INTERVAL), "--eval-interval": str(TRUNK + 1),
        "--lr-decay-style": "WSD", "--lr-wsd-decay-style": "linear", "--lr-warmup-iters": str(training.warmup),
        "--lr-wsd-decay-iters": str(steps - trunk_steps(steps)), "--lr-decay-iters": str(steps),
        "--train-iters": str(steps),
    }  # fmt: skip
    settings |= {flag: (value,) for flag, value in changed.items()}
    if arm.flags == SMALL_BATCHES:
        settings = _with_small_batches(settings)
    if not training.is_tuning:
        for flag in ("--data-path", "--split", "--eval-iters"):
            del settings[flag]
        settings |= parse(["--multiple-validation-sets", "--full-validation", *data_flags(text, dict(tokens))])
    return settings


def _with_small_batches(settings: Settings) -> Settings:
    """Return the settings with small batches at first; Megatron then counts steps in samples."""
    batch, length = (int(settings[flag][0]) for flag in ("--global-batch-size", "--seq-length"))
    changed = {SCHEDULE: (f"0:{SMALL_BATCH} {SMALL_STEPS * SMALL_BATCH * length}:{batch}",)}
    for flag in ("--train-iters", "--lr-decay-iters", "--lr-warmup-iters", "--lr-wsd-decay-iters"):
        steps = int(settings[flag][0])
        fewer = (batch - SMALL_BATCH) * min(steps, SMALL_STEPS) if flag != "--lr-wsd-decay-iters" else 0
        changed[flag.replace("-iters", "-samples")] = (str(batch * steps - fewer),)
    left_out = {"--global-batch-size", *(flag.replace("-samples", "-iters") for flag in changed)}
    return {flag: values for flag, values in settings.items() if flag not in left_out} | changed
