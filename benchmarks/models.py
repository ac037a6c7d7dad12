"""The models that are measured: Megatron's flags, those of the machine, and FLOPs."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.common.tiny_model import TRAINING  # noqa: E402

# Steps that bring routers to the target. One batch is not enough: the tokens of a sequence have much in common.
FIT_STEPS = 4
COMMON = """
--num-attention-heads 12 --num-query-groups 4 --lr 1e-7 --lr-decay-style constant --split 100,0,0 --log-interval 1
--num-workers 0 --moe-token-dispatcher-type alltoall --make-vocab-size-divisible-by 128
""".split()
ROUTINGS = {
    "ReMoE": ["--moe-relu-routing"],
    "top-k": ["--moe-router-pre-softmax", "--moe-aux-loss-coeff", "1e-2"],
}
# The flags of tools/recipes/hardware.py for plain PyTorch on a GPU, and few log lines: each waits for the device.
GPU_FLAGS = """
--bf16 --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-rope-fusion --log-interval 1000
""".split()


def on_gpu(words: Sequence[str] = ()) -> bool:
    """Return whether a training with these flags runs on a GPU; the entry decides by the same rule."""
    return torch.cuda.is_available() and "--cpu" not in words


@dataclass(frozen=True)
class Shape:
    """A GPT of the paper's kind, with few layers.

    Attributes:
        experts, granularity: E and G; there are E·G experts of size ffn / G, of which G are active.
        vocabulary: small, so that the output layer keeps its share of the FLOPs: 34 % in the 182M model.
    """

    experts: int
    granularity: int
    layers: int = 2
    hidden: int = 768
    ffn: int = 2048
    sequence: int = 1024
    micro_batch: int = 4
    vocabulary: int = 8191  # one more is the end of a document

    @property
    def name(self) -> str:
        """Return "(E, G)"."""
        return f"({self.experts}, {self.granularity})"

    @property
    def tokens(self) -> int:
        """Return the tokens of one step."""
        return self.micro_batch * self.sequence

    def flags(self, routing: str) -> list[str]:
        """Return the training's flags, without data and number of steps."""
        sizes = f"""
        --num-layers {self.layers} --hidden-size {self.hidden} --ffn-hidden-size {self.ffn}
        --moe-ffn-hidden-size {self.ffn} --seq-length {self.sequence} --max-position-embeddings {self.sequence}
        --micro-batch-size {self.micro_batch} --global-batch-size {self.micro_batch} --vocab-size {self.vocabulary}
        --num-experts {self.experts} --moe-router-topk 1 --moe-granularity {self.granularity}
        """
        return [*TRAINING, *COMMON, *sizes.split(), *ROUTINGS[routing]]

    def flops(self, active_experts: float) -> float:
        """Return a step's FLOPs: 2 for a product and its sum, once forward, twice backward.

        Args:
            active_experts: active pairs per token, in experts of full size: G pairs make one.
        """
        heads, groups = 12, 4
        attention = self.hidden * self.hidden * (2 + 2 * groups / heads) + self.hidden * self.sequence  # causal: half
        router = self.hidden * self.experts * self.granularity
        layer = attention + router + 3 * self.hidden * self.ffn * active_experts
        vocabulary = math.ceil((self.vocabulary + 1) / 128) * 128
        return 6.0 * self.tokens * (self.layers * layer + self.hidden * vocabulary)
