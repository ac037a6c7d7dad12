"""The command `remoe`: start a tool, in a clone or from an installed package."""

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Command → module that has `main`, and one line of help.
COMMANDS = {
    "train": ("train", "train a model of the paper: remoe train SIZE ROUTING [its script's arguments]"),
    "quickstart": ("experiments.quickstart", "train three tiny models on a CPU and compare them"),
    "sweep": ("experiments.sweep", "print commands for the paper's grids, or train tiny models, and tabulate"),
    "compare": ("experiments.compare", "compare routings at equal steps and equal FLOPs"),
    "preprocess": ("preprocess_data", "turn text into a data set for Megatron"),
    "inspect": ("text.inspect_data", "show the documents of a data set, and check it"),
    "cost": ("plan.cost", "estimate parameters, FLOPs, hours and memory of a training run"),
    "rehearse": ("plan.rehearse", "rehearse a GPU training run without GPUs"),
    "generate": ("models.generate", "continue a text"),
    "evaluate": ("models.evaluate", "measure loss and experts per token"),
    "analyze": ("models.analyze.command", "analyze how a model routes held-out text"),
    "report": ("report.command", "compare runs on one HTML page"),
    "convert": ("models.convert.command", "make a ReMoE from a dense or top-k model, or convert a checkpoint"),
    "export": ("models.export", "write a model for transformers, or read one"),
}
BUILDS_ON_CPU = ("export", "convert")  # even if there is an accelerator
IMPORT_TORCH = (*BUILDS_ON_CPU, "generate", "evaluate", "analyze")
# Packages of the extras that a command imports late, after minutes of work.
NEEDED_LATE = {"quickstart": ("tokenizers", "matplotlib"), "analyze": ("matplotlib",), "sweep": ("matplotlib",)}
NEEDED_LATE["compare"] = NEEDED_LATE["quickstart"]


def run_command(command: str, arguments: Sequence[str]) -> int:
    """Run a command of `COMMANDS` and return its exit code: 2 if Python is too old or a package is missing."""
    if sys.version_info < (3, 12):  # noqa: UP036 - older ones are started by mistake
        return _refuse(f"is Python {sys.version.split()[0]}, and 3.12 or newer is needed")
    try:
        return int(_load(command, arguments).main(arguments) or 0)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith(("megatron.remoe", "tools.")):
            raise
        return _refuse(f"has no {missing.name}")


def _load(command: str, arguments: Sequence[str]) -> Any:
    """Check a tool's arguments and packages where that saves time, then import and return its module."""
    module = f"{__package__}.{COMMANDS[command][0]}"
    if command in IMPORT_TORCH:
        from .models import arguments as parsers

        getattr(parsers, f"parse_{command}")(arguments)  # answers --help at once
        from megatron.remoe.start.unhelpful_warnings import hide_unhelpful_warnings

        hide_unhelpful_warnings()
    for name in NEEDED_LATE.get(command, ()):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    if command in BUILDS_ON_CPU:
        from .recipes.on_cpu import megatron_on_cpu

        megatron_on_cpu()
    return importlib.import_module(module)


def _refuse(problem: str) -> int:
    root = Path(__file__).resolve().parents[1]
    remedy = f"Use {root}/.venv/bin/python, which bash {root}/scripts/setup.sh makes"
    if __package__ != "tools":
        remedy = "Install it with: pip install '.[tools,report,hf]' in a clone"
    print(f"error: {sys.executable} {problem}. {remedy}.", file=sys.stderr)
    return 2


def main() -> int:
    """Run the command that the first argument names."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        sys.argv[:2] = [f"remoe {command}"]
        return run_command(command, arguments)
    if command == "--version":
        from megatron.remoe import __version__

        print(__version__)
    elif command in ("-h", "--help"):
        lines = [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
        print("usage: remoe COMMAND ...", "", *lines, "", "remoe COMMAND --help lists a command's options.", sep="\n")
    else:
        similar = " or ".join(difflib.get_close_matches(command, COMMANDS))
        remedy = f"Did you mean {similar}?" if similar else "remoe --help lists the commands."
        print(f"error: there is no command {command}. {remedy}", file=sys.stderr)
        return 2
    return 0
