"""Test remoe evaluate: the loss is Megatron's, experts are counted, and lm-eval scores tasks."""

import functools
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron.remoe.files.gpt2_files import byte_level_vocabulary
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.data_sets import write_documents
from tests.hf.models import make
from tests.tiny_model import RELU
from tests.training_runs import TINY, run
from tools.models.arguments import TASKS
from tools.models.evaluate.command import main
from tools.models.evaluate.tasks import read_scores
from tools.models.measuring import measure_loss
from tools.models.text import read_batches, read_sequences

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]


def evaluate(tmp_path: Path, *words: str | Path) -> dict[str, Any]:
    assert main([*map(str, words), "--output", str(tmp_path / "results.json")]) == 0
    return json.loads((tmp_path / "results.json").read_text())


def test_loss_is_megatrons(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The loss is what training printed for its validation set. Bounds on experts hold, and wrong flags are refused."""
    held_out, run_folder = tmp_path / "held-out", tmp_path / "run"
    write_documents(held_out, [data.with_suffix(".bin").read_bytes()[start : start + 900] for start in range(0, 30, 3)])
    words = [*TINY, *RELU, "--train-data-path", str(data), "--valid-data-path", str(held_out)]
    words = [word for word in words if word not in ("--split", "90,10,0")]
    words += "--multiple-validation-sets --full-validation --train-iters 4 --eval-interval 4 --lr 2e-2".split()
    words += ["--seed", "77"]  # evaluate orders the text by the training's seed
    words += f"--micro-batch-size 4 --global-batch-size 4 --save {run_folder} --save-interval 4 --no-save-optim".split()
    printed = re.findall(r"validation-\S* loss at iteration 4 .* lm loss value: (\S+)", run(words))
    text = ["--data-path", held_out, "--seq-length", "64", "--max-experts-per-token", "1", "8", "--speed"]
    results = evaluate(tmp_path, "--load", run_folder, *text)
    bounds = results["text"][str(run_folder)][str(held_out)]
    assert bounds["none"]["loss"] == pytest.approx(float(printed[-1]), abs=1e-4)
    logged = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert bounds["none"]["tokens"] == next(one["tokens"] for one in logged if one["kind"] == "validation")
    assert bounds["8"]["loss"] == pytest.approx(bounds["none"]["loss"], rel=1e-5)
    assert bounds["8"]["experts"] == bounds["none"]["experts"] and bounds["1"]["experts"]["1"]["largest"] == 1
    assert all(rate > 0 for rate in results["speed"][str(run_folder)].values())
    for wrong, code in (
        (["--data-path", "/nowhere"], "E301"),
        (["--data-path", held_out, "--seq-length", "99999"], "E501"),
        (["--data-path", held_out, "--max-experts-per-token", "9"], "E501"),
        (["--tasks"], "E513"),
    ):
        capfd.readouterr()
        assert main(["--load", str(run_folder), *map(str, wrong)]) == 1
        assert f"[REMOE-{code}]" in capfd.readouterr().err


def test_a_bound_ends_with_its_data_set(data: Path, tmp_path: Path) -> None:
    """The next data set runs with the model's own bound again."""
    make("relu", vocab_size=300).save_pretrained(tmp_path / "model")
    (second := tmp_path / "again.bin").write_bytes(data.with_suffix(".bin").read_bytes())
    second.with_suffix(".idx").write_bytes(data.with_suffix(".idx").read_bytes())
    words = ["--load", tmp_path / "model", "--data-path", data, second.with_suffix(""), "--seq-length", "32"]
    results = evaluate(tmp_path, *words, "--sequences", "8", "--max-experts-per-token", "1")
    first, again = results["text"][str(tmp_path / "model")].values()
    assert first["none"]["experts"]["1"]["largest"] > 1 and again == first


@pytest.mark.parametrize("kind", ["top-k, normed", "hash"])
def test_models_without_relu_keep_their_experts(kind: str, data: Path, tmp_path: Path) -> None:
    model = make(kind, vocab_size=300)
    model.save_pretrained(tmp_path / "model")
    words = ["--load", tmp_path / "model", "--data-path", data, "--seq-length", "32", "--sequences", "8"]
    measured = evaluate(tmp_path, *words)["text"][str(tmp_path / "model")][str(data)]["none"]
    batches = read_batches(read_sequences(str(data), 32, 1234, 300), 8, 300)
    assert measured["loss"] == pytest.approx(measure_loss(model, batches)[0], rel=1e-6)


def test_results_before_an_error_are_kept(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = gpt2_tokenizer_folder(*byte_level_vocabulary(tmp_path / "files"), cache_dir=tmp_path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "model")
    make("relu", vocab_size=300).save_pretrained(tmp_path / "model")
    words = ["--data-path", str(data), "--seq-length", "32", "--sequences", "8", "--tasks", "no_such_task"]
    assert main(["--load", str(tmp_path / "model"), *words, "--output", str(tmp_path / "results.json")]) == 1
    assert "[REMOE-E504]" in capfd.readouterr().err
    assert [*json.loads((tmp_path / "results.json").read_text())] == ["text"]


def test_scores_of_lm_eval() -> None:
    """lm-eval is 400 MB. This is the form of its results; the test below runs it where it is installed."""
    task = {"alias": "own", "sample_len": 3, "acc,first": 0.5, "acc_stderr,first": 0.1, "f1,none": 1.0}
    group = {"alias": "group", "sample_len": 3, "acc,first": 0.5, "acc_stderr,first": "N/A"}
    rows = [tuple(row.values()) for row in read_scores({"own": task, "group": group})]
    assert rows[:2] == [("own", "acc,first", 0.5, 0.1, 3), ("own", "f1", 1.0, None, 3)]
    assert rows[2:] == [("group", "acc,first", 0.5, None, 3)]


TEXTS = ["the cat has caught a mouse", "she opened the old door", "it rained all day long"]
QUESTIONS = [("Question: a cat\nAnswer:", [" mews", " barks", " sings", " rows"], 0)]
QUESTIONS += [("Question: a dog\nAnswer:", [" mews", " barks", " sings", " rows"], 1)]
QUESTIONS += [("Question: a boat\nAnswer:", [" mews", " barks aloud", " sings", " sails"], 3)]


def write_task(folder: Path) -> None:
    """Write a task in lm-eval's format, in a group, with local data."""
    folder.mkdir()
    rows = [
        {"question": context, "choices": [text.strip() for text in texts], "answer": label}
        for context, texts, label in QUESTIONS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(folder / "rows.jsonl")}
    task = {"task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    task |= {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}], "doc_to_text": "{{question}}"}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    task["filter_list"] = [{"name": "first", "filter": [{"function": "take_first"}]}]
    group = {"group": "group", "task": ["own"], "aggregate_metric_list": [{"metric": "acc", "filter_list": "first"}]}
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    lambada = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}}}
    lambada |= {"task": "texts", "dataset_name": None, "include": str(folder / "lambada_openai.yaml")}
    for name, content in (("own", task), ("group", group), ("texts", lambada)):
        (folder / f"{name}.yaml").write_text(json.dumps(content))


def test_tasks_through_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """LAMBADA's perplexity equals a direct computation, and a uniform model has computable scores."""
    tokenizer = AutoTokenizer.from_pretrained(
        gpt2_tokenizer_folder(*byte_level_vocabulary(tmp_path / "files"), cache_dir=tmp_path)
    )
    tokenizer.pad_token = tokenizer.eos_token
    model = make("relu", vocab_size=264, max_position_embeddings=64)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    words = ["--load", str(tmp_path / "model"), "--task-data", str(tmp_path / "own")]
    words += ["--tasks"]
    write_task(tmp_path / "own")
    if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("datasets") is None:
        assert main(words) == 1 and "[REMOE-E504]" in capfd.readouterr().err
        pytest.skip("needs lm-eval[hf]")
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.cache(TaskManager))  # it reads 14,000 files each time
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert {*TASKS} <= set(TaskManager().all_tasks)

    lambada = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0], "tasks", "lambada")
    (tmp_path / "own" / "lambada_openai.yaml").write_text((lambada / "lambada_openai.yaml").read_text())
    scores = evaluate(tmp_path, *words, "texts")["tasks"][str(tmp_path / "model")]
    of_words = []  # the summed log-probabilities of each last word's tokens, bytes here, and of the space before it
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            of_tokens = model(ids).logits.log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])
        of_words.append(float(of_tokens[-len(text.split()[-1]) - 1 :].sum()))
    (perplexity,) = (one["value"] for one in scores if one["metric"] == "perplexity")
    assert perplexity == pytest.approx(math.exp(-sum(of_words) / len(of_words)), rel=1e-4)

    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    # A uniform model prefers the shortest choice; the first one if several are as short.
    scores = evaluate(tmp_path, *words, "group")["tasks"][str(tmp_path / "model")]
    assert {(one["task"], one["metric"], one["documents"], round(one["value"], 6)) for one in scores} == {
        (task, "acc,first", len(QUESTIONS), 0.333333) for task in ("own", "group")
    }

    capfd.readouterr()
    assert main([*words, "nothing"]) == 1 and "[REMOE-E504]" in capfd.readouterr().err
