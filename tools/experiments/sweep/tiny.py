"""Define models and text of a sweep with --tiny: the quickstart's model, two larger ones, and its text."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ...console.files import lock
from ...console.flags import parse, words_of
from ...console.places import ROOT
from ...recipes.layout import RecipeError
from ...recipes.tiny import SEED, SIZE, TinySize, common_flags
from ...text.corpora import dataset
from ...text.corpora.dataset import FOLDERS

# By the size of the launch script that each replaces.
MODELS: Mapping[str, TinySize] = {
    "182m": SIZE,
    "469m": replace(SIZE, layers=4, hidden=80, ffn=160),
    "978m": replace(SIZE, layers=4, hidden=128, ffn=256),
}
SET_BY_SWEEP = ("--train-iters", "--micro-batch-size")
DOMAIN_BY_DOMAIN = ("--multiple-validation-sets", "--full-validation")


def flags(size: TinySize, iterations: int, given: Mapping[str, str]) -> tuple[str, ...]:
    """Return the flags that override a launch script's: a tiny size, the quickstart's rates, one held-out part.

    Args:
        size: of the model.
        iterations: of a training.
        given: the environment; MODEL says how layers are given.
    """
    settings = parse(common_flags(size, iterations, SEED))
    settings |= {"--moe-ffn-hidden-size": (str(size.ffn),), "--split": ("95,5,0",), "--eval-iters": ("40",)}
    if given.get("MODEL") == "hybrid":
        del settings["--num-layers"]
        settings |= parse(size.layer_flags("remoe", hybrid=True))
    kept = {flag: values for flag, values in settings.items() if flag not in (*SET_BY_SWEEP, *DOMAIN_BY_DOMAIN)}
    return tuple(words_of(kept))


def make_text(given: Mapping[str, str], corpus: str, say: Callable[[str], None]) -> None:
    """Build the quickstart's text, unless it is there or an environment has data."""
    folder = ROOT / FOLDERS[corpus]
    if not has_data(given) and not (folder / "data" / "manifest.json").exists():
        with lock(folder, "quickstart"):
            dataset.make_text(folder, corpus, say)


def has_data(given: Mapping[str, str]) -> bool:
    """Return whether an environment has data."""
    return bool(given.get("DATA_PATH") or given.get("DATA_DIR"))


def environment(given: Mapping[str, str], corpus: str) -> dict[str, str]:
    """Return the variables for one thread and, unless `given` has data, for the quickstart's text.

    Raises:
        RecipeError: the text is not there.
    """
    text = {} if has_data(given) else text_in(ROOT / FOLDERS[corpus] / "data")
    return {"OMP_NUM_THREADS": "1"} | text


def text_in(folder: Path) -> dict[str, str]:
    """Return the variables for a folder of the quickstart's data: its training text, each domain weighted by its size.

    Raises:
        RecipeError: the text is not there.
    """
    found = sorted(folder.glob("train_*_document.bin"))
    if not found:
        raise RecipeError(
            f"--tiny: there is no text in {folder}. Leave out --dry-run, which makes none, or set DATA_PATH."
        )
    lines = [f"{path.stat().st_size} {path.with_suffix('')}" for path in found]
    vocabulary = {"VOCAB_FILE": str(folder / "vocab.json"), "MERGE_FILE": str(folder / "merges.txt")}
    return {"DATA_PATH": "\n".join(lines)} | vocabulary
