"""Test a trained model's way to transformers and back: the validation loss without Megatron, and the next steps."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from megatron.remoe.files.gpt2_files import byte_level_vocabulary
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests import without_megatron
from tests.data_sets import write_documents
from tests.tiny_model import RELU
from tests.training_runs import REPOSITORY, TINY, run, series
from tools.models.export import main as export
from tools.models.text import read_batches, read_sequences

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]
PROMPT = "My lord, "


def test_there_and_back(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held_out, folder, there, back = (tmp_path / name for name in ("held-out", "run", "there", "back"))
    write_documents(held_out, [data.with_suffix(".bin").read_bytes()[start : start + 900] for start in range(0, 30, 3)])
    flags = [word for word in [*TINY, *RELU] if word not in ("--split", "90,10,0")] + ["--train-data-path", str(data)]
    words = "--multiple-validation-sets --full-validation --train-iters 4 --eval-interval 4 --lr 2e-2".split()
    saved = ["--save", str(folder), "--save-interval", "4", "--valid-data-path", str(held_out)]
    (*_, loss) = re.findall(r"validation-\S* loss .* lm loss value: (\S+)", run([*flags, *words, *saved]))
    tokenizer = gpt2_tokenizer_folder(*byte_level_vocabulary(tmp_path / "files"), cache_dir=tmp_path)
    assert export(["--load", str(folder), "--save", str(there), "--tokenizer-model", str(tokenizer)]) == 0

    text = tmp_path / "text.pt"
    torch.save(torch.cat(list(read_batches(read_sequences(str(held_out), 64, 1234, 257), None, 257))), text)
    python = without_megatron.make(tmp_path / "environment")
    result = json.loads(without_megatron.run(python, REPOSITORY / "tests" / "alone.py", there, PROMPT, text))
    assert result["losses"] == pytest.approx([float(loss)], abs=1e-4)
    assert result["text"].startswith(PROMPT) and len(result["text"]) > len(PROMPT)

    capfd.readouterr()
    assert export(["--reverse", "--load", str(there), "--save", str(back)]) == 0
    printed = capfd.readouterr().out
    shape = shlex.split(printed[printed.index("--pretrained-checkpoint") :])
    before, after = (
        series(run([*flags, *words, "--train-iters", "3", "--eval-iters", "0"]), "lm loss")
        for words in (["--pretrained-checkpoint", str(folder)], [*shape, "--seq-length", "64"])
    )
    assert len(before) == 3 and after == pytest.approx(before, rel=1e-5)
