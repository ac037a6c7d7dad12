"""Choose the encoder by --tokenizer-type, --vocab-file, --merge-file and --tokenizer-model."""

from pathlib import Path
from typing import Any

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.gpt2_files import END_OF_TEXT, FOLDER_TOKENIZER, GPT2_TOKENIZER, read_gpt2_vocabulary

from .encoding import TextEncoder

TOKENIZER_TYPES = (GPT2_TOKENIZER, FOLDER_TOKENIZER)


def load_encoder(
    tokenizer_type: str,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    tokenizer_model: str | None = None,
) -> TextEncoder:
    """Return the encoder with the ids of Megatron's tokenizer of this type.

    Raises:
        DataError: a flag is missing or does not name a tokenizer.
    """
    if tokenizer_type == GPT2_TOKENIZER:
        return gpt2_encoder(vocab_file, merge_file)
    if not tokenizer_model or vocab_file or merge_file:
        raise DataError(
            f"--tokenizer-type {tokenizer_type}: needs --tokenizer-model, a folder with the tokenizer's files, and "
            "neither --vocab-file nor --merge-file.",
            "REMOE-E513",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_model)
        reference = tokenizer.backend_tokenizer
    except Exception as error:  # transformers raises many types; tokenizers without a fast version have no backend
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"--tokenizer-model {tokenizer_model}: transformers cannot load a fast tokenizer from it ({reason}). "
            "Give a folder with tokenizer.json, or with vocab.json, merges.txt and tokenizer_config.json.",
            "REMOE-E513",
        ) from error
    reference.no_truncation()
    reference.no_padding()
    # Like Megatron: without an end-of-sequence token the separator ends documents.
    end_of_document = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return TextEncoder(reference, len(tokenizer), end_of_document)


def gpt2_encoder(vocab_file: Path | str | None, merge_file: Path | str | None) -> TextEncoder:
    """Return the encoder of a GPT-2 vocabulary."""
    tokenizer = read_gpt2_vocabulary(vocab_file, merge_file)
    return TextEncoder(tokenizer, tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT))
