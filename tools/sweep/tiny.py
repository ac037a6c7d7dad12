"""What --tiny makes of a sweep: the quickstart's model and text, on one CPU."""

from collections.abc import Mapping

from ..common.flags import parse
from ..common.places import ROOT
from ..quickstart.models import SEED, SIZE, common_flags
from .errors import SettingsError

SET_BY_SWEEP = ("--train-iters", "--micro-batch-size")
DOMAIN_BY_DOMAIN = ("--multiple-validation-sets", "--full-validation")
TEXT = ROOT / "runs" / "quickstart" / "data"


def flags(iterations: int, given: Mapping[str, str]) -> tuple[str, ...]:
    """For Megatron, behind the launch scripts': the quickstart's sizes and rates, one held-out part of the text.

    Args:
        iterations: of a training.
        given: the environment, of which MODEL says how layers are given.
    """
    settings = parse(common_flags(SIZE, iterations, SEED))
    settings |= {"--moe-ffn-hidden-size": (str(SIZE.ffn),), "--split": ("95,5,0",), "--eval-iters": ("40",)}
    if given.get("MODEL") == "hybrid":
        del settings["--num-layers"]
        settings["--hybrid-layer-pattern"] = ("*E" * SIZE.layers,)
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
    lines = [f"{path.stat().st_size} {path.with_suffix('')}" for path in found]
    vocabulary = {"VOCAB_FILE": str(TEXT / "vocab.json"), "MERGE_FILE": str(TEXT / "merges.txt")}
    return {"DATA_PATH": "\n".join(lines)} | vocabulary
