"""Convert a corpus to Megatron data sets, with bytes as tokens."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common.errors import ToolError
from ..common.files import write_json
from ..common.places import PACKAGE
from . import corpus, models, stages, technical

MIXED, TECHNICAL = "mixed", "technical"
CORPORA: Mapping[str, Callable[[], corpus.Sources]] = {
    MIXED: lambda: corpus.SOURCES,
    TECHNICAL: technical.sources,
}
FOLDERS = {MIXED: Path("runs", "quickstart"), TECHNICAL: Path("runs", "quickstart-technical")}


def inputs(text: dict[str, Any]) -> str:
    """Return a fingerprint of the text and the code that the data sets are made from."""
    sources = [Path(__file__), *Path(__file__).parents[1].glob("preprocessing/*.py"), *PACKAGE.glob("data/*.py")]
    return stages.fingerprint(text["inputs"], text["domains"], stages.fingerprint_of_files(sources))


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
    stamp = stages.read_stamp(folder / "manifest.json", inputs(text))
    if stamp is not None:
        return stamp | {"reused": True}
    from megatron.remoe.data.errors import DataError
    from megatron.remoe.data.gpt2_files import byte_level_vocabulary

    from ..preprocessing.encoders import gpt2_encoder
    from ..preprocessing.pipeline import Job, preprocess

    stages.make_empty(folder)
    encoder = gpt2_encoder(*byte_level_vocabulary(folder), threads)
    manifest: dict[str, Any] = {"inputs": inputs(text), "tokens": {"train": {}, "heldout": {}}, "reused": False}
    for part, of_part in manifest["tokens"].items():
        for domain in text["domains"]:
            source = str(corpus_folder / part / f"{domain}.jsonl")
            prefix = models.data_prefix(folder, part, domain).removesuffix("_text_document")
            try:
                done = preprocess(Job([source], prefix, append_eod=True, workers=threads), encoder)
            except DataError as error:
                raise ToolError(f"Preprocessing {domain}: {error}") from error
            of_part[domain] = done.tokens  # one for each byte and for each end of a document
    write_json(folder / "manifest.json", manifest)
    return manifest


def make_text(folder: Path, name: str, say: Callable[[str], None]) -> Path:
    """Build a corpus and its data sets, or reuse them, and return the data sets' folder."""
    text = corpus.build(folder / "corpus", say, name, CORPORA[name]())
    build(folder / "data", folder / "corpus", text, threads=1)
    return folder / "data"


def predicted_tokens(tokens: int, sequence: int) -> int:
    """Return how many tokens an evaluation predicts: those of whole sequences that have a token after them."""
    return (tokens - 1) // sequence * sequence
