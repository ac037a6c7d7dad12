"""Measure, show and write the results of trained models."""

import argparse
from typing import Any

from ...console.display import print_table
from ...console.files import write_json
from ...runs import evaluations
from ...runs.running import make_main
from ..arguments import parse_evaluate
from ..hf.opening import open_model
from .tasks import score
from .text import measure_speed, measure_text


def show(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    for titles, rows in evaluations.make_tables(results):
        print_table(titles, rows, text=len(titles))
        for title, text in evaluations.EXPLAINED.items():
            if title in titles and any(row[titles.index(title)] for row in rows):
                print(text)


def evaluate(args: argparse.Namespace) -> None:
    """Measure, show and write the results; after an error or a stop, only those that are complete.

    Raises:
        UsageError: something is wrong with the flags, a model or the data.
        OSError: --output cannot be written.
    """
    results: dict[str, Any] = {}
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        options = args.ckpt_step, args.tokenizer_model, args.tasks is not None
        models = {str(place): open_model(place, *options) for place in args.load}
        if args.data_path:
            measure_text(args, models, results)
            if args.speed:
                results["speed"] = measure_speed(args, models)
        if args.tasks is not None:
            for name, (model, tokenizer, _) in models.items():
                assert tokenizer is not None
                results.setdefault("tasks", {})[name] = score(args, model, tokenizer)
    finally:
        show(results)
        if args.output is not None and results:
            write_json(args.output, results)


main = make_main("evaluate", parse_evaluate, evaluate)
