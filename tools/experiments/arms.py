"""Define the routings and settings that experiments compare, with the flags that each adds to its recipe."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """A way to route.

    Attributes:
        title: for pictures and tables.
        marker: Matplotlib's, for pictures.
        flags: for Megatron, after the recipe's; {most} is 4 experts per token for k = 1, {near_dense} 6 of 8 experts.
        router: key of its color, if that is not its routing.
    """

    title: str
    marker: str
    flags: str = ""
    router: str = ""

    @property
    def label(self) -> str:
        """Return the title in lines, for an axis."""
        return self.title.replace(", ", ",\n").replace(" with ", "\nwith ")


UNBALANCED = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0"
BOUND, LAYERS = "--moe-relu-max-experts {most}", "--moe-relu-sparsity-scope layer"
BASELINE = f"{UNBALANCED} --moe-baseline-router"
# Routing (dense, moe or remoe), or routing and a word → how it routes.
ARMS: Mapping[str, Arm] = {
    "dense": Arm("dense", "D"),
    "moe": Arm("top-k", "s"),
    "remoe": Arm("ReMoE", "o"),
    "remoe-capped": Arm("ReMoE with the bound", "v", BOUND),
    "remoe-unbalanced": Arm("ReMoE, no load balancing", "d", "--no-moe-relu-l1-reg-load-balancing"),
    "moe-unbalanced": Arm("top-k, no load balancing", "X", UNBALANCED),
    "moe-warmup": Arm("top-k, near-dense warm-up", "^", "--moe-warmup-topk {near_dense} --moe-warmup-steps 100"),
    "moe-sigmoid": Arm("top-k, sigmoid", "<", "--moe-router-score-function sigmoid"),
    "moe-lossfree": Arm(
        "top-k, loss-free", ">", f"--moe-router-score-function sigmoid --moe-router-enable-expert-bias {UNBALANCED}"
    ),
    "moe-hash": Arm("hash", "h", f"{BASELINE} hash", "hash"),
    "moe-expertchoice": Arm("expert choice, sees the future", "p", f"{BASELINE} expert_choice", "expert_choice"),
    "moe-expert-threshold": Arm("expert threshold", "8", f"{BASELINE} expert_threshold"),
    "moe-topp": Arm("top-p", "H", f"{BASELINE} top_p"),
    "moe-normalized": Arm("top-k, normalized ReLU", "P", "--moe-baseline-router normalized_top_k"),
    "remoe-layers": Arm("ReMoE, a λ per layer", "x", f"{BOUND} {LAYERS}"),
    "remoe-normalized": Arm("ReMoE, normalized", "*", f"{BOUND} --moe-relu-normalize"),
    "remoe-normalized-layers": Arm("ReMoE, normalized, a λ per layer", "+", f"{BOUND} --moe-relu-normalize {LAYERS}"),
    "remoe-deco": Arm(
        "DECO's router",
        "1",
        "--moe-baseline-router deco --moe-relu-l1-reg-coeff-multiplier 1.05 --moe-relu-max-experts {most}",
    ),
}
AUXILIARY = ("moe", "moe-warmup", "moe-sigmoid", "moe-normalized")  # with an auxiliary loss
L1 = ("remoe", "remoe-capped", "remoe-unbalanced", "remoe-layers", "remoe-normalized", "remoe-normalized-layers")
RATE = "lr"


@dataclass(frozen=True)
class Setting:
    """A number that runs of some arms vary.

    Attributes:
        label: title of the number in pictures and help texts.
        base: the number without any flag.
        values: numbers to compare by default.
        arms: keys of `ARMS` that have this setting.
        flag: Megatron's flag; empty for the learning rate, which is part of the recipe.
    """

    label: str
    base: float
    values: tuple[float, ...]
    arms: tuple[str, ...]
    flag: str


SETTINGS: Mapping[str, Setting] = {
    "l1-init": Setting("λ₀", 1e-8, (1e-16, 1e-12, 1e-8, 1e-4, 1.0), L1, "--moe-relu-l1-reg-coeff-init"),
    "l1-multiplier": Setting("α", 1.2, (1.05, 1.1, 1.2, 1.3, 1.5), L1, "--moe-relu-l1-reg-coeff-multiplier"),
    "warmup-length": Setting("near-dense steps", 100, (50, 100, 500, 1000), ("moe-warmup",), "--moe-warmup-steps"),
    "aux-coeff": Setting("coefficient of the auxiliary loss", 1e-2, (1e-4, 1e-3, 1e-2, 1e-1), AUXILIARY,
                         "--moe-aux-loss-coeff"),
    "gate": Setting("factor on the gates", 1, (1, 2, 4, 8), ("moe", "moe-warmup", "moe-sigmoid", "moe-lossfree"),
                    "--moe-router-topk-scaling-factor"),
    RATE: Setting("factor on the learning rate", 1, (0.5, 1, 2, 4), tuple(ARMS), ""),
}  # fmt: skip
