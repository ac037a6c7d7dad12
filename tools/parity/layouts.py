"""The trainings that are compared: a small model, its variants, and the layouts of up to four processes."""

from dataclasses import dataclass

from ..common.tiny_model import RELU, TOPK, TRAINING

MODEL = [
    *TRAINING,
    *"--num-layers 4 --micro-batch-size 2 --lr 1e-3 --lr-decay-style constant".split(),
    *"--make-vocab-size-divisible-by 192 --split 90,10,0 --log-interval 1".split(),
]
# λ₀ is large enough for the L1 term to show in the loss within the run.
ROUTINGS: dict[str, list[str]] = {
    "ReMoE": [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"],
    "top-k": TOPK,
}
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "gradient accumulation": ["--global-batch-size", "16"],
    "dense and MoE layers": ["--moe-layer-freq", "([0,1,0,1])"],
    "shared expert": ["--moe-shared-expert-intermediate-size", "64"],
    "full recompute": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split(),
    "MoE recompute": "--recompute-granularity selective --recompute-modules moe".split(),
    "bf16": ["--bf16"],
}


@dataclass(frozen=True)
class Layout:
    """A number of processes and the flags that split the training over them."""

    processes: int
    flags: list[str]


def _layout(processes: int, flags: str) -> Layout:
    return Layout(processes, flags.split())


TP2, PP2, EP2 = (
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--pipeline-model-parallel-size 2",
    "--expert-model-parallel-size 2",
)
LAYOUTS: dict[str, Layout] = {
    "DP2": _layout(2, ""),
    "DP2, distributed optimizer, overlap": _layout(
        2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    ),
    "TP2 + SP": _layout(2, TP2),
    "EP2, alltoall": _layout(2, EP2),
    "EP2, allgather": _layout(2, f"{EP2} --moe-token-dispatcher-type allgather"),
    "EP4": _layout(4, "--expert-model-parallel-size 4"),
    "TP2 x EP2, expert TP 1": _layout(4, f"{TP2} {EP2} --expert-tensor-parallel-size 1"),
    "TP2 x EP2, expert TP 2": _layout(4, f"{TP2} {EP2} --expert-tensor-parallel-size 2"),
    "PP2": _layout(2, PP2),
    "PP2, 2 virtual stages": _layout(2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "PP2 x EP2": _layout(4, f"{PP2} {EP2}"),
}
