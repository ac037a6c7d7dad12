"""Choose the encoder by --tokenizer-type, --vocab-file, --merge-file and --tokenizer-model."""

from pathlib import Path
from typing import Any

from megatron.remoe.data.errors import DataError
from megatron.remoe.data.gpt2_files import END_OF_TEXT, FOLDER_TOKENIZER, GPT2_TOKENIZER, read_gpt2_vocabulary

from .encoding import TextEncoder

TOKENIZER_TYPES = (GPT2_TOKENIZER, FOLDER_TOKENIZER)


def load_encoder(
    tokenizer_type: str,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    tokenizer_model: str | None = None,
    threads: int = 1,
    split_special_tokens: bool = False,
) -> TextEncoder:
    """Return the encoder with the ids of Megatron's tokenizer of this type.

    Raises:
        DataError: a flag is missing or does not name a tokenizer.
    """
    if tokenizer_type == GPT2_TOKENIZER:
        return gpt2_encoder(vocab_file, merge_file, threads, split_special_tokens)
    if not tokenizer_model:
        raise DataError(
            f"--tokenizer-type {tokenizer_type} needs --tokenizer-model: a folder with the tokenizer's files.",
            "REMOE-E513",
        )
    if vocab_file or merge_file:
        raise DataError(
            f"--vocab-file and --merge-file are for --tokenizer-type {GPT2_TOKENIZER}; "
            f"{tokenizer_type} reads everything from --tokenizer-model. Leave them out.",
            "REMOE-E501",
        )
    return folder_encoder(tokenizer_model, threads, split_special_tokens)


def gpt2_encoder(
    vocab_file: Path | str | None, merge_file: Path | str | None, threads: int = 1, split_special_tokens: bool = False
) -> TextEncoder:
    """Return the encoder of a GPT-2 vocabulary."""
    tokenizer = read_gpt2_vocabulary(vocab_file, merge_file)
    end_of_document = tokenizer.token_to_id(END_OF_TEXT)
    return TextEncoder(tokenizer, tokenizer.get_vocab_size(), end_of_document, threads, split_special_tokens)


def folder_encoder(tokenizer_model: str, threads: int = 1, split_special_tokens: bool = False) -> TextEncoder:
    """Return the encoder of what transformers' AutoTokenizer loads from a folder, or from the hub by name."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_model)
    except Exception as error:  # transformers raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"--tokenizer-model {tokenizer_model}: transformers cannot load a tokenizer from it ({reason}). "
            "Give a folder with tokenizer.json, or with vocab.json, merges.txt and tokenizer_config.json.",
            "REMOE-E513",
        ) from error
    reference = getattr(tokenizer, "backend_tokenizer", None)
    if reference is None:
        raise DataError(
            f"--tokenizer-model {tokenizer_model}: {type(tokenizer).__name__} has no fast version. "
            "Give a tokenizer with a tokenizer.json.",
            "REMOE-E513",
        )
    reference.no_truncation()
    reference.no_padding()
    # Like Megatron: without an end-of-sequence token the separator ends documents.
    end_of_document = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return TextEncoder(reference, len(tokenizer), end_of_document, threads, split_special_tokens)
