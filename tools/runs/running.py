"""Run a tool and turn errors and signals into messages and exit codes."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from megatron.remoe.files.errors import UsageError, with_code


def run_tool(tool: str, work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a tool and return the exit code of `work`, 1 or 2 after an error, or 130 after Ctrl-C or a signal.

    Args:
        tool: its name, for messages.
        work: raises UsageError or OSError for errors that the user can fix.
        stopped: the message after an interruption.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        return work() or 0
    except UsageError as error:
        print(f"{tool}: error: {with_code(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except BrokenPipeError:  # a pipe such as `... | head` has closed; leave nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = error.filename2 or error.filename
        reason = f"{place}: {error.strerror}. Give a different file or folder" if place else str(error)
        print(f"{tool}: error: {reason}. [REMOE-E300]", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{tool}: {stopped}.", file=sys.stderr)
        return 130


def make_main(
    tool: str,
    parse: Callable[[Sequence[str]], argparse.Namespace],
    work: Callable[[argparse.Namespace], None],
    stopped: str = "stopped",
) -> Callable[[Sequence[str]], int]:
    """Return a tool's main function, which parses the arguments and calls `run_tool`.

    Args:
        tool, stopped: as in `run_tool`.
        parse: parses a list of arguments.
        work: does the tool's work with the parsed arguments.
    """

    def main(arguments: Sequence[str]) -> int:
        args = parse(arguments)
        return run_tool(tool, lambda: work(args), stopped)

    return main
