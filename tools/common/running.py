"""Run a tool and turn errors and signals into messages and exit codes."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

from megatron.remoe.data.errors import UsageError, with_code


def run_once(tool: str, work: Callable[[], object], stopped: str = "stopped") -> int:
    """Run a tool and return the exit code: 0, 1 after an error, 130 after Ctrl-C or SIGTERM.

    Args:
        tool: its name, for messages.
        work: raises UsageError or OSError for errors that the user can fix.
        stopped: the message after an interruption.
    """
    _interrupt_at(signal.SIGTERM)
    try:
        work()
    except UsageError as error:
        print(f"{tool}: error: {with_code(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        place = error.filename2 or error.filename
        reason = f"{place}: {error.strerror}. Give another file or folder" if place else str(error)
        print(f"{tool}: error: {reason}. [REMOE-E300]", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{tool}: {stopped}.", file=sys.stderr)
        return 130
    return 0


def run_resumable(work: Callable[[], int]) -> int:
    """Run a tool that resumes from its --output-dir and return the exit code."""
    errors = Console(stderr=True)
    _interrupt_at(signal.SIGTERM, signal.SIGHUP)
    try:
        return work()
    except UsageError as error:
        errors.print(with_code(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return getattr(error, "exit_code", 1)
    except OSError as error:
        errors.print(f"{error}. Give --output-dir a writable folder with enough space.", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print("\nStopped. The same command goes on from here.", highlight=False)
        return 130


def _interrupt_at(*numbers: signal.Signals) -> None:
    """Raise KeyboardInterrupt at these signals; a forked worker ends, as a pool that terminates it expects."""
    owner = os.getpid()

    def interrupt(number: int, _frame: object) -> NoReturn:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
