"""The tokenizer of a training, for transformers."""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron.remoe.data.errors import DataError
from megatron.remoe.data.gpt2_files import FOLDER_TOKENIZER, GPT2_TOKENIZER
from megatron.remoe.hf import RemoeConfig
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder

from ..errors import ConversionError


def tokenizer_of(args: argparse.Namespace, given: Path | None) -> PreTrainedTokenizerBase | None:
    """The training's tokenizer, or that in a folder, set up for generation; None if the training had none.

    Raises:
        ConversionError: it is not here, or transformers cannot read its kind.
    """
    remedy = "Give the folder of a Hugging Face tokenizer with --tokenizer-model."
    kind, place = args.tokenizer_type, given or args.tokenizer_model
    if given is None and kind == "NullTokenizer":
        return None
    if given is None and kind == GPT2_TOKENIZER and args.vocab_file and args.merge_file:
        try:
            place = gpt2_tokenizer_folder(args.vocab_file, args.merge_file)
        except DataError as error:
            raise ConversionError(f"--load: its tokenizer cannot be read ({error}) {remedy}") from error
    elif given is None and kind != FOLDER_TOKENIZER:
        raise ConversionError(f"--load: was trained with --tokenizer-type {kind}, which cannot be exported. {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(place), padding_side="left", model_max_length=args.max_position_embeddings
        )
    except (OSError, ValueError) as error:
        flag = "--tokenizer-model" if given else "--load: its --tokenizer-model"
        raise ConversionError(f"{flag} {place}: cannot be read ({str(error).splitlines()[0]}). {remedy}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def set_tokens(config: RemoeConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take over what begins and ends a text.

    Raises:
        ConversionError: the tokenizer has more tokens than the model.
    """
    if len(tokenizer) > config.vocab_size:
        raise ConversionError(
            f"--tokenizer-model: has {len(tokenizer)} tokens, and the model {config.vocab_size}. Give that of the "
            "training."
        )
    # Without pad_token_id: as the embedding's padding index that token would not be trained on.
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
