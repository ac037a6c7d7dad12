"""Convert a corpus to Megatron data sets, with bytes as tokens."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...console.errors import ToolError
from ...console.files import fingerprint, fingerprint_of_files, make_empty, read_stamp, write_json
from ...console.places import PACKAGE
from . import corpus, technical

MIXED, TECHNICAL = "mixed", "technical"
CORPORA: Mapping[str, Callable[[], corpus.Sources]] = {
    MIXED: lambda: corpus.SOURCES,
    TECHNICAL: technical.sources,
}
FOLDERS = {MIXED: Path("runs", "quickstart"), TECHNICAL: Path("runs", "quickstart-technical")}


def inputs(text: dict[str, Any]) -> str:
    """Return a fingerprint of the text and the code that the data sets are made from."""
    sources = [Path(__file__), *Path(__file__).parents[1].glob("preprocessing/*.py"), *PACKAGE.glob("files/*.py")]
    return fingerprint(text["inputs"], text["domains"], fingerprint_of_files(sources))


def build(folder: Path, corpus_folder: Path, text: dict[str, Any], threads: int) -> dict[str, Any]:
    """Write {folder}/{train,heldout}_{domain}_text_document.bin and .idx, or reuse them.

    Args:
        folder: for the data sets and their vocabulary.
        corpus_folder: the corpus.
        text: its manifest.
        threads: number of threads for encoding.

    Returns:
        The manifest: "inputs", "tokens" (part → domain → number of tokens), "reused".

    Raises:
        ToolError: preprocessing failed.
    """
    stamp = read_stamp(folder / "manifest.json", inputs(text))
    if stamp is not None:
        return stamp | {"reused": True}
    from megatron.remoe.files.errors import DataError
    from megatron.remoe.files.gpt2_files import byte_level_vocabulary

    from ..preprocessing.encoders import gpt2_encoder
    from ..preprocessing.pipeline import Job, preprocess

    make_empty(folder)
    encoder = gpt2_encoder(*byte_level_vocabulary(folder), threads)
    manifest: dict[str, Any] = {"inputs": inputs(text), "tokens": {"train": {}, "heldout": {}}, "reused": False}
    for part, tokens in manifest["tokens"].items():
        for domain in text["domains"]:
            source = str(corpus_folder / part / f"{domain}.jsonl")
            prefix = data_prefix(folder, part, domain).removesuffix("_text_document")
            try:
                done = preprocess(Job([source], prefix, append_eod=True, workers=threads), encoder)
            except DataError as error:
                raise ToolError(f"Preprocessing {domain}: {error}") from error
            tokens[domain] = done.tokens  # one for each byte and for each end of a document
    write_json(folder / "manifest.json", manifest)
    return manifest


def make_text(folder: Path, name: str, say: Callable[[str], None]) -> Path:
    """Build a corpus and its data sets, or reuse them, and return the data sets' folder."""
    text = corpus.build(folder / "corpus", say, name, CORPORA[name]())
    build(folder / "data", folder / "corpus", text, threads=1)
    return folder / "data"


def data_prefix(data: Path, part: str, domain: str) -> str:
    """Return the prefix of a .bin/.idx pair, as the preprocessing tool names it."""
    return str(data / f"{part}_{domain}_text_document")


def data_flags(data: Path, train_tokens: dict[str, int]) -> list[str]:
    """Return the flags for the text: training on all domains in proportion to their size, evaluation on each domain.

    Args:
        data: folder of the preprocessed text and its vocabulary.
        train_tokens: domain → number of training tokens.
    """
    weighted = [word for domain, n in train_tokens.items() for word in (str(n), data_prefix(data, "train", domain))]
    held_out = [data_prefix(data, "heldout", domain) for domain in train_tokens]
    return [
        *("--tokenizer-type", "GPT2BPETokenizer"),
        *("--vocab-file", str(data / "vocab.json"), "--merge-file", str(data / "merges.txt")),
        *("--train-data-path", *weighted),
        *("--valid-data-path", *held_out),
        *("--validation-set-names", *train_tokens),
        *("--data-cache-path", str(data / "cache")),
    ]
