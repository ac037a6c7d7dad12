"""Turn .jsonl into Megatron's .bin/.idx: read blocks, encode them on threads, write them in order."""

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import IndexedWriter, bin_path, idx_path, token_type

from ...console.display import show_step
from .encoding import Encoded, TextEncoder
from .reading import Block, expand_inputs, parse_documents, read_blocks

# More threads do not help: Python parses JSON on one core at a time, and that becomes the limit.
MOST_THREADS = 8
MB = 10**6


@dataclass(frozen=True)
class Job:
    """The settings of a preprocessing run, which are the flags of tools/preprocess_data.py."""

    inputs: Sequence[str]
    output_prefix: str
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    workers: int = 1

    def prefix(self, key: str) -> Path:
        """Return the prefix of the data set with this key's texts, named as in Megatron-LM's tool."""
        return Path(f"{self.output_prefix}_{key}_document")


@dataclass
class Summary:
    """Counts of a run: bytes of the lines, documents, those without a token, and tokens of all keys."""

    text_bytes: int = 0
    documents: int = 0
    empty: int = 0
    tokens: int = 0


EncodedBlock = tuple[Block, dict[str, Encoded]]  # tokens by key


def preprocess(job: Job, encoder: TextEncoder) -> Summary:
    """Run a job. The outputs appear only when all of them are complete. A terminal shows the megabytes read.

    Raises:
        DataError: wrong input or output, or nothing to write; no output was made or changed.
        OSError: the outputs could not be written; none was made or changed.
    """
    paths = expand_inputs(job.inputs)
    for prefix in map(job.prefix, job.json_keys):
        # A run that was killed while publishing leaves one file without the other.
        if bin_path(prefix).exists() and idx_path(prefix).exists():
            raise DataError(f"{bin_path(prefix)} exists. Remove it, or give a different --output-prefix.", "REMOE-E105")
    if job.append_eod and encoder.end_of_document is None:
        raise DataError("--append-eod: the tokenizer has no token that ends a document. Leave the flag out.")
    summary, read = Summary(), 0
    job.prefix(job.json_keys[0]).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        dtype = token_type(encoder.vocabulary_size)
        writers = {key: stack.enter_context(IndexedWriter(job.prefix(key), dtype)) for key in job.json_keys}
        advance = stack.enter_context(show_step("MB", sum(map(os.path.getsize, paths)) // MB))
        for block, tokens in stack.enter_context(closing(_encoded_blocks(paths, job, encoder))):
            for key, encoded in tokens.items():
                writers[key].add(encoded.ids, encoded.lengths)
                if key == job.json_keys[0]:
                    summary.empty += int(np.count_nonzero(encoded.lengths == 0))
            summary.text_bytes += sum(map(len, block.lines))
            advance(block.done_bytes // MB - read // MB)
            read = block.done_bytes
        summary.documents = writers[job.json_keys[0]].documents
        summary.tokens = sum(writer.tokens for writer in writers.values())
        for key, writer in writers.items():
            if not writer.tokens:
                raise DataError(f"--input: nothing to write: no text of key {key!r} has a token.")
            writer.finish()
        for writer in writers.values():
            writer.publish()
    return summary


def _encoded_blocks(paths: Sequence[str], job: Job, encoder: TextEncoder) -> Generator[EncodedBlock, None, None]:
    """Yield the blocks in order, encoded on threads; read ahead just enough to keep the threads busy."""
    threads = min(job.workers, MOST_THREADS)
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[EncodedBlock]] = deque()
    try:
        for block in read_blocks(paths):
            pending.append(pool.submit(_encode_block, block, job, encoder))
            if len(pending) > threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_block(block: Block, job: Job, encoder: TextEncoder) -> EncodedBlock:
    encoded = {}
    for key, texts in parse_documents(block, job.json_keys).items():
        result = encoder.encode(texts)
        if job.append_eod and encoder.end_of_document is not None:
            result = result.surrounded([], [encoder.end_of_document], result.lengths > 0)
        encoded[key] = Encoded(result.ids.astype(token_type(encoder.vocabulary_size)), result.lengths)
    return block, encoded
