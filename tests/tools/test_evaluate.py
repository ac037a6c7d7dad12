"""Test a run's loss in remoe evaluate and in transformers without Megatron, counted experts, and lm-eval's command."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.data_sets import write_documents
from tests.hf.models import make
from tests.tiny_model import RELU
from tests.training_runs import REPOSITORY, TINY, logged, run, series
from tools.models.evaluate import main
from tools.models.export import main as export
from tools.models.hf.tokenizer import count_token_bytes
from tools.models.measuring import find_repeats, measure_loss
from tools.models.text import read_batches, read_sequences

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]


def evaluate(tmp_path: Path, *words: str | Path) -> dict[str, Any]:
    assert main([*map(str, words), "--output", str(tmp_path / "results.json")]) == 0
    return json.loads((tmp_path / "results.json").read_text())


class Trained(NamedTuple):
    """A run's flags without those for saving, its folder and held-out text, and the loss that Megatron printed."""

    flags: list[str]
    folder: Path
    held_out: Path
    loss: float


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    held_out, folder = root / "heldout_drama_text_document", root / "remoe" / "checkpoints"
    text = data.with_suffix(".bin").read_bytes()
    write_documents(held_out, [b"", *(text[start : start + 900] for start in range(0, 30, 3))])
    flags = [word for word in [*TINY, *RELU] if word not in ("--split", "90,10,0")] + ["--train-data-path", str(data)]
    # evaluate reads the text in the run's length, and in the order of its seed.
    flags += ["--seed", "77", "--max-position-embeddings", "96"]
    words = f"--multiple-validation-sets --full-validation --valid-data-path {held_out} --eval-interval 4".split()
    words += f"--train-iters 4 --lr 2e-2 --save {folder} --save-interval 4".split()
    (*_, loss) = re.findall(r"validation-\S* loss at iteration 4 .* lm loss value: (\S+)", run([*flags, *words]))
    return Trained(flags, folder, held_out, float(loss))


def test_loss_is_megatrons(trained: Trained, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is what Megatron printed for its validation set. Bounds on experts hold. Wrong flags are refused.

    The tables fit into 80 columns.
    """
    monkeypatch.setenv("COLUMNS", "200")
    text = ["--data-path", trained.held_out, "--max-experts-per-token", "1", "8"]
    results = evaluate(tmp_path, "--load", trained.folder, *text)
    assert max(map(len, capfd.readouterr().out.splitlines())) <= 80
    bounds = results["text"][str(trained.folder)][str(trained.held_out)]
    assert bounds["none"]["loss"] == pytest.approx(trained.loss, abs=1e-4)
    assert bounds["none"]["tokens"] == logged(trained.folder, "validation")[0]["tokens"]
    assert bounds["8"]["loss"] == pytest.approx(bounds["none"]["loss"], rel=1e-5)
    assert bounds["8"]["experts"] == bounds["none"]["experts"] and bounds["1"]["experts"]["1"]["largest"] == 1
    for wrong, code in (
        (["--data-path", "/nowhere"], "E301"),
        (["--data-path", trained.held_out, "--seq-length", "99999"], "E501"),
        (["--data-path", trained.held_out, "--max-experts-per-token", "9"], "E501"),
        (["--data-path", trained.held_out, "--ckpt-step", "3"], "E402"),
    ):
        capfd.readouterr()
        assert main(["--load", str(trained.folder), *map(str, wrong)]) == 1
        assert f"[REMOE-{code}]" in capfd.readouterr().err


def run_alone(folder: Path, *words: str | Path) -> str:
    """Run tests/alone.py in a new environment with the packages of this one, except Megatron and this project."""
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "megatron" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # transformers copies a model's code here before it runs it.
    settings |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [*map(str, (folder / "bin" / "python", "-P", REPOSITORY / "tests" / "alone.py", *words))]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_to_transformers_and_back(trained: Trained, tokenizer: Path, tmp_path: Path, capfd) -> None:
    """The exported model has the run's loss without Megatron. Converted back, it trains like the run's checkpoint."""
    there, back, text = (tmp_path / name for name in ("there", "back", "text.pt"))
    assert export(["--load", str(trained.folder), "--save", str(there), "--tokenizer-model", str(tokenizer)]) == 0
    torch.save(torch.cat(list(read_batches(read_sequences(str(trained.held_out), 64, 77, 257), None, 257))), text)
    result = json.loads(run_alone(tmp_path / "environment", there, "My lord, ", text))
    assert result["losses"] == pytest.approx([trained.loss], abs=1e-4)
    assert result["text"].startswith("My lord, ") and len(result["text"]) > len("My lord, ")

    capfd.readouterr()
    assert export(["--reverse", "--load", str(there), "--save", str(back)]) == 0
    printed = capfd.readouterr().out
    shape = shlex.split(printed[printed.index("--pretrained-checkpoint") :])
    assert "--moe-layer-freq" not in shape, "printed although all layers have experts"
    before, after = (
        series(run([*trained.flags, *words, "--train-iters", "3"]), "lm loss")
        for words in (["--pretrained-checkpoint", str(trained.folder)], [*shape, "--seq-length", "64"])
    )
    assert len(before) == 3 and after == pytest.approx(before, rel=1e-5)


def test_a_bound_ends_with_its_data_set(data: Path, tmp_path: Path) -> None:
    """A bound on experts must not stay set for the next data set, which starts with the model's own bound."""
    make("relu", vocab_size=300).save_pretrained(tmp_path / "model")
    (second := tmp_path / "again.bin").write_bytes(data.with_suffix(".bin").read_bytes())
    second.with_suffix(".idx").write_bytes(data.with_suffix(".idx").read_bytes())
    words = ["--load", tmp_path / "model", "--data-path", data, second.with_suffix(""), "--seq-length", "32"]
    results = evaluate(tmp_path, *words, "--sequences", "8", "--max-experts-per-token", "1")
    first, again = results["text"][str(tmp_path / "model")].values()
    assert first["none"]["experts"]["1"]["largest"] > 1 and again == first


def test_repeats_are_pairs_seen_before() -> None:
    """Their loss and number are those of a search through all earlier pairs of each sequence."""
    model = make("relu", vocab_size=300).eval()
    ids = torch.randint(0, 5, (3, 33), generator=torch.Generator().manual_seed(1))
    pairs = [[*zip(row, row[1:], strict=False)] for row in ids.tolist()]
    expected = torch.tensor([[pair in row[:place] for place, pair in enumerate(row)] for row in pairs])
    assert torch.equal(find_repeats(ids), expected)
    losses = -model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    measured = measure_loss(model, [ids[:2], ids[2:]])
    assert measured.repeats == expected.sum() and measured.tokens == expected.numel()
    assert measured.repeats_loss == pytest.approx(losses[expected].mean().item(), rel=1e-5)
    assert measure_loss(model, [ids[:, :2]]).repeats_loss is None


def test_loss_per_byte(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    """The bytes are those of the text that the tokens decode to, and one for the end of a document."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    make("relu", vocab_size=264).save_pretrained(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "model")
    words = ["--load", tmp_path / "model", "--data-path", data, "--seq-length", "32", "--sequences", "8"]
    measured = evaluate(tmp_path, *words)["text"][str(tmp_path / "model")][str(data)]["none"]
    assert measured["loss_per_byte"] == pytest.approx(measured["loss"], rel=1e-6), "a token is a byte"
    text = "Schöne Wörter\n\n  for x in range(3):"
    subwords = ByteLevelBPETokenizer()
    subwords.train_from_iterator([text] * 9, 300, show_progress=False, special_tokens=["<|endoftext|>"])
    subwords.save_model(str(tmp_path))
    fast = AutoTokenizer.from_pretrained(gpt2_tokenizer_folder(tmp_path / "vocab.json", tmp_path / "merges.txt"))
    ids = fast(text + "<|endoftext|>").input_ids
    assert len(ids) < len(text) and count_token_bytes(fast, 400)[ids].sum() == len(text.encode()) + 1


TEXTS = ["the cat has caught a mouse", "she opened the old door", "it rained all day long"]


def test_documented_command_scores_a_folder(tokenizer: Path, tmp_path: Path) -> None:
    """The page's command of lm-eval scores LAMBADA's perplexity on local texts as a direct computation does."""
    lm_eval, _ = (pytest.importorskip(name, reason="needs lm-eval[hf]") for name in ("lm_eval", "datasets"))
    from lm_eval.tasks import TaskManager

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.pad_token = loaded.eos_token
    model = make("relu", vocab_size=264, max_position_embeddings=64)
    for part in (loaded, model):
        part.save_pretrained(tmp_path / "model")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    lambada = Path(lm_eval.__file__).parent / "tasks" / "lambada" / "lambada_openai.yaml"
    (folder / lambada.name).write_text(lambada.read_text())
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}}}
    task |= {"task": "texts", "dataset_name": None, "include": str(folder / lambada.name)}
    (folder / "texts.yaml").write_text(json.dumps(task))

    page = (REPOSITORY / "docs" / "huggingface.md").read_text().replace("\\\n", "")
    command, tasks = re.findall(r"^lm_eval (--model hf .*FOLDER.*) --tasks (\S+)$", page, re.MULTILINE)[0]
    assert {*tasks.split(",")} <= {*TaskManager().all_tasks}
    words = [*command.replace("FOLDER", str(tmp_path / "model")).split(), "--tasks", "texts", "--device", "cpu"]
    words += ["--include_path", str(folder), "--output_path", str(tmp_path / "scores")]
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-m", "lm_eval", *words], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "scores").rglob("results_*.json")
    of_words = []  # log-probability of each text's last word with the space before it: a sum over its tokens (bytes)
    for text in TEXTS:
        ids = loaded(text, return_tensors="pt").input_ids
        with torch.no_grad():
            of_tokens = model(ids).logits.log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])
        of_words.append(float(of_tokens[-len(text.split()[-1]) - 1 :].sum()))
    perplexity = json.loads(written.read_text())["results"]["texts"]["perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-sum(of_words) / len(of_words)), rel=1e-4)
