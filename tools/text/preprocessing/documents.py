"""Extract the texts from lines of JSON, and report lines that have none."""

import json
from collections.abc import Sequence

from megatron.remoe.files.errors import DataError

from .reading import Block

CHARACTERS_SHOWN = 80


def parse_documents(block: Block, keys: Sequence[str], skip_bad: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Return the texts of a block's good lines, by key, and a message for each of the others.

    Args:
        block: lines.
        keys: names of the JSON fields that hold text; a line that lacks one gives no document for any.
        skip_bad: collect the messages instead of raising the first.

    Raises:
        DataError: the first bad line, unless `skip_bad`.
    """
    documents: dict[str, list[str]] = {key: [] for key in keys}
    problems = []
    for number, line in enumerate(block.lines, start=block.first_line):
        try:
            texts = _read_texts(line, keys)
        except (ValueError, RecursionError) as error:
            start = line[:CHARACTERS_SHOWN].decode("utf-8", errors="backslashreplace").rstrip("\n")
            message = f"{block.source}, line {number}: cannot be read ({str(error)[:200]}): {start!r}"
            if not skip_bad:
                remedy = "Correct it, or give --on-error skip to leave out lines that cannot be read."
                raise DataError(f"{message}\n{remedy}") from None
            problems.append(message)
        else:
            for key, text in zip(keys, texts, strict=True):
                documents[key].append(text)
    return documents, problems


def _read_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """Return the texts of a line.

    Raises:
        ValueError, RecursionError: the line is not UTF-8 or JSON, or a key has no text.
    """
    record = json.loads(line.decode("utf-8-sig"))
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for key in keys:
        if not isinstance(record.get(key), str):
            raise ValueError(f"no text with the key {key!r} among {', '.join(map(repr, record)) or 'no keys'}")
        record[key].encode()  # an escape can bring half a character, which no tokenizer accepts
    return [record[key] for key in keys]
