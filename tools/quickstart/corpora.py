"""List the corpora, and the quickstart's default folder for each."""

from collections.abc import Callable, Mapping
from pathlib import Path

from . import corpus, technical

MIXED, TECHNICAL = "mixed", "technical"
CORPORA: Mapping[str, Callable[[], corpus.Sources]] = {
    MIXED: lambda: corpus.SOURCES,
    TECHNICAL: technical.sources,
}
FOLDERS = {MIXED: Path("runs", "quickstart"), TECHNICAL: Path("runs", "quickstart-technical")}
