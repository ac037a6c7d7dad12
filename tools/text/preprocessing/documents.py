"""Extract the texts from lines of JSON, and report lines that have none."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from megatron.remoe.files.errors import DataError

from .reading import LONGEST_LINE, Block

CHARACTERS_SHOWN = 80


class Problem(NamedTuple):
    """A line without a document: `kind` for counting, `message` with file, line number and first characters."""

    kind: str
    message: str


def parse_documents(block: Block, keys: Sequence[str], skip_bad: bool) -> tuple[dict[str, list[str]], list[Problem]]:
    """Return the texts of a block's good lines, by key, and the problems of the others.

    Args:
        block: lines.
        keys: names of the JSON fields that hold text; a line that lacks one gives no document for any.
        skip_bad: collect the problems instead of raising the first.

    Raises:
        DataError: the first bad line, unless `skip_bad`.
    """
    documents: dict[str, list[str]] = {key: [] for key in keys}
    problems = []
    for number, line in enumerate(block.lines, start=block.first_line):
        texts = _read_texts(line, keys)
        if isinstance(texts, list):
            for key, text in zip(keys, texts, strict=True):
                documents[key].append(text)
            continue
        kind, detail = texts
        start = line[: 4 * CHARACTERS_SHOWN].decode("utf-8", errors="backslashreplace").rstrip("\n")
        shown = repr(start[:CHARACTERS_SHOWN]) + ("…" if len(start) > CHARACTERS_SHOWN else "")
        message = f"{block.source}, line {number}: {kind}{detail}: {shown}"
        if not skip_bad:
            raise DataError(f"{message}\nCorrect it, or give --on-error skip to leave out lines that cannot be read.")
        problems.append(Problem(kind, message))
    return documents, problems


def _read_texts(line: bytes, keys: Sequence[str]) -> list[str] | tuple[str, str]:
    """Return the texts of a line; else what is wrong with it: its kind and details."""
    if len(line) > LONGEST_LINE:
        return f"longer than {LONGEST_LINE >> 20} MiB", ". Is this .jsonl, with one document per line?"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return "not UTF-8", f" (byte {error.start + 1})"
    except (ValueError, RecursionError) as error:
        return ("not JSON", f" ({error})") if line.strip() else ("blank line", "")
    if not isinstance(record, dict):
        return "not a JSON object", ""
    texts = []
    for key in keys:
        if key not in record:
            return "key missing", f": no {key!r} among {', '.join(map(repr, record)) or 'no keys'}"[:200]
        text = record[key]
        if not isinstance(text, str):
            return "text not a string", f": {key!r}"
        try:
            # An escape can bring half a character, which no tokenizer accepts.
            text.isascii() or text.encode("utf-8")
        except UnicodeEncodeError as error:
            return "text not Unicode", f": {key!r} has half a character (\\u{ord(text[error.start]):x})"
        texts.append(text)
    return texts
