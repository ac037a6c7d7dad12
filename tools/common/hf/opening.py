"""A model to work with: from a run's checkpoints or from an exported folder."""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeForCausalLM

from ..errors import ConversionError
from ..on_cpu import megatron_on_cpu


def open_model(
    place: Path, step: int | None = None, tokenizer_model: Path | None = None, needs_tokenizer: bool = True
) -> tuple[RemoeForCausalLM, PreTrainedTokenizerBase | None]:
    """The model, for evaluation, and its tokenizer.

    A folder goes to the accelerator where there is one, the checkpoints of a run to the CPU.

    Args:
        place: a run's checkpoints or an exported folder.
        step: the run's iteration (default: the newest).
        tokenizer_model: folder of another tokenizer than its own.
        needs_tokenizer: whether to stop where that of a run cannot be read, and not only say so.

    Raises:
        ConversionError: it is neither, or cannot be read.
    """
    transformers.utils.logging.disable_progress_bar()
    if not (place / "config.json").is_file():
        return _open_run(place, step, tokenizer_model, needs_tokenizer)
    try:
        model = RemoeForCausalLM.from_pretrained(place, local_files_only=True, dtype="auto")
        has_tokenizer = tokenizer_model is not None or (place / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_model or place) if has_tokenizer else None
    except (OSError, ValueError) as error:
        raise ConversionError(f"--load {place}: cannot be read ({str(error).splitlines()[0]}).") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _open_run(
    place: Path, step: int | None, tokenizer_model: Path | None, needs_tokenizer: bool
) -> tuple[RemoeForCausalLM, PreTrainedTokenizerBase | None]:
    megatron_on_cpu()
    # An exported folder needs nothing of Megatron.
    from .source import model_of, open_run
    from .tokenizer import set_tokens, tokenizer_of

    checkpoint, args, config = open_run(place, step)
    try:
        tokenizer = tokenizer_of(args, tokenizer_model)
        if tokenizer is not None:
            set_tokens(config, tokenizer)
    except ConversionError as error:
        if needs_tokenizer or tokenizer_model is not None:
            raise
        print(f"{error} Tokens are told by their numbers alone.", file=sys.stderr)
        tokenizer = None
    return model_of(checkpoint, config), tokenizer
