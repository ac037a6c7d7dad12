"""Open a run's checkpoint or a folder of transformers. Code, pickles and adapters in a model are never used."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM

from ...console.errors import ConversionError, ToolError
from ...recipes.on_cpu import megatron_on_cpu
from ..measuring import check_finite, find_blocks
from .tokenizer import find_folder_tokenizer, find_training_tokenizer, generation_config

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class LoadedRun(NamedTuple):
    """A run's model as Megatron loads it.

    Attributes:
        model: a GPTModel or HybridModel in float32, without optimizer.
        saved: Megatron's arguments as saved.
        args: complete arguments of the GPTModel that computes the same.
        config: for transformers; λ is the checkpoint's.
        name: for messages.
    """

    model: "GPTModel"
    saved: argparse.Namespace
    args: argparse.Namespace
    config: RemoeConfig
    name: str


class OpenedModel(NamedTuple):
    """A model for evaluation, its tokenizer if it has one, and a run's saved arguments (None for a folder)."""

    model: RemoeForCausalLM
    tokenizer: PreTrainedTokenizerBase | None
    args: argparse.Namespace | None

    def layer_numbers(self) -> list[int]:
        """Return Megatron's numbers, from 1, of layers with experts; in a HybridModel, attention layers count too."""
        step = 2 if getattr(self.args, "hybrid_layer_pattern", None) else 1
        return [step * number for number in find_blocks(self.model)]

    def sequence_length(self, length: int | None) -> int:
        """Return --seq-length or, without it, the run's; for a folder, the model's context.

        Raises:
            ToolError: it is longer than the context.
        """
        context: int = self.model.config.max_position_embeddings
        if (length or 0) > context:
            raise ToolError(f"--seq-length {length}: give at most the model's context, {context}.", "REMOE-E501")
        return length or min(getattr(self.args, "seq_length", None) or context, context)


def read_folder(folder: Path, dtype: torch.dtype | None = None) -> RemoeForCausalLM:
    """Return the model in an exported folder, for evaluation on the CPU.

    Args:
        folder: written by `save_pretrained`.
        dtype: of the weights (None: as stored).

    Raises:
        ConversionError: a file is missing or damaged; the model is unknown or quantized; a tensor is missing,
            unexpected, has a different shape than config.json calls for, or holds NaN or infinity.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder}: has no config.json. Give a folder that save_pretrained has written.")
    if (folder / "adapter_config.json").exists():
        raise ConversionError(f"{folder}: holds an adapter. Merge it into the model and save that.")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    logging.set_verbosity(logging.CRITICAL)  # a problem becomes one error below
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if config.model_type != RemoeConfig.model_type or getattr(config, "quantization_config", None):
            raise ConversionError(f"{path}: is of {config.model_type!r:.40}, and must be of an unquantized remoe.")
        options |= {"config": config, "dtype": dtype or "auto", "use_safetensors": True}
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        options["generation_config"] = GenerationConfig()  # so the folder's, and its code for generation, are not read
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except ConversionError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ConversionError(f"{folder}: cannot be read ({reason}). Export or copy the model again.") from error
    model, report = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(name if isinstance(name, str) else name[0] for name in report[f"{kind}_keys"]):
            raise ConversionError(
                f"{folder}: {len(names)} tensors are {kind} for the model of config.json, the first is {names[0]}. "
                "Export or copy the model again."
            )
    check_finite(str(folder), model.state_dict())
    model.config.dtype = config.dtype or model.config.dtype  # as stored, whatever `dtype` is
    return model.eval()


def open_run(root: Path, step: int | None) -> LoadedRun:
    """Load a run's newest checkpoint, or that of a given iteration, with Megatron.

    Layers of multi-token prediction are left out: the model's logits do not need them.

    Raises:
        ConversionError: there is no checkpoint, it cannot be read, or the model for transformers cannot express it.
    """
    megatron_on_cpu()
    # Imported here because an exported folder does not need Megatron.
    from ..checkpoints import find, load
    from ..hybrid import as_gpt
    from ..megatron_model import build, one_process
    from .settings import complete, make_config

    checkpoint = find(root, step)
    completed = complete(checkpoint.args)
    completed.mtp_num_layers = None
    if completed.hybrid_layer_pattern:
        completed.hybrid_layer_pattern = completed.hybrid_layer_pattern.split("/")[0]
    args = as_gpt(completed, checkpoint.folder)
    config = make_config(args)
    with one_process():
        model = build(completed)
        load(checkpoint, model)
    if args.num_experts and args.moe_relu_routing:
        exponents = [int(value) for name, value in model.state_dict().items() if name.endswith("router.l1_exponent")]
        config.router_aux_loss_coef *= args.moe_relu_l1_reg_coeff_multiplier ** round(sum(exponents) / len(exponents))
    return LoadedRun(model, checkpoint.args, args, config, checkpoint.name)


def open_model(
    place: Path, step: int | None = None, tokenizer_model: Path | None = None, needs_tokenizer: bool = True
) -> OpenedModel:
    """Open a run's checkpoint on the CPU, or an exported folder on the accelerator if there is one.

    Args:
        place: a run's checkpoints or an exported folder.
        step: the run's iteration (default: the newest).
        tokenizer_model: folder of a tokenizer to use instead of the model's own.
        needs_tokenizer: whether it is an error if there is no tokenizer, or a run's tokenizer cannot be read.

    Raises:
        ConversionError: `place` is neither or cannot be read, or the tokenizer is missing or cannot be read.
    """
    tokenizer, saved = None, None
    if (place / "config.json").is_file():
        if step is not None:
            raise ConversionError(f"--ckpt-step {step}: {place} is an exported folder. Leave it out.")
        model = read_folder(place)
        torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
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
