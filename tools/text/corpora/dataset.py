"""Convert a corpus to Megatron data sets, with bytes or subwords as tokens."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.remoe.files.files import write_text

from ...console.errors import ToolError
from ...console.files import fingerprint, fingerprint_of_code, read_stamp, recreate_folder, write_json
from ...console.places import PACKAGE
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


def inputs(text: dict[str, Any]) -> str:
    """Return a fingerprint of the text and the code that the data sets are made from."""
    sources = [Path(__file__), *Path(__file__).parents[1].glob("preprocessing/*.py"), *PACKAGE.glob("files/*.py")]
    return fingerprint(text["inputs"], text["domains"], fingerprint_of_code(sources))


def build(folder: Path, corpus_folder: Path, text: dict[str, Any], threads: int, tokens: str = BYTES) -> dict[str, Any]:
    """Write {folder}/{train,heldout}_{domain}_text_document.bin and .idx, or reuse them.

    Args:
        folder: for the data sets and their vocabulary.
        corpus_folder: the corpus.
        text: the corpus's manifest.
        threads: number of threads for encoding.
        tokens: one of `TOKENS`.

    Returns:
        The manifest: "inputs", "reused", "tokens" (part → domain → number of tokens) and "bytes" (the same for bytes,
        with one more for the end of each document).

    Raises:
        ToolError: preprocessing failed.
    """
    stamp = read_stamp(folder / "manifest.json", inputs(text))
    if stamp is not None:
        return stamp | {"reused": True}
    from megatron.remoe.files.errors import DataError

    from ..preprocessing.encoding import gpt2_encoder
    from ..preprocessing.pipeline import Job, preprocess

    recreate_folder(folder)
    files = byte_level_vocabulary(folder) if tokens == BYTES else train_subwords(folder, corpus_folder / "train")
    encoder = gpt2_encoder(*files)
    manifest: dict[str, Any] = {"inputs": inputs(text), "tokens": {"train": {}, "heldout": {}}, "reused": False}
    manifest["bytes"] = {
        part: {name: sum(of_domain[part].values()) for name, of_domain in text["domains"].items()}
        for part in manifest["tokens"]
    }
    for part, of_part in manifest["tokens"].items():
        for domain in text["domains"]:
            source = str(corpus_folder / part / f"{domain}.jsonl")
            prefix = data_prefix(folder, part, domain).removesuffix("_text_document")
            try:
                done = preprocess(Job([source], prefix, append_eod=True, workers=threads), encoder)
            except DataError as error:
                raise ToolError(f"Preprocessing {domain}: {error}") from error
            of_part[domain] = done.tokens
    write_json(folder / "manifest.json", manifest)
    return manifest


def byte_level_vocabulary(folder: Path) -> tuple[Path, Path]:
    """Write a vocabulary of the 256 bytes and `<|endoftext|>`, without merges; return the paths as `train_subwords`."""
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


def make_text(folder: Path, name: str, say: Callable[[str], None], tokens: str = BYTES) -> Path:
    """Build a corpus and its data sets, or reuse them, and return the data sets' folder."""
    text = corpus.build(folder / "corpus", say, name, CORPORA[name]())
    build(folder / TOKENS[tokens], folder / "corpus", text, threads=1, tokens=tokens)
    return folder / TOKENS[tokens]


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
