"""Define the runs to compare: a small model in two classes, its variants, and layouts of up to four processes."""

from dataclasses import dataclass

from tests.tiny_model import RELU, TOPK, TRAINING

LAYERS = 4
MODEL = [
    *TRAINING,
    *"--micro-batch-size 2 --lr 1e-3 --lr-decay-style constant".split(),
    *"--make-vocab-size-divisible-by 192 --split 90,10,0 --log-interval 1".split(),
]
# λ₀ is large enough for the L1 term to show in the loss within the run.
ROUTINGS: dict[str, list[str]] = {"ReMoE": [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"], "top-k": TOPK}
FEW_EXPERTS = "ReMoE, at most 2 experts"
ROUTINGS[FEW_EXPERTS] = [*ROUTINGS["ReMoE"], "--moe-relu-max-experts", "2"]
NORMALIZED = "ReMoE, normalized, a λ per layer"
ROUTINGS[NORMALIZED] = [*ROUTINGS["ReMoE"], *"--moe-relu-normalize --moe-relu-sparsity-scope layer".split()]
DENSE_AND_MOE = "dense and MoE layers"
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "gradient accumulation": ["--global-batch-size", "16"],
    DENSE_AND_MOE: ["--moe-layer-freq", "([0,1,0,1])"],
    "shared expert": ["--moe-shared-expert-intermediate-size", "64"],
    "full recompute": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split(),
    "MoE recompute": "--recompute-granularity selective --recompute-modules moe".split(),
    "bf16": ["--bf16"],
}


@dataclass(frozen=True)
class Layout:
    """The number of processes, Megatron's flags for the split, and the virtual pipeline stages of each process."""

    processes: int
    flags: str
    virtual_stages: int = 1

    @property
    def stages(self) -> int:
        """Return the number of parts into which the layers are cut."""
        return self.virtual_stages * (2 if PP2 in self.flags else 1)


def gpt_layers(layout: Layout, variant: str) -> list[str]:
    """Return the flags of GPTModel's layers."""
    flags = ["--num-layers", str(LAYERS), *VARIANTS[variant]]
    if layout.virtual_stages > 1:
        flags += ["--num-layers-per-virtual-pipeline-stage", str(LAYERS // layout.stages)]
    return flags


def hybrid_layers(layout: Layout, variant: str) -> list[str]:
    """Return the flags of HybridModel's layers; each layer of GPTModel becomes two, attention and MLP."""
    mlps = "-E-E" if variant == DENSE_AND_MOE else "EEEE"
    size = LAYERS // layout.stages
    parts = ("".join(f"*{mlp}" for mlp in mlps[start : start + size]) for start in range(0, LAYERS, size))
    flags = [] if variant == DENSE_AND_MOE else VARIANTS[variant]
    return ["--hybrid-layer-pattern", "|".join(parts), *flags]


MODELS = {"gpt": gpt_layers, "hybrid": hybrid_layers}


TP2, PP2, EP2 = (
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--pipeline-model-parallel-size 2",
    "--expert-model-parallel-size 2",
)
SINGLE = "one process"
LAYOUTS: dict[str, Layout] = {
    SINGLE: Layout(1, ""),
    "DP2": Layout(2, ""),
    "DP2, distributed optimizer, overlap": Layout(
        2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    ),
    "TP2 + SP": Layout(2, TP2),
    "EP2, alltoall": Layout(2, EP2),
    "EP2, allgather": Layout(2, f"{EP2} --moe-token-dispatcher-type allgather"),
    "EP4": Layout(4, "--expert-model-parallel-size 4"),
    "TP2 x EP2, expert TP 1": Layout(4, f"{TP2} {EP2} --expert-tensor-parallel-size 1"),
    "TP2 x EP2, expert TP 2": Layout(4, f"{TP2} {EP2} --expert-tensor-parallel-size 2"),
    "PP2": Layout(2, PP2),
    "PP2, 2 virtual stages": Layout(2, PP2, virtual_stages=2),
    "PP2 x EP2": Layout(4, f"{PP2} {EP2}"),
}
