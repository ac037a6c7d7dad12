"""Read tokenizers for transformers, and make the settings for text generation."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.gpt2_files import FOLDER_TOKENIZER, GPT2_FILES, GPT2_TOKENIZER
from megatron.remoe.hf import RemoeConfig
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder

from ...console.errors import ConversionError

CODE = "REMOE-E513"
REMEDY = "Give the folder of a Hugging Face tokenizer, or of GPT-2's two files, with --tokenizer-model."


def read_tokenizer(folder: Path, name: str, config: RemoeConfig, **options: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder, without running its code or asking the user.

    Args:
        folder: has transformers' files, or only GPT-2's two.
        name: the flag and folder, for errors.
        config: of the model.
        options: for `AutoTokenizer.from_pretrained`.

    Raises:
        ConversionError: it cannot be read, or has more tokens than the model.
    """
    if not folder.is_dir():
        raise ConversionError(f"{name}: is not a folder. {REMEDY}", CODE)
    try:
        if gpt2_files := _gpt2_files(folder):
            folder = gpt2_tokenizer_folder(*gpt2_files)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
        size = len(tokenizer)
    except Exception as error:  # a damaged tokenizer.json raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"{name}: its tokenizer cannot be read ({reason}). {REMEDY}", CODE) from error
    if size > config.vocab_size:
        raise ConversionError(
            f"{name}: its tokenizer has {size} tokens, and the model {config.vocab_size}. Give the run's tokenizer.",
            CODE,
        )
    if tokenizer.eos_token is None:  # in training, the separator then ends documents
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _gpt2_files(folder: Path) -> list[Path]:
    """Return a folder's vocabulary and merges files if it has both and no file for transformers, else an empty list."""
    if any((folder / name).exists() for name in ("config.json", "tokenizer_config.json", "tokenizer.json")):
        return []
    pairs = ([folder / name for name in pair] for pair in GPT2_FILES)
    return next((pair for pair in pairs if all(path.is_file() for path in pair)), [])


def find_folder_tokenizer(folder: Path, other: Path | None, config: RemoeConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a model's folder, or in the `other` folder of --tokenizer-model; None if there is none.

    Raises:
        ConversionError: it cannot be read, or has more tokens than the model.
    """
    if other is None and not (folder / "tokenizer_config.json").is_file():
        return None
    return read_tokenizer(other or folder, f"--tokenizer-model {other}" if other else str(folder), config)


def find_training_tokenizer(
    args: argparse.Namespace, other: Path | None, config: RemoeConfig
) -> PreTrainedTokenizerBase | None:
    """Return the run's tokenizer, or that in the `other` folder, set up for generation; None if there is none.

    Sets `bos_token_id` and `eos_token_id` in the configuration.

    Raises:
        ConversionError: it is missing, transformers cannot read it, or it has more tokens than the model.
    """
    kind, place, files = args.tokenizer_type, other or args.tokenizer_model, (args.vocab_file, args.merge_file)
    if kind == FOLDER_TOKENIZER and hasattr(args, "gpt2_files") and not Path(place).is_dir():
        kind, files = GPT2_TOKENIZER, args.gpt2_files  # the folder was in the cache of a different machine
    if other is None and kind == "NullTokenizer":
        return None
    if other is None and kind == GPT2_TOKENIZER and all(files):
        try:
            place = gpt2_tokenizer_folder(*files)
        except DataError as error:
            raise ConversionError(f"--load: its tokenizer cannot be read ({error}) {REMEDY}", CODE) from error
    elif other is None and kind != FOLDER_TOKENIZER:
        raise ConversionError(
            f"--load: was trained with --tokenizer-type {kind}, which cannot be exported. {REMEDY}", CODE
        )
    name = f"--tokenizer-model {place}" if other else f"--load: its --tokenizer-model {place}"
    options = {"padding_side": "left", "model_max_length": args.max_position_embeddings}
    tokenizer = read_tokenizer(Path(place), name, config, **options)
    # Not pad_token_id: the embedding would not train that token.
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return tokenizer


def generation_config(config: RemoeConfig, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """Return settings that end and pad texts, and suppress the padding tokens of Megatron's vocabulary."""
    end = config.eos_token_id if tokenizer is None or config.eos_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(eos_token_id=end, pad_token_id=end[0] if isinstance(end, list) and end else end)
    if tokenizer is not None:
        settings.suppress_tokens = list(range(len(tokenizer), config.vocab_size)) or None
    return settings


def count_token_bytes(tokenizer: PreTrainedTokenizerBase, rows: int) -> torch.Tensor:
    """Return the number of bytes of text that each token stands for, int64 `[rows]`; 1 for special tokens."""
    vocabulary, special = tokenizer.get_vocab(), {*tokenizer.all_special_tokens}
    is_byte_level = vocabulary.keys() >= {*ByteLevel.alphabet()}  # a character of a token is then a byte
    lengths = [1] * rows
    for token, number in vocabulary.items():
        if token not in special and not re.fullmatch("<0x[0-9A-F]{2}>", token):
            lengths[number] = len(token if is_byte_level else token.replace("▁", " ").encode())
    return torch.tensor(lengths)
