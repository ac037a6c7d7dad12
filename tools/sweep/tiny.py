"""What --tiny makes of a sweep: the quickstart's model and text, on one CPU."""

import os
from collections.abc import Mapping

from ..common.flags import parse
from ..common.places import ROOT
from ..quickstart.models import ITERATIONS, SEED, SIZE, common_flags
from .errors import SettingsError

SET_BY_SWEEP = ("--train-iters", "--micro-batch-size")
DOMAIN_BY_DOMAIN = ("--multiple-validation-sets", "--full-validation")
TEXT = ROOT / "runs" / "quickstart" / "data"

__all__ = ["ITERATIONS", "SIZE", "environment", "flags"]


def flags(iterations: int) -> tuple[str, ...]:
    """For Megatron, behind the launch scripts': the quickstart's sizes and rates, one held-out part of the text."""
    settings = parse(common_flags(SIZE, iterations, SEED))
    settings |= {"--moe-ffn-hidden-size": (str(SIZE.ffn),), "--split": ("95,5,0",), "--eval-iters": ("40",)}
    kept = {flag: values for flag, values in settings.items() if flag not in (*SET_BY_SWEEP, *DOMAIN_BY_DOMAIN)}
    return tuple(word for flag, values in kept.items() for word in (flag, *values))


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What leads the launch scripts to the quickstart's training text, by its size; nothing where data are given.

    Raises:
        SettingsError: it is not there.
    """
    if given.get("DATA_PATH") or given.get("DATA_DIR"):
        return {}
    found = sorted(TEXT.glob("train_*_document.bin"))
    if not found:
        raise SettingsError(f"--tiny: there is no text in {TEXT}. Run scripts/quickstart.sh, or set DATA_PATH.")
    lines = [f"{os.path.getsize(path)} {path.with_suffix('')}" for path in found]
    vocabulary = {"VOCAB_FILE": str(TEXT / "vocab.json"), "MERGE_FILE": str(TEXT / "merges.txt")}
    return {"DATA_PATH": "\n".join(lines)} | vocabulary
