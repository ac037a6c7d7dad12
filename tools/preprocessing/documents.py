"""Take the texts out of lines of JSON, and say what is wrong with a line that has none."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.remoe.data.errors import DataError

from .reading import Block

CHARACTERS_SHOWN = 80
JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}


@dataclass(frozen=True)
class Problem:
    """A line without a document: `kind` for counting, `message` with file, line number and first characters."""

    kind: str
    message: str


class _BadLine(Exception):
    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


def parse_documents(block: Block, keys: Sequence[str], skip_bad: bool) -> tuple[dict[str, list[str]], list[Problem]]:
    """Return the texts of a block's good lines, by key, and the problems of the others.

    Args:
        block: whole lines.
        keys: names of the JSON fields that hold text; a line that lacks one gives no document for any.
        skip_bad: collect the problems instead of raising the first.

    Raises:
        DataError: the first bad line, unless `skip_bad`.
    """
    documents: dict[str, list[str]] = {key: [] for key in keys}
    problems = []

    def report(kind: str, message: str) -> None:
        if not skip_bad:
            raise DataError(f"{message}\nCorrect it, or give --on-error skip to leave out lines that cannot be read.")
        problems.append(Problem(kind, message))

    lines = _lines(block.data)
    for number, line in enumerate(lines, start=block.first_line):
        try:
            texts = _texts_of(line, keys)
        except _BadLine as bad:
            start = line[: CHARACTERS_SHOWN + 1]
            shown = start if isinstance(start, str) else start.decode("utf-8", errors="backslashreplace")
            shown = repr(shown[:CHARACTERS_SHOWN]) + ("…" if len(start) > CHARACTERS_SHOWN else "")
            report(bad.kind, f"{block.source}, line {number}: {bad.kind}{bad.detail}: {shown}")
        else:
            for key, text in zip(keys, texts, strict=True):
                documents[key].append(text)
    if block.damage:
        place = f"{block.source}, line {block.first_line + len(lines)}"
        report("damaged data", f"{place}: compressed data broken: {block.damage}.")
    return documents, problems


def _lines(data: bytes) -> Sequence[str | bytes]:
    lines: list[str] | list[bytes]
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = data.split(b"\n")  # each is decoded on its own, to find the bad ones
    if not lines[-1]:
        lines.pop()
    return lines


def _texts_of(line: str | bytes, keys: Sequence[str]) -> list[str]:
    try:
        record = json.loads(line if isinstance(line, str) else line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLine("not UTF-8", f" (byte {error.start + 1})") from None
    except (ValueError, RecursionError) as error:
        raise _BadLine("not JSON", f" ({error})") if line.strip() else _BadLine("blank line") from None
    if not isinstance(record, dict):
        raise _BadLine("not a JSON object", f" but {_json_type(record)}")
    texts = []
    for key in keys:
        if key not in record:
            raise _BadLine("key missing", f": no {key!r} among {', '.join(map(repr, record)) or 'no keys'}"[:200])
        text = record[key]
        if not isinstance(text, str):
            raise _BadLine("text not a string", f": {key!r} is {_json_type(text)}")
        try:
            # An escape can bring half a character, which no tokenizer accepts.
            text.isascii() or text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):x}"
            raise _BadLine("text not Unicode", f": {key!r} has half a character ({half})") from None
        texts.append(text)
    return texts


def _json_type(value: object) -> str:
    return JSON_TYPES.get(type(value), "a number")
