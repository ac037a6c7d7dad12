"""Write small Megatron data sets of bytes: a token per byte, and one at the end of each document."""

import asyncio
import itertools
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy

from megatron.remoe.files.indexed import IndexedWriter
from tools.console.errors import ToolError
from tools.text.corpora import corpus

END_OF_DOCUMENT = 256


def write_documents(prefix: Path, documents: list[bytes]) -> None:
    """Write documents to `{prefix}.bin` and `.idx`; empty ones have no token at all."""
    tokens = [numpy.array([*text, END_OF_DOCUMENT] if text else [], dtype=numpy.uint16) for text in documents]
    write_tokens(prefix, numpy.concatenate(tokens), [len(document) for document in tokens])


def write_tokens(prefix: Path, ids: numpy.ndarray, lengths: list[int]) -> None:
    """Write token ids, in their own type, as documents of these lengths."""
    with IndexedWriter(prefix, ids.dtype) as writer:
        writer.add(ids, numpy.array(lengths))
        writer.finish()
        writer.publish()


def real_text() -> list[bytes]:
    """Read the standard library's asyncio package, a document per file."""
    return [path.read_bytes() for path in sorted(Path(asyncio.__file__).parent.glob("*.py"))]


def _unavailable() -> NoReturn:
    raise ToolError("no network")


def write_small_corpus(folder: Path) -> None:
    """Write a few documents of the mixed corpus; its tools accept them as the whole corpus."""
    sources = {"code": corpus.code_documents, "docs": corpus.docs_documents}
    few = {name: partial(itertools.islice, source(), 50) for name, source in sources.items()}
    folder.parent.mkdir(parents=True)
    corpus.build(folder, {**few, "drama": _unavailable})
