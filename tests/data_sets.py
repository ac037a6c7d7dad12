"""Write small Megatron data sets of bytes: a token per byte, and one at the end of each document."""

import asyncio
from pathlib import Path

import numpy

from megatron.remoe.data.indexed import IndexedWriter

END_OF_DOCUMENT = 256


def write_documents(prefix: Path, documents: list[bytes]) -> None:
    """Write documents to `{prefix}.bin` and `.idx`."""
    tokens = [numpy.array([*document, END_OF_DOCUMENT], dtype=numpy.uint16) for document in documents]
    with IndexedWriter(prefix, numpy.dtype(numpy.uint16)) as writer:
        writer.add(numpy.concatenate(tokens), numpy.array([len(document) for document in tokens]))
        writer.finish()
        writer.publish()


def real_text() -> list[bytes]:
    """Read the standard library's asyncio package, a document per file."""
    return [path.read_bytes() for path in sorted(Path(asyncio.__file__).parent.glob("*.py"))]


def write_real_text(prefix: Path) -> None:
    """Write the documents of `real_text`."""
    write_documents(prefix, real_text())
