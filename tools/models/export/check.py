"""Compare the logits of two models for the same text."""

import argparse
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from megatron.core.models.gpt import GPTModel
from megatron.remoe.files.errors import UsageError
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM

from ...console.errors import ConversionError
from ..text import blend_of, sample

TOKENS = 2048
TOKENS_PER_FORWARD = 1024
BOUND = 1e-4
SEED = 1234


class Text(NamedTuple):
    """Tokens to compare on, int64 `[sequences, length + 1]`, and what to call them."""

    tokens: torch.Tensor
    name: str


class Check(NamedTuple):
    """Measurements of both models.

    Attributes:
        difference: largest of all logits, as a share of the largest logit.
        loss: of the model for transformers, in nats per token.
        sparsity: share of inactive (token, expert) pairs; None without experts.
    """

    difference: float
    loss: float
    sparsity: float | None


def text_for(args: argparse.Namespace, data_path: list[str] | None, config: RemoeConfig) -> Text:
    """Return the text given, else the training's (held-out, if it names some), else random tokens.

    Raises:
        UsageError: the data sets given cannot be read.
    """
    length = min(args.seq_length, TOKENS)
    held_out = None if data_path else getattr(args, "valid_data_path", None)
    try:
        tokens = sample(blend_of(args, data_path or held_out), TOKENS // length, length, config.vocab_size, SEED)
        return Text(tokens, "held-out tokens" if held_out else "tokens")
    except UsageError:
        if data_path:
            raise
    generator = torch.Generator().manual_seed(SEED)
    shape = (TOKENS // length, length + 1)
    return Text(torch.randint(config.vocab_size, shape, generator=generator), "random tokens")


@torch.no_grad()
def megatron_logits(model: GPTModel, text: Text) -> torch.Tensor:
    """Return Megatron's logits, float32 `[sequences, length, vocabulary]`."""
    tokens = text.tokens[:, :-1]
    positions = torch.arange(tokens.shape[1])
    return torch.cat([model(batch, positions.expand_as(batch), None).float() for batch in _batches(tokens)])


@torch.no_grad()
def compare(model: RemoeForCausalLM, logits: torch.Tensor, text: Text) -> Check:
    """Run the model for transformers on the text and compare its logits with Megatron's.

    Raises:
        ConversionError: they differ by more than rounding.
    """
    outputs = [model(batch, use_cache=False, output_router_logits=True) for batch in _batches(text.tokens[:, :-1])]
    other = torch.cat([output.logits.float() for output in outputs])
    sparsities = [output.sparsity for output in outputs if output.sparsity is not None]
    check = Check(
        difference=float((other - logits).abs().max() / logits.abs().max()),
        loss=float(cross_entropy(other.flatten(0, 1).double(), text.tokens[:, 1:].flatten())),
        sparsity=float(torch.stack(sparsities).mean()) if sparsities else None,
    )
    if not check.difference <= BOUND:
        raise ConversionError(
            f"{described(check, text)}, above {BOUND:.0e}: nothing was written. Please report this error.", "REMOE-E514"
        )
    return check


def described(check: Check, text: Text) -> str:
    """Return the result as a line."""
    tokens = text.tokens[:, 1:].numel()
    return f"largest difference of logits {check.difference:.1e} of the largest, on {tokens:,} {text.name}"


def _batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tokens.split(max(1, TOKENS_PER_FORWARD // tokens.shape[1]))
