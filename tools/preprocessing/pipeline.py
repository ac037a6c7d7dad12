"""Turns .jsonl into Megatron's .bin/.idx: reads blocks, encodes them on threads, writes them in order."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron.remoe.data.errors import DataError
from megatron.remoe.data.indexed import IndexedReader, IndexedWriter, bin_path, idx_path, token_type

from .documents import Problem, parse_documents
from .encoding import Encoded, TextEncoder
from .reading import Block, Damage, InputReader, expand_inputs

# More threads bring nothing: taking the text out of JSON, which Python does on one core at a time, is the limit then.
MOST_THREADS = 8


@dataclass(frozen=True)
class Job:
    """What to preprocess, and how; the fields are the flags of tools/preprocess_data.py."""

    inputs: Sequence[str]
    output_prefix: str
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    workers: int = 1
    skip_bad: bool = False
    overwrite: bool = False

    @property
    def threads(self) -> int:
        """Number of threads that encode."""
        return min(self.workers, MOST_THREADS)

    def prefix(self, key: str) -> Path:
        """Prefix of the data set that holds this key's texts, named as Megatron-LM's tool does."""
        return Path(f"{self.output_prefix}_{key}_document")


@dataclass
class Progress:
    """How far a run is; bytes are those of the inputs as they lie on the disk."""

    total_bytes: int | None
    done_bytes: int = 0
    text_bytes: int = 0
    documents: int = 0
    empty: int = 0
    tokens: int = 0
    problems: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Work:
    block_bytes: int
    done_bytes: int
    encoded: dict[str, Encoded]
    last: dict[str, str]
    problems: list[Problem]


def preprocess(
    job: Job,
    encoder: TextEncoder,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_problem: Callable[[Problem], None] = lambda problem: None,
) -> Progress:
    """Do a job. The outputs appear only when all of them are whole and were read back.

    Args:
        on_progress: called after each block.
        on_problem: called for each line that is left out.

    Raises:
        DataError: wrong input or output, or nothing to write; no output was made or changed.
        OSError: the outputs could not be written; none was made or changed.
    """
    paths = expand_inputs(job.inputs)
    check_outputs(job)
    if job.append_eod and encoder.end_of_document is None:
        raise DataError("--append-eod: the tokenizer has no token that ends a document. Leave the flag out.")
    reader = InputReader(paths)
    progress = Progress(reader.total_bytes)
    dtype = token_type(encoder.vocabulary_size)
    last: dict[str, str] = {}
    with ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(job.prefix(key), dtype)) for key in job.json_keys}
        for work in stack.enter_context(closing(_work_on(reader, job, encoder, dtype))):
            for key, encoded in work.encoded.items():
                writers[key].add(encoded.ids, encoded.lengths)
                progress.empty += int(np.count_nonzero(encoded.lengths == 0))
            last.update(work.last)
            for problem in work.problems:
                progress.problems[problem.kind] += 1
                on_problem(problem)
            progress.text_bytes += work.block_bytes
            progress.done_bytes = work.done_bytes
            progress.documents = writers[job.json_keys[0]].documents
            progress.tokens = sum(writer.tokens for writer in writers.values())
            on_progress(progress)
        for key, writer in writers.items():
            if not writer.tokens:
                raise DataError(f"--input: nothing to write: no text of key {key!r} has a token.")
            writer.finish()
            _read_back(writer, encoder, job, last[key])
        for writer in writers.values():
            writer.publish()
    return progress


def check_outputs(job: Job) -> None:
    """Refuse to overwrite outputs without leave, and to write where there is no folder.

    Raises:
        DataError: with the path and the remedy.
    """
    if len(set(job.json_keys)) != len(job.json_keys):
        raise DataError(f"--json-keys {' '.join(job.json_keys)}: a key is given twice.")
    for key in job.json_keys:
        prefix = job.prefix(key)
        if not prefix.parent.is_dir():
            raise DataError(f"--output-prefix {job.output_prefix}: there is no folder {prefix.parent}. Make it first.")
        # One without the other is what a run leaves that was killed while it published them.
        if bin_path(prefix).exists() and idx_path(prefix).exists() and not job.overwrite:
            raise DataError(f"{bin_path(prefix)} is there already. Give --overwrite, or another --output-prefix.")


def _work_on(reader: InputReader, job: Job, encoder: TextEncoder, dtype: np.dtype) -> Generator[_Work, None, None]:
    """The blocks in order, encoded on threads; no more of them are read ahead than keeps the threads busy."""
    pool = ThreadPoolExecutor(job.threads)
    pending: deque[Future[_Work]] = deque()
    try:
        for block in reader:
            pending.append(pool.submit(_encode_block, block, reader.done_bytes, job, encoder, dtype))
            if len(pending) > job.threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_block(block: Block | Damage, done_bytes: int, job: Job, encoder: TextEncoder, dtype: np.dtype) -> _Work:
    documents = parse_documents(block, job.json_keys, job.skip_bad)
    encoded, last = {}, {}
    for key, texts in documents.texts.items():
        result = encoder.encode(texts)
        if job.append_eod and encoder.end_of_document is not None:
            result = result.surrounded([], [encoder.end_of_document], result.lengths > 0)
        encoded[key] = Encoded(result.ids.astype(dtype), result.lengths)
        if len(filled := np.flatnonzero(result.lengths)):
            last[key] = texts[filled[-1]]
    size = len(block.data) if isinstance(block, Block) else 0
    return _Work(size, done_bytes, encoded, last, documents.problems)


def _read_back(writer: IndexedWriter, encoder: TextEncoder, job: Job, last_text: str) -> None:
    """Check what was written, before it is put in its place."""
    data = IndexedReader(writer.aside)
    last = int(np.flatnonzero(np.diff(data.bounds))[-1])
    ids = data.document(last)
    if job.append_eod:
        ids = ids[:-1]
    same = np.array_equal(ids, encoder.encode_by_reference([last_text]).ids)
    if (data.documents, data.tokens) != (writer.documents, writer.tokens) or not same:
        raise DataError(
            f"{job.prefix(job.json_keys[0]).parent}: what was read back is not what was written "
            f"({data.documents} of {writer.documents} documents, {data.tokens} of {writer.tokens} tokens, "
            f"last document {'the same' if same else 'another'}). Check the disk."
        )
