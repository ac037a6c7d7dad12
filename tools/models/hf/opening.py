"""Open a model: a run's checkpoint or an exported folder."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM

from ...console.errors import ConversionError, ToolError
from ..on_cpu import megatron_on_cpu
from .folder import read_folder
from .tokenizer import find_folder_tokenizer, find_training_tokenizer, generation_config

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class Run(NamedTuple):
    """A run's model as Megatron loads it.

    Attributes:
        model: a GPTModel or HybridModel in float32, without optimizer.
        saved: Megatron's arguments as saved.
        args: complete arguments of the GPTModel that computes the same.
        config: for transformers; λ is that of the checkpoint.
        name: for messages.
    """

    model: "GPTModel"
    saved: argparse.Namespace
    args: argparse.Namespace
    config: RemoeConfig
    name: str


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


def open_run(root: Path, step: int | None) -> Run:
    """Load a run's newest checkpoint, or the one of an iteration, with Megatron.

    Layers of multi-token prediction are left out: the model's logits do not need them.

    Raises:
        ConversionError: there is no checkpoint, it cannot be read, or its model cannot be expressed.
    """
    megatron_on_cpu()
    # Imported here because an exported folder does not need Megatron.
    from ..checkpoints import find, load
    from ..hybrid import as_gpt
    from ..megatron_model import build, one_process
    from .settings import complete, make_config

    checkpoint = find(root, step)
    saved = complete(checkpoint.args)
    saved.mtp_num_layers = None
    if saved.hybrid_layer_pattern:
        saved.hybrid_layer_pattern = saved.hybrid_layer_pattern.split("/")[0]
    args = as_gpt(saved, checkpoint.folder)
    config = make_config(args)
    with one_process():
        model = build(saved)
        load(checkpoint, model)
    if args.num_experts and args.moe_relu_routing:
        exponents = [int(value) for name, value in model.state_dict().items() if name.endswith("router.l1_exponent")]
        config.router_aux_loss_coef *= args.moe_relu_l1_reg_coeff_multiplier ** max(exponents, default=0)
    return Run(model, checkpoint.args, args, config, checkpoint.name)


def open_model(
    place: Path, step: int | None = None, tokenizer_model: Path | None = None, needs_tokenizer: bool = True
) -> OpenedModel:
    """Open a run's checkpoint, on the CPU, or an exported folder, on the accelerator if there is one.

    Args:
        place: a run's checkpoints or an exported folder.
        step: the run's iteration (default: the newest).
        tokenizer_model: folder of a tokenizer to use instead of the model's own.
        needs_tokenizer: whether it is an error if there is no tokenizer, or a run's cannot be read.

    Raises:
        ConversionError: it is neither, or cannot be read.
    """
    tokenizer, saved = None, None
    if (place / "config.json").is_file():
        model = read_folder(place, (RemoeConfig.model_type,))
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = find_folder_tokenizer(place, tokenizer_model, model.config)
    else:
        run = open_run(place, step)
        from .weights import convert_model

        try:
            tokenizer = find_training_tokenizer(run.args, tokenizer_model, run.config)
        except ConversionError as error:
            if needs_tokenizer or tokenizer_model is not None:
                raise
            print(f"{error} Tokens stay numbers.", file=sys.stderr)
        model, saved = convert_model(run.model, run.config), run.saved
    if needs_tokenizer and tokenizer is None:
        raise ConversionError(f"--load {place}: has no tokenizer. Give one with --tokenizer-model.", "REMOE-E513")
    model.generation_config = generation_config(model.config, tokenizer)
    return OpenedModel(model, tokenizer, saved)
