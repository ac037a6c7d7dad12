"""Take a quickstart's three models through all that follows a training, and hold each step against the training.

python tools/after_training --runs runs/quickstart --task-data runs/olmo

Export → the folder alone, where Megatron is not installed: the validation losses that Megatron printed, and text →
back to a checkpoint, which trains on with the same losses → zero-shot tasks, and what fewer experts and tokens cost.
What is done is kept in FOLDER/after_training, and the same command goes on where it was stopped; with other code it
begins anew.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..common.display import Display
from ..common.errors import ToolError
from ..common.files import write_between, write_json
from ..common.flags import parse, words_of
from ..common.log_reader import series
from ..common.places import ROOT
from ..common.running import run_once
from ..evaluate.text import batches, sequences
from ..quickstart import models, stages
from . import alone, environment, tables
from .followed import PROMPT, Followed

TASKS = ("arc_easy", "lambada_openai")
BOUNDS = ("1", "2", "3", "4")
STEPS = 3  # of the trainings that go on
CODE = ("megatron/remoe", "tools/common", "tools/export_hf", "tools/after_training")  # that the models go through
VALIDATION = ("--full-validation", "--multiple-validation-sets", "--valid-data-path", "--validation-set-names")
PARTS = 5  # of a model's way


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="tools/after_training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "quickstart", metavar="FOLDER", help="a finished quickstart"
    )
    parser.add_argument("--task-data", type=Path, required=True, metavar="DIR", help="as for tools/evaluate")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results there, as JSON")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/huggingface.md")
    return parser.parse_args(arguments)


def program(*words: str | Path) -> str:
    """What one of the project's programs prints.

    Raises:
        ToolError: it failed.
    """
    return environment.printed_by([sys.executable, *words], ROOT, os.environ)


class Quickstart:
    """What a quickstart left."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ToolError: it is not a finished one.
        """
        self.folder = folder.resolve()
        try:
            self.seed = json.loads((folder / "summary.json").read_text())["seed"]
            self.train_tokens = json.loads((folder / "data" / "manifest.json").read_text())["tokens"]["train"]
        except (OSError, ValueError, KeyError) as error:
            raise ToolError(f"--runs {folder}: is not a finished quickstart ({error!r}). Run it first.") from error

    def held_out(self, domain: str) -> str:
        """Prefix of a domain's held-out text."""
        return models.data_prefix(self.folder / "data", "heldout", domain)

    def printed(self, model: str) -> dict[str, float]:
        """Domain → the last validation loss that Megatron printed."""
        log = (self.folder / model / "train.log").read_text()
        return {
            domain: float(re.findall(rf"validation-{domain} loss .* lm loss value: (\S+)", log)[-1])
            for domain in self.train_tokens
        }

    def next_losses(self, model: str, *flags: str | Path) -> list[float]:
        """Losses of the next steps of its training, from the weights that the flags name."""
        words = models.common_flags(models.SIZE, STEPS, self.seed) + models.model_flags(model, models.SIZE)
        words += models.data_flags(self.folder / "data", self.train_tokens)
        settings = {flag: values for flag, values in parse(words).items() if flag not in VALIDATION}
        words = [*words_of(settings), "--eval-iters", "0"]
        printed = program("pretrain_gpt.py", *words, *flags, "--seq-length", str(models.SIZE.sequence))
        return series(printed, "lm loss")


def follow(quickstart: Quickstart, model: str, scratch: Path, display: Display) -> Followed:
    """One model, there and back; its folder stays in `scratch`, where the held-out text is."""
    code = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    kept = scratch / f"{model}.json"
    inputs = stages.fingerprint_of_files([quickstart.folder / model / "done.json", *code])
    if stamp := stages.read_stamp(kept, inputs):
        display.advance(PARTS)
        return Followed(**stamp["followed"])
    for name in (model, f"{model}-back", f"{model}-environment"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    checkpoints, folder = quickstart.folder / model / "checkpoints", scratch / model
    exported = program("tools/export_hf", "--load", checkpoints, "--save", folder)
    display.advance(1)
    texts = [scratch / f"{domain}.pt" for domain in quickstart.train_tokens]
    python = environment.without_megatron(scratch / f"{model}-environment")
    found = json.loads(environment.run(python, alone.__file__, folder, PROMPT, *texts))
    display.advance(1)
    reversed_ = program("tools/export_hf", "--reverse", "--load", folder, "--save", scratch / f"{model}-back")
    display.advance(1)
    before = quickstart.next_losses(model, "--pretrained-checkpoint", checkpoints)
    display.advance(1)
    after = quickstart.next_losses(model, *shlex.split(reversed_[reversed_.index("--pretrained-checkpoint") :]))
    display.advance(1)
    followed = Followed(
        logits=float(exported.split("largest difference of logits ")[1].split()[0]),
        printed=quickstart.printed(model),
        alone=dict(zip(quickstart.train_tokens, found["losses"], strict=True)),
        text=found["text"],
        before=before,
        after=after,
    )
    write_json(kept, {"inputs": inputs, "followed": asdict(followed)})
    return followed


def measure(quickstart: Quickstart, task_data: Path, scratch: Path, display: Display) -> dict[str, Any]:
    """What tools/evaluate says of all three folders, and of the ReMoE's with fewer experts; see `tables.markdown`."""
    code = ["--data-path", quickstart.held_out(next(iter(quickstart.train_tokens)))]
    results = scratch / "results.json"
    folders = {model: str(scratch / model) for model in models.NAMES}
    tasks = ["--tasks", *TASKS, "--task-data", str(task_data.resolve()), "--task-cache", str(scratch / "answers")]
    program("tools/evaluate", "--load", *folders.values(), *code, "--speed", *tasks, "--output", results)
    found = json.loads(results.read_text())
    display.advance(1)
    bounds = [*code, "--max-experts-per-token", *BOUNDS]
    program("tools/evaluate", "--load", folders["remoe"], *bounds, "--output", results)
    display.advance(1)
    (by_bound,) = json.loads(results.read_text())["text"][folders["remoe"]].values()
    by_model = {what: {model: found[what][folder] for model, folder in folders.items()} for what in ("tasks", "speed")}
    return by_model | {"loss by K": {bound: one["loss"] for bound, one in by_bound.items()}}


def after_training(args: argparse.Namespace, display: Display) -> None:
    """Run, print and write.

    Raises:
        ToolError: something is not as it must be.
    """
    quickstart = Quickstart(args.runs)
    size = models.SIZE
    scratch = quickstart.folder / "after_training"
    scratch.mkdir(exist_ok=True)
    for domain in quickstart.train_tokens:
        data = sequences(quickstart.held_out(domain), size.sequence, quickstart.seed, size.vocabulary)
        torch.save(torch.cat(list(batches(data, None))), scratch / f"{domain}.pt")
    with display.step("three models", PARTS * len(models.NAMES) + 2), ThreadPoolExecutor() as threads:
        found = threads.map(lambda model: follow(quickstart, model, scratch, display), models.NAMES)
        followed = dict(zip(models.NAMES, found, strict=True))
        measured = measure(quickstart, args.task_data, scratch, display)
    text = tables.markdown(followed, measured)
    display.say(text)
    if args.output is not None:
        results = {"models": {model: asdict(one) for model, one in followed.items()}} | measured
        write_json(args.output, results)
    wrong = [f"{model}: {what}" for model, one in followed.items() for what in one.wrong()]
    if wrong:
        raise ToolError("\n".join(wrong))
    if args.write_docs:
        write_between(ROOT / "docs" / "huggingface.md", tables.BEGIN, tables.END, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 if something is wrong; 130 if it was stopped."""
    args = parse_arguments(arguments)

    def work() -> None:
        with Display() as display:
            after_training(args, display)

    return run_once("after_training", work, "stopped; the same command goes on from here")
