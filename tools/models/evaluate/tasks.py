"""Score zero-shot tasks with lm-eval, and compare accuracies with the paper (arXiv 2412.14711, table 8) in per cent."""

import argparse
import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeForCausalLM

from ...console.errors import ToolError
from .arguments import TASKS

BATCH_ON_CPU = 4
# In the order of `TASKS`.
PAPER = {
    "dense 182M": (19.45, 43.35, 54.40, 28.61, 31.09, 61.97, 28.52),
    "dense 469M": (21.50, 49.12, 56.88, 31.12, 36.74, 64.47, 30.53),
    "dense 978M": (21.93, 50.88, 60.24, 32.42, 41.06, 67.46, 31.77),
    "MoE 182M": (20.82, 45.03, 57.55, 29.84, 31.81, 63.28, 28.42),
    "MoE 469M": (23.63, 52.40, 53.94, 32.43, 43.64, 68.34, 31.48),
    "MoE 978M": (23.81, 52.90, 58.90, 35.01, 44.42, 67.90, 31.48),
    "ReMoE 182M": (20.22, 46.68, 54.16, 30.26, 35.94, 63.55, 29.38),
    "ReMoE 469M": (21.67, 53.16, 58.75, 33.80, 40.66, 67.95, 31.20),
    "ReMoE 978M": (24.06, 55.26, 57.28, 35.93, 44.42, 68.99, 30.43),
}


def score(
    args: argparse.Namespace, model: RemoeForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Score lm-eval's tasks, whose data comes from the Hugging Face hub, and a user's own in --task-data.

    Args:
        args: the command line's; --tasks, --task-data, --task-cache and --limit count here.
        model: to score.
        tokenizer: its own.

    Returns:
        "task" (or group), "metric" (with a filter's name: "metric,filter"), "value", standard "error" (None if
        unknown), number of "documents", of each metric.

    Raises:
        ToolError: lm-eval is not installed, a task is unknown, or its data cannot be read.
    """
    if args.task_data is not None and not args.task_data.is_dir():
        raise ToolError(f"--task-data {args.task_data}: is no folder.", "REMOE-E501")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ToolError(f"--tasks: needs lm-eval ({error}). Run: pip install 'lm-eval[hf]'.", "REMOE-E504") from error
    tasks, manager = args.tasks or [*TASKS], TaskManager(include_path=args.task_data)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ToolError(f"--tasks {unknown[0]}: is no task of lm-eval, nor of --task-data.", "REMOE-E504")
    language_model = HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer,
        # Its choice starts with 64 of the longest request, which takes a CPU minutes and memory.
        batch_size="auto" if model.device.type == "cuda" else BATCH_ON_CPU,
        max_length=model.config.max_position_embeddings,
    )
    answers = None if args.task_cache is None else f"{args.task_cache}-{fingerprint(model, tokenizer)}"
    settings = {"num_fewshot": 0, "use_cache": answers, "limit": args.limit, "log_samples": False}
    try:
        scored = simple_evaluate(model=language_model, tasks=tasks, task_manager=manager, **settings)
    except OSError as error:
        raise ToolError(
            f"--tasks: {error}. Without the hub give tasks with local data in --task-data.", "REMOE-E504"
        ) from error
    scores = []
    for task, results in scored["results"].items():
        for key, value in results.items():
            metric, _, processing = key.partition(",")
            if processing and not metric.endswith("_stderr"):
                deviation = results.get(f"{metric}_stderr,{processing}", "N/A")
                one = {"task": task, "metric": key.removesuffix(",none"), "value": value}
                one["error"] = None if deviation == "N/A" else deviation
                scores.append(one | {"documents": results["sample_len"]})
    return scores


def fingerprint(model: RemoeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a name that differs for each model and tokenizer."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps([model.config.to_dict(), vocabulary], default=str).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def compare_with_paper(results: dict[str, list[dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows: accuracies in per cent of the paper's tasks, and their mean if all seven were scored."""
    measured = {
        name: {one["task"]: 100 * one["value"] for one in scores if one["metric"] == "acc"}
        for name, scores in results.items()
    }
    tasks = [task for task in TASKS if any(task in values for values in measured.values())]
    papers = {f"paper, {name}": dict(zip(TASKS, row, strict=True)) for name, row in PAPER.items()}
    titles, has_mean, rows = ["", *(TASKS[task] for task in tasks)], len(tasks) == len(TASKS), []
    if has_mean:
        titles.append("mean")
    for name, values in (measured | papers).items():
        cells = [values[task] for task in tasks]
        if has_mean:
            cells.append(sum(cells) / len(cells))
        rows.append([name, *(f"{cell:.2f}" for cell in cells)])
    return titles, rows
