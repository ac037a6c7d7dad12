"""Convert a corpus to Megatron data sets, with bytes or subwords as tokens."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.remoe.files.files import write_text

from ...console.errors import ToolError
from ...console.files import read_json, write_json
from . import corpus, python_packages, technical

MIXED, TECHNICAL, BROAD = "mixed", "technical", "broad"
CORPORA: Mapping[str, Callable[[], corpus.Sources]] = {
    MIXED: lambda: corpus.SOURCES,
    TECHNICAL: technical.sources,
    BROAD: lambda: {**corpus.SOURCES, **technical.sources(), **python_packages.sources()},
}
BYTES, SUBWORDS = "bytes", "subwords"
TOKENS = {BYTES: "data", SUBWORDS: "data-subwords"}  # kind of tokens → folder of the data sets next to the corpus
SUBWORD_ENTRIES = 4096  # size of a byte-level BPE that is trained on the training text
FOLDERS = {
    MIXED: Path("runs", "quickstart"),
    TECHNICAL: Path("runs", "quickstart-technical"),
    BROAD: Path("runs", "quickstart-broad"),
}


def build(folder: Path, corpus_folder: Path, text: dict[str, Any], tokens: str = BYTES) -> None:
    """Write {folder}/{train,heldout}_{domain}_text_document.bin and .idx and a manifest, or keep those of this text.

    The manifest has "inputs" (SHA-256 of the data sets), "tokens" (part → domain → number of tokens) and "bytes" (the
    same for bytes, with one more for the end of each document).

    Args:
        folder: for the data sets and their vocabulary.
        corpus_folder: the corpus.
        text: the corpus's manifest.
        tokens: one of `TOKENS`.

    Raises:
        ToolError: preprocessing failed.
    """
    manifest: dict[str, Any] = {"tokens": {"train": {}, "heldout": {}}}
    manifest["bytes"] = {
        part: {name: sum(parts[part].values()) for name, parts in text["domains"].items()}
        for part in manifest["tokens"]
    }
    if read_json(folder / "manifest.json").get("bytes") == manifest["bytes"]:
        return
    from megatron.remoe.files.errors import DataError

    from ..preprocessing.encoding import gpt2_encoder
    from ..preprocessing.pipeline import Job, preprocess

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = byte_level_vocabulary(folder) if tokens == BYTES else train_subwords(folder, corpus_folder / "train")
    encoder = gpt2_encoder(*files)
    for part, counts in manifest["tokens"].items():
        for domain in text["domains"]:
            source = str(corpus_folder / part / f"{domain}.jsonl")
            prefix = data_prefix(folder, part, domain).removesuffix("_text_document")
            try:
                done = preprocess(Job([source], prefix, append_eod=True, workers=1), encoder)
            except DataError as error:
                raise ToolError(f"Preprocessing {domain}: {error}") from error
            counts[domain] = done.tokens
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*_text_document.*")):
        digest.update(path.read_bytes())
    write_json(folder / "manifest.json", {"inputs": digest.hexdigest()} | manifest)


def byte_level_vocabulary(folder: Path) -> tuple[Path, Path]:
    """Write a vocabulary of the 256 bytes and `<|endoftext|>`, without merges; return both paths."""
    from tokenizers import pre_tokenizers

    from megatron.remoe.files.gpt2_files import END_OF_TEXT

    folder.mkdir(parents=True, exist_ok=True)
    tokens = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT])}
    files = {"vocab.json": json.dumps(tokens, ensure_ascii=False), "merges.txt": "#version: 0.2"}
    for name, text in files.items():
        write_text(folder / name, text + "\n")
    return folder / "vocab.json", folder / "merges.txt"


def train_subwords(folder: Path, texts: Path) -> tuple[Path, Path]:
    """Train a byte-level BPE of `SUBWORD_ENTRIES` entries; return folder/vocab.json and folder/merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    from megatron.remoe.files.gpt2_files import END_OF_TEXT

    def documents() -> Iterator[str]:
        for path in sorted(texts.glob("*.jsonl")):
            with path.open(encoding="utf-8") as file:
                yield from (json.loads(line)["text"] for line in file)

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents(), SUBWORD_ENTRIES, show_progress=False, special_tokens=[END_OF_TEXT])
    vocabulary, merges = tokenizer.save_model(str(folder))
    return Path(vocabulary), Path(merges)


def make_text(folder: Path, name: str, tokens: str = BYTES) -> Path:
    """Build a corpus and its data sets, or keep those of any version, and return the data sets' folder."""
    text = corpus.build(folder / "corpus", CORPORA[name]())
    build(folder / TOKENS[tokens], folder / "corpus", text, tokens)
    return folder / TOKENS[tokens]


def missing_domains(folder: Path) -> list[str]:
    """Return a sentence for each domain that the corpus in a folder lacks: the reason, and the remedy."""
    missing = read_json(folder / "corpus" / "manifest.json").get("missing", {})
    return [f"No {name}: {reason} To try again, remove {folder / 'corpus'}." for name, reason in missing.items()]


def data_prefix(data: Path, part: str, domain: str) -> str:
    """Return the prefix of a .bin/.idx pair, as the preprocessing tool names it."""
    return str(data / f"{part}_{domain}_text_document")


def vocabulary_flags(data: Path) -> list[str]:
    """Return the flags for the tokenizer in a data sets' folder."""
    files = ["--vocab-file", str(data / "vocab.json"), "--merge-file", str(data / "merges.txt")]
    return ["--tokenizer-type", "GPT2BPETokenizer", *files]


def weighted_training_sets(data: Path, train_tokens: Mapping[str, int]) -> list[str]:
    """Return weights and prefixes of the training text; all domains count in proportion to their size."""
    return [word for domain, n in train_tokens.items() for word in (str(n), data_prefix(data, "train", domain))]


def data_flags(data: Path, train_tokens: Mapping[str, int]) -> list[str]:
    """Return the flags for the text: training on all domains, evaluation on all held-out text of each domain.

    Args:
        data: folder of the preprocessed text and its vocabulary.
        train_tokens: domain → number of training tokens.
    """
    return [
        *vocabulary_flags(data),
        *("--train-data-path", *weighted_training_sets(data, train_tokens)),
        *("--valid-data-path", *(data_prefix(data, "heldout", domain) for domain in train_tokens)),
        *("--validation-set-names", *train_tokens),
        *("--multiple-validation-sets", "--full-validation"),
    ]
