"""The proof that both models are the same: their logits for the same text."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy

from megatron.core.models.gpt import GPTModel
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM
from megatron.training.utils.common_utils import get_blend_from_list

from ..convert_checkpoint.command import blend_of
from ..convert_checkpoint.errors import ConversionError
from ..convert_checkpoint.text import Blend, sample

TOKENS = 2048
TOKENS_PER_FORWARD = 1024
BOUND = 1e-4


@dataclass(frozen=True)
class Text:
    """Tokens to compare on, int64 `[sequences, length + 1]`, and what to call them."""

    tokens: torch.Tensor
    name: str


@dataclass(frozen=True)
class Check:
    """What was measured.

    Attributes:
        difference: largest of all logits, as a share of the largest logit.
        loss: of the model for transformers, nats per token.
        sparsity: share of inactive (token, expert) pairs; None without experts.
    """

    difference: float
    loss: float
    sparsity: float | None


def text_for(args: argparse.Namespace, data_path: list[str] | None, config: RemoeConfig, seed: int = 1234) -> Text:
    """Text to compare on: that given, otherwise the training's held-out text; random tokens where it is not here.

    Raises:
        ConversionError: the data sets given cannot be read.
    """
    length = min(args.seq_length, TOKENS)
    sequences = TOKENS // length
    try:
        held_out = None if data_path else getattr(args, "valid_data_path", None)
        blend = Blend(*get_blend_from_list(held_out)) if held_out else blend_of(args, data_path)
        tokens = sample(blend, sequences, length, config.vocab_size, seed)
        return Text(tokens, "held-out tokens" if held_out else "tokens")
    except ConversionError:
        if data_path:
            raise
    generator = torch.Generator().manual_seed(seed)
    return Text(torch.randint(config.vocab_size, (sequences, length + 1), generator=generator), "random tokens")


@torch.no_grad()
def megatron_logits(model: GPTModel, text: Text) -> torch.Tensor:
    """`[sequences, length, vocabulary]`, float32."""
    tokens = text.tokens[:, :-1]
    positions = torch.arange(tokens.shape[1])
    return torch.cat([model(batch, positions.expand_as(batch), None).float() for batch in _batches(tokens)])


@torch.no_grad()
def compare(model: RemoeForCausalLM, logits: torch.Tensor, text: Text) -> Check:
    """Run the model for transformers on the text, and hold it against Megatron's logits."""
    routed = bool(model.config.num_experts)
    outputs = [model(batch, use_cache=False, output_router_logits=routed) for batch in _batches(text.tokens[:, :-1])]
    other = torch.cat([output.logits.float() for output in outputs])
    sparsity = float(torch.stack([output.sparsity for output in outputs]).mean()) if routed else None
    return Check(
        difference=float((other - logits).abs().max() / logits.abs().max()),
        loss=float(cross_entropy(other.flatten(0, 1).double(), text.tokens[:, 1:].flatten())),
        sparsity=sparsity,
    )


def _batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tokens.split(max(1, TOKENS_PER_FORWARD // tokens.shape[1]))


def read_back(folder: Path) -> RemoeForCausalLM:
    """The model in a folder, in float32, for evaluation."""
    transformers.utils.logging.disable_progress_bar()
    return RemoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
