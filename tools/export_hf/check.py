"""The proof that both models are the same: their logits for the same text."""

import argparse
import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from megatron.core.models.gpt import GPTModel
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM
from megatron.training.utils.common_utils import get_blend_from_list

from ..common.checkpoints import EMBEDDING, Checkpoint, load
from ..common.errors import ConversionError
from ..common.hf.folder import read_config, read_tensors
from ..common.hf.settings import complete
from ..common.hf.tensors import model_of
from ..common.hf.weights import fill, read_layer, read_outer
from ..common.megatron_model import build
from ..common.text import Blend, blend_of, sample

TOKENS = 2048
TOKENS_PER_FORWARD = 1024
BOUND = 1e-4
MEMORY = 4 * 10**9
LAYER = re.compile(r"layers\.(\d+)\.")


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
        loss: of the model for transformers, nats per token; None where it was looked at a part at a time.
        sparsity: share of inactive (token, expert) pairs; None without experts, and likewise.
    """

    difference: float
    loss: float | None
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
    outputs = [model(batch, use_cache=False, output_router_logits=True) for batch in _batches(text.tokens[:, :-1])]
    other = torch.cat([output.logits.float() for output in outputs])
    sparsities = [output.sparsity for output in outputs if output.sparsity is not None]
    return Check(
        difference=float((other - logits).abs().max() / logits.abs().max()),
        loss=float(cross_entropy(other.flatten(0, 1).double(), text.tokens[:, 1:].flatten())),
        sparsity=float(torch.stack(sparsities).mean()) if sparsities else None,
    )


def _batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tokens.split(max(1, TOKENS_PER_FORWARD // tokens.shape[1]))


def read_back(folder: Path) -> RemoeForCausalLM:
    """Return the model in a folder, in float32, for evaluation."""
    config = read_config(folder)
    return model_of(config, read_tensors(folder, config), torch.float32)


def check_whole(checkpoint: Checkpoint, folder: Path, text: Text) -> Check:
    """Megatron's model as Megatron loads it against that in the folder; one of them is in memory at a time."""
    args = complete(checkpoint.args)
    args.padded_vocab_size = checkpoint.shapes[EMBEDDING][0]
    model = build(args)
    load(checkpoint, model)
    logits = megatron_logits(model, text)
    del model
    return compare(read_back(folder), logits, text)


def check_in_parts(
    checkpoint: Checkpoint, args: argparse.Namespace, config: RemoeConfig, folder: Path, text: Text, layers: int
) -> Check:
    """So many layers at a time, each time as a model of these layers alone, for what is too large as a whole."""
    largest = 0.0
    for start in range(0, config.num_hidden_layers, layers):
        numbers = range(start, min(config.num_hidden_layers, start + layers))
        part, part_args = copy.deepcopy(config), copy.copy(args)
        part.num_hidden_layers = part_args.num_layers = len(numbers)
        part.mlp_only_layers = [number - start for number in config.mlp_only_layers if number in numbers]
        part_args.moe_layer_freq = [int(number not in config.mlp_only_layers) for number in numbers]
        model = build(part_args)
        fill(model, read_outer(checkpoint, config), [read_layer(checkpoint, config, number) for number in numbers])
        logits = megatron_logits(model, text)
        del model
        other = RemoeForCausalLM(part).float().eval()
        _read_layers(folder, other, start)
        largest = max(largest, compare(other, logits, text).difference)
    return Check(largest, None, None)


@torch.no_grad()
def _read_layers(folder: Path, model: RemoeForCausalLM, start: int) -> None:
    state = model.state_dict()
    wanted = {LAYER.sub(lambda found: f"layers.{int(found[1]) + start}.", name): name for name in state}
    for part in read_tensors(folder, read_config(folder), wanted.keys()):
        for name, tensor in part.items():
            state[wanted[name]].copy_(tensor)


def layers_at_once(config: RemoeConfig, memory: int = MEMORY) -> int:
    """Layers that a part of `check_in_parts` has within so many bytes: as read, and in a model in float32."""
    with torch.device("meta"):
        model = RemoeForCausalLM(config)
    largest = max(sum(one.numel() for one in layer.parameters()) for layer in model.model.layers)
    return max(1, memory // (2 * 4 * largest))
