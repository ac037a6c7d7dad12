"""Test the export of trained models to transformers and back; compare each step with the training.

Export → validation losses and text without Megatron installed → checkpoint → the next training steps. The models are a
tiny ReMoE and those of a finished `scripts/quickstart.sh` in $QUICKSTART (default: runs/quickstart; skipped without).
"""

import json
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron.remoe.files.gpt2_files import byte_level_vocabulary
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests import without_megatron
from tests.data_sets import write_documents
from tests.tiny_model import RELU
from tests.trainings import REPOSITORY, TINY, run, series
from tools.console.flags import parse
from tools.models.export.command import main as export
from tools.models.text import read_batches, read_sequences
from tools.recipes import tiny
from tools.recipes.models import Routing
from tools.text.corpora import dataset

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]
QUICKSTART = Path(os.environ.get("QUICKSTART", REPOSITORY / "runs" / "quickstart"))
PROMPT = "My lord, "
STEPS = 3  # of the trainings after the export
VALIDATION = ("--full-validation", "--multiple-validation-sets", "--valid-data-path", "--validation-set-names")
LOSS = r"validation-{} loss .* lm loss value: (\S+)"


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        checkpoints: its folder.
        flags: for further training without validation; the test adds the weights and the number of steps.
        losses: prefix of a held-out data set → the validation loss that Megatron printed, in nats per token.
        length, vocabulary: number of tokens of a sequence, and of tokens that the model knows.
        more: flags for the export.
    """

    checkpoints: Path
    flags: list[str]
    losses: dict[str, float]
    length: int
    vocabulary: int
    more: tuple[str, ...] = ()


def train_tiny(data: Path, folder: Path) -> Trained:
    """Train a tiny ReMoE for four steps."""
    held_out = folder / "held-out"
    write_documents(held_out, [data.with_suffix(".bin").read_bytes()[start : start + 900] for start in range(0, 30, 3)])
    flags = [word for word in [*TINY, *RELU] if word not in ("--split", "90,10,0")] + ["--train-data-path", str(data)]
    words = "--multiple-validation-sets --full-validation --train-iters 4 --eval-interval 4 --lr 2e-2".split()
    saved = ["--save", str(folder / "run"), "--save-interval", "4", "--valid-data-path", str(held_out)]
    (*_, printed) = re.findall(LOSS.format(r"\S*"), run([*flags, *words, *saved]))
    tokenizer = gpt2_tokenizer_folder(*byte_level_vocabulary(folder), cache_dir=folder)
    more = ("--tokenizer-model", str(tokenizer))
    return Trained(folder / "run", flags, {str(held_out): float(printed)}, 64, 257, more)


def of_quickstart(model: str) -> Trained:
    """Read one of the quickstart's models."""
    try:
        seed = json.loads((QUICKSTART / "summary.json").read_text())["seed"]
        tokens = json.loads((QUICKSTART / "data" / "manifest.json").read_text())["tokens"]["train"]
    except OSError:
        pytest.skip(f"needs a finished quickstart in {QUICKSTART}: scripts/quickstart.sh, or QUICKSTART=FOLDER")
    folder, size = QUICKSTART.resolve(), tiny.SIZE
    log = (folder / model / "train.log").read_text()
    words = tiny.common_flags(size, replace(tiny.TRAINING, iterations=STEPS), seed)
    words += tiny.model_flags(Routing(model), size)
    words += dataset.data_flags(folder / "data", tokens)
    kept = {flag: values for flag, values in parse(words).items() if flag not in VALIDATION}
    printed = {
        dataset.data_prefix(folder / "data", "heldout", name): float(re.findall(LOSS.format(name), log)[-1])
        for name in tokens
    }
    more = [word for flag, values in kept.items() for word in (flag, *values)]
    return Trained(folder / model / "checkpoints", more, printed, size.sequence, 257)


@pytest.mark.parametrize(
    "model", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in tiny.NAMES)], ids=str
)
def test_there_and_back(model: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = train_tiny(data, tmp_path) if model == "tiny" else of_quickstart(model)
    there, back, texts = tmp_path / "there", tmp_path / "back", []
    assert export(["--load", str(trained.checkpoints), "--save", str(there), *trained.more]) == 0
    assert float(capfd.readouterr().out.split("largest difference of logits ")[1].split()[0]) < 1e-4

    for number, prefix in enumerate(trained.losses):
        texts.append(tmp_path / f"text{number}.pt")
        held_out = read_sequences(prefix, trained.length, 1234, trained.vocabulary)
        torch.save(torch.cat(list(read_batches(held_out, None, trained.vocabulary))), texts[-1])
    python = without_megatron.make(tmp_path / "environment")
    found = json.loads(without_megatron.run(python, REPOSITORY / "tests" / "alone.py", there, PROMPT, *texts))
    assert found["losses"] == pytest.approx(list(trained.losses.values()), abs=1e-4)
    assert found["text"].startswith(PROMPT) and len(found["text"]) > len(PROMPT)

    assert export(["--reverse", "--load", str(there), "--save", str(back)]) == 0
    printed = capfd.readouterr().out
    flags = shlex.split(printed[printed.index("--pretrained-checkpoint") :])
    before, after = (
        series(run([*trained.flags, *words, "--train-iters", str(STEPS), "--eval-iters", "0"]), "lm loss")
        for words in (
            ["--pretrained-checkpoint", str(trained.checkpoints)],
            [*flags, "--seq-length", str(trained.length)],
        )
    )
    assert len(before) == STEPS and after == pytest.approx(before, rel=1e-5)
