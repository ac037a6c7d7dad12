"""Start a tool: `python tools/NAME` in a clone, `remoe COMMAND` from an installed package."""

import gc
import importlib
import sys
from collections.abc import Callable, Sequence

# Command of `remoe` → module that has `main`, and one line of help.
COMMANDS = {
    "train": ("recipes", "train one of the paper's models: remoe train SIZE ROUTING [arguments of its launch script]"),
    "quickstart": ("quickstart", "train three tiny models on a CPU and compare them"),
    "preprocess": ("preprocess_data", "turn text into a data set for Megatron"),
    "inspect": ("inspect_data", "show what a data set holds, and check it"),
    "cost": ("cost", "estimate parameters, FLOPs, hours and memory of a training"),
    "generate": ("generate", "continue a text"),
    "evaluate": ("evaluate", "measure loss, speed or zero-shot tasks"),
    "analyze": ("analyze", "show what the routers have learned"),
    "report": ("report", "compare runs on one HTML page"),
    "convert": ("convert_checkpoint", "make a ReMoE from a dense or top-k model, import one, change its class"),
    "export": ("export_hf", "write a model for transformers, or read one"),
}
BUILDS_ON_CPU = ("export_hf", "convert_checkpoint")  # also where there is an accelerator
IMPORT_TORCH = (*BUILDS_ON_CPU, "generate", "evaluate", "analyze")


def start(tool: str, arguments: Sequence[str]) -> int:
    """Run a tool and return its exit code; name the Python to use if a package is missing."""
    if sys.version_info < (3, 12):  # noqa: UP036 - older ones are started by mistake
        return _refuse(f"is Python {sys.version.split()[0]}, and 3.12 or newer is needed")
    try:
        return int(_load(tool, arguments)(arguments) or 0)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith(("megatron.remoe", "tools.")):
            raise
        return _refuse(f"has no {missing.name}")


def _load(tool: str, arguments: Sequence[str]) -> Callable[[Sequence[str]], int | None]:
    """Import a tool and return its `main`."""
    module = f"{__package__}.{tool}"
    gc.disable()  # looking for garbage among what imports made takes an eighth of the start
    try:
        if tool in IMPORT_TORCH:
            importlib.import_module(f"{module}.arguments").parse_arguments(arguments)  # answers --help at once
            importlib.import_module("megatron.remoe.preflight.console").hide_unhelpful_warnings()
        if tool in BUILDS_ON_CPU:
            importlib.import_module(f"{__package__}.common.on_cpu").megatron_on_cpu()
        return importlib.import_module(module if tool.endswith("_data") else f"{module}.command").main
    finally:
        gc.enable()


def _refuse(problem: str) -> int:
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    python = root / ".venv" / "bin" / "python"
    is_other = python.exists() and sys.prefix != str(root / ".venv")
    remedy = f"Use {python}" if is_other else f"Run bash {root}/scripts/setup.sh, which makes {python}"
    if __package__ != "tools":
        remedy = "Install it with: pip install '.[tools,report,hf]' in a clone"
    print(f"error: {sys.executable} {problem}. {remedy}.", file=sys.stderr)
    return 2


def main() -> int:
    """Run the command that the first argument names."""
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if command in COMMANDS:
        sys.argv[:2] = [f"remoe {command}"]
        return start(COMMANDS[command][0], arguments)
    lines = [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
    usage = "\n".join(["usage: remoe COMMAND ...", "", *lines, "", "remoe COMMAND --help lists a command's options."])
    is_help = command in ("-h", "--help")
    print(usage if is_help else f"{usage}\nerror: there is no command {command}", file=None if is_help else sys.stderr)
    return 0 if is_help else 2
