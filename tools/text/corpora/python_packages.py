"""Build a corpus of Python source text, with its English documentation: packages of PyPI, one domain each.

Modules of a package share lines, such as licenses and parameters of interfaces. A longer line is used once over all
packages, before text is held out.
"""

import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .corpus import Document, Sources, download

# Lines of a requirements file; the package is the domain.
PACKAGES = (
    "ansible==14.5.0 --hash=sha256:245623ccc2d31d0f6f4bdb63168d550cad305fb032cc43d96e8f61ce8ab0ba84",
    "sympy==1.14.0 --hash=sha256:e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "transformers==5.24.0 --hash=sha256:ff5ebedf9359f94bb63772b6380eba6e7104d010cbbb2cb82c788817ea7486f6",
    "nova==34.0.0 --hash=sha256:8b46997836961762608e6e46e6d4945325d8a1fb8004e79e552e55839061f10c",
    "mlflow==3.18.0 --hash=sha256:be7d84ba0d0b12392f5b53260cdb3e6d7b7ef4b80c29da90a89b5a1f6db7102f",
)
SHORT = 20  # characters of a line that can repeat, without the spaces around it


def drop_repeated_lines(text: str, seen: set[str]) -> str:
    """Return a text without the longer lines in `seen`, and add its own there."""
    kept = []
    for line in text.split("\n"):
        words = line.strip()
        if len(words) >= SHORT:
            if words in seen:
                continue
            seen.add(words)
        kept.append(line)
    return "\n".join(kept)


def documents(package: str, seen: set[str]) -> Iterator[Document]:
    """Yield a document for each module of a package, sorted by path; `seen` as in `drop_repeated_lines`.

    Raises:
        ToolError: the package cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(download(Path(folder), package)) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".py"):
                text = wheel.read(name).decode("utf-8", errors="replace")
                yield Document(f"python/{name}", drop_repeated_lines(text, seen))


def sources() -> Sources:
    """Return domain → its documents; they must be read in this order."""
    seen: set[str] = set()
    return {package.partition("==")[0]: partial(documents, package, seen) for package in PACKAGES}
