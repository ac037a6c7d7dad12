"""How a tool ends: what the user can act on in red, and signals like Ctrl-C."""

import signal
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

from .errors import ToolError


def interrupt_at(*numbers: signal.Signals) -> None:
    """Let these signals interrupt the program as Ctrl-C does."""
    for number in numbers:
        signal.signal(number, _interrupt)


def run_to_the_end(work: Callable[[], int]) -> int:
    """Do the work of a tool that writes to --output-dir and goes on where it was stopped; returns the exit code."""
    errors = Console(stderr=True)
    interrupt_at(signal.SIGTERM, signal.SIGHUP)
    try:
        return work()
    except ToolError as error:
        errors.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return error.exit_code
    except OSError as error:
        errors.print(f"{error}. Give --output-dir a folder with room that can be written.", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print("\nStopped. The same command goes on from here.", highlight=False)
        return 130


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
