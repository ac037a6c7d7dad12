"""Open a model: a run's checkpoint or an exported folder."""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeForCausalLM

from ...console.errors import ConversionError, ToolError
from ..on_cpu import megatron_on_cpu
from .folder import read_config, read_tensors
from .tensors import model_of
from .tokenizer import generation_config, read_tokenizer, tokenizer_of


class OpenedModel(NamedTuple):
    """A model for evaluation; its tokenizer, or None without one; of a run, Megatron's arguments as saved."""

    model: RemoeForCausalLM
    tokenizer: PreTrainedTokenizerBase | None
    args: argparse.Namespace | None

    def sequence_length(self, given: int | None) -> int:
        """Return --seq-length or, without it, the model's context.

        Raises:
            ToolError: it is longer than the context.
        """
        context: int = self.model.config.max_position_embeddings
        if (given or 0) > context:
            raise ToolError(f"--seq-length {given}: the model's context is {context}. Give at most that.", "REMOE-E501")
        return given or context


def open_model(
    place: Path,
    step: int | None = None,
    tokenizer_model: Path | None = None,
    needs_tokenizer: bool = True,
    device: str | None = None,
) -> OpenedModel:
    """Open a run's checkpoint or an exported folder.

    Args:
        place: a run's checkpoints or an exported folder.
        step: the run's iteration (default: the newest).
        tokenizer_model: folder of a tokenizer to use instead of the model's own.
        needs_tokenizer: whether it is an error if there is no tokenizer, or a run's cannot be read.
        device: of an exported model (default: the accelerator if there is one). A run's model is on the CPU.

    Raises:
        ConversionError: it is neither, or cannot be read.
    """
    tokenizer, saved = None, None
    if (place / "config.json").is_file():
        config = read_config(place)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = model_of(config, read_tensors(place, config)).to(where)  # type: ignore[arg-type]
        if tokenizer_model is not None:
            tokenizer = read_tokenizer(tokenizer_model, f"--tokenizer-model {tokenizer_model}", config)
        elif (place / "tokenizer_config.json").is_file():
            tokenizer = read_tokenizer(place, f"--load {place}", config)
    else:
        megatron_on_cpu()
        # Imported here because an exported folder does not need Megatron.
        from .source import open_run
        from .weights import read

        checkpoint, args, config = open_run(place, step)
        try:
            tokenizer = tokenizer_of(args, tokenizer_model, config)
        except ConversionError as error:
            if needs_tokenizer or tokenizer_model is not None:
                raise
            print(f"{error} Tokens stay numbers.", file=sys.stderr)
        model, saved = model_of(config, read(checkpoint, config)), checkpoint.args
    if needs_tokenizer and tokenizer is None:
        raise ConversionError(f"--load {place}: has no tokenizer. Give one with --tokenizer-model.", "REMOE-E513")
    model.generation_config = generation_config(config, tokenizer)
    return OpenedModel(model, tokenizer, saved)
