"""Score zero-shot tasks with lm-eval."""

import argparse
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeForCausalLM

from ...console.errors import ToolError
from ..arguments import TASKS

BATCH_ON_CPU = 4


def score(
    args: argparse.Namespace, model: RemoeForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Score tasks of lm-eval, whose data comes from the Hugging Face hub, and the user's tasks in --task-data.

    Args:
        args: of the command line; --tasks, --task-data and --limit are used.
        model: to score.
        tokenizer: of the model.

    Returns:
        The rows of `read_scores`.

    Raises:
        ToolError: lm-eval is not installed, a task is unknown, or its data cannot be read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        remedy = "Run: pip install 'lm-eval[hf]'; in a clone with -c requirements.txt."
        raise ToolError(f"--tasks: needs lm-eval ({error}). {remedy}", "REMOE-E504") from error
    tasks, manager = args.tasks or [*TASKS], TaskManager(include_path=args.task_data)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ToolError(f"--tasks {unknown[0]}: is no task of lm-eval, nor of --task-data.", "REMOE-E504")
    language_model = HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer,
        # "auto" starts with a batch of 64 of the longest request, which costs a CPU minutes and much memory.
        batch_size="auto" if model.device.type == "cuda" else BATCH_ON_CPU,
        max_length=model.config.max_position_embeddings,
    )
    settings = {"num_fewshot": 0, "limit": args.limit, "log_samples": False}
    try:
        scored = simple_evaluate(model=language_model, tasks=tasks, task_manager=manager, **settings)
    except OSError as error:
        raise ToolError(
            f"--tasks: {error}. Without the hub give tasks with local data in --task-data.", "REMOE-E504"
        ) from error
    return read_scores(scored["results"])


def read_scores(scored: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each metric of each task in lm-eval's results.

    A row has the "task" (or group), "metric" (with a filter's name: "metric,filter"), "value", standard "error" (None
    if unknown), and number of "documents".
    """
    scores = []
    for task, results in scored.items():
        for key, value in results.items():
            metric, _, processing = key.partition(",")
            if processing and not metric.endswith("_stderr"):
                deviation = results.get(f"{metric}_stderr,{processing}", "N/A")
                row = {"task": task, "metric": key.removesuffix(",none"), "value": value}
                row["error"] = None if deviation == "N/A" else deviation
                scores.append(row | {"documents": results["sample_len"]})
    return scores
