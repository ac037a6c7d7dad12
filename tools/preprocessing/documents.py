"""Takes the texts out of lines of JSON, and says what is wrong with a line that has none."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.remoe.data.errors import DataError

from .reading import Block, Damage

CHARACTERS_SHOWN = 80


@dataclass(frozen=True)
class Problem:
    """A line that gives no document: `kind` for counting, `message` with file, line number and first characters."""

    kind: str
    message: str


@dataclass
class Documents:
    """The texts of a block's good lines, for each key, and the problems of the others."""

    texts: dict[str, list[str]]
    problems: list[Problem] = field(default_factory=list)


class _BadLine(Exception):
    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


def parse_documents(block: Block | Damage, keys: Sequence[str], skip_bad: bool) -> Documents:
    """The documents of a block.

    Args:
        keys: names of the JSON fields that hold text; a line that lacks one gives no document for any.
        skip_bad: report the problems instead of raising the first.

    Raises:
        DataError: the first bad line, if these are not to be skipped.
    """
    documents = Documents({key: [] for key in keys})
    if isinstance(block, Damage):
        problem = Problem("damaged data", f"{block.source}, line {block.line}: compressed data broken: {block.reason}.")
        return _report(documents, problem, skip_bad)
    for number, line in enumerate(_lines(block.data), start=block.first_line):
        try:
            texts = _texts_of(line, keys)
        except _BadLine as bad:
            _report(documents, Problem(bad.kind, _describe(block.source, number, bad, line)), skip_bad)
        else:
            for key, text in zip(keys, texts, strict=True):
                documents.texts[key].append(text)
    return documents


def _report(documents: Documents, problem: Problem, skip_bad: bool) -> Documents:
    if not skip_bad:
        raise DataError(f"{problem.message}\nCorrect it, or give --on-error skip to leave out what cannot be read.")
    documents.problems.append(problem)
    return documents


def _lines(data: bytes) -> Sequence[str | bytes]:
    lines: list[str] | list[bytes]
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = data.split(b"\n")  # each is decoded alone, to find the bad ones
    if not lines[-1]:
        lines.pop()
    return lines


def _texts_of(line: str | bytes, keys: Sequence[str]) -> list[str]:
    if isinstance(line, bytes):
        try:
            line = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _BadLine("not UTF-8", f" (byte {error.start + 1})") from None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        kind = "not JSON" if line.strip() else "blank line"
        raise _BadLine(kind, f" ({error})" if line.strip() else "") from None
    if not isinstance(record, dict):
        raise _BadLine("not a JSON object", f" but {_json_type(record)}")
    texts = []
    for key in keys:
        if key not in record:
            raise _BadLine("key missing", f": no {key!r} among {', '.join(map(repr, record)) or 'no keys'}"[:200])
        text = record[key]
        if not isinstance(text, str):
            raise _BadLine("text not a string", f": {key!r} is {_json_type(text)}")
        if not text.isascii():
            # An escape can bring half a character, which no tokenizer takes.
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):x}"
                raise _BadLine("text not Unicode", f": {key!r} has half a character ({half})") from None
        texts.append(text)
    return texts


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _describe(source: str, number: int, bad: _BadLine, line: str | bytes) -> str:
    start = line[: CHARACTERS_SHOWN + 1]
    shown = start if isinstance(start, str) else start.decode("utf-8", errors="backslashreplace")
    shown = repr(shown[:CHARACTERS_SHOWN]) + ("…" if len(start) > CHARACTERS_SHOWN else "")
    return f"{source}, line {number}: {bad.kind}{bad.detail}: {shown}"
