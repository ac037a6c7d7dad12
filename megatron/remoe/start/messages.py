"""Print why a run cannot start or has failed, and what to do."""

import argparse
import gc
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from megatron.remoe.files.errors import DataError, UsageError, with_code
from megatron.remoe.start.checkpoint_files import newest_complete
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, unwrap

LOST_WORKER = r"DataLoader worker .*(exited unexpectedly|is killed by signal)"
DISK_FULL = r"No space left on device|Disk quota exceeded|File too large"
# Pattern of an error → remedy.
REMEDIES = {
    LOST_WORKER: "A data loader process was killed, by a signal or for lack of memory.",
    r"EADDRINUSE|address already in use": "The port is in use: choose a different MASTER_PORT, or unset RANK.",
    r"Connection (reset by peer|closed by peer|was likely closed)|remote process exited|"
    r"NCCL.*(abort|remote|unhandled system)": "Another rank has ended: its last lines, or its exit code in torchrun's "
    "report, show the reason.",
    r"DistStoreError|DistNetworkError": "Not all ranks reached each other: start WORLD_SIZE of them, "
    "and check that all can reach MASTER_ADDR and MASTER_PORT of the first node.",
    r"gloo.*timed out|Watchdog caught collective": "Another rank has stopped or hangs: its log says where.",
    r"out of memory|can't allocate memory": "Use a smaller --micro-batch-size, more devices, or "
    "--recompute-granularity full with its flags.",
    DISK_FULL: "Free some space.",
    r"found (NaN|Inf) in|\bnan\b.*(loss|grad)|(loss|grad).*\bnan\b": "Lower --lr, or check the data. To resume, add "
    "--no-load-optim and --ckpt-step with an earlier iteration; leave both out of later starts.",
    r"OptimizerParamScheduler: class input value": "Give the checkpoint's values, or --override-opt_param-scheduler to "
    "follow the flags, or --use-checkpoint-opt_param-scheduler to follow the checkpoint.",
    r"Global shape mismatch|size mismatch|Missing key|not found in (the )?(checkpoint|sharded)|unexpected key|"
    r"from model not in state dict|from checkpoint .* is not equal to": "The checkpoint has a different model or "
    "layout: give its flags, a different --load, or convert it (remoe convert).",
}
LENGTH = 400
# Errors that a single rank can have, because machines may see different files.
SINGLE_RANK_ERRORS = (DataError, BrokenCheckpointError, OSError)
SECONDS_FOR_LOCAL_RANK_0, SECONDS_FOR_OTHERS = 2, 5


@contextmanager
def usage_errors() -> Iterator[None]:
    """End the process with exit code 2 and one message, without a traceback, if settings or files are refused.

    Only the first rank of each node prints errors of flags and the environment, which are the same on the whole node.
    Every rank prints errors of files, which might concern only this rank. All ranks but the first wait before they end:
    torchrun ends all ranks when one fails, and the first might not have printed yet. A rank that torchrun ends while it
    waits exits with code 0, because torchrun's report has seven lines for each failure.
    """
    try:
        yield
    except (ValueError, AssertionError, OSError) as error:
        number = os.environ.get("RANK", "0")
        if not (words := with_code(error)):  # an assertion without a message
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            words = f"Megatron refuses these settings: {frame.line} ({place})"
        if not isinstance(error, UsageError):
            words += _remedy(words)
        if number != "0":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            time.sleep(SECONDS_FOR_LOCAL_RANK_0 if os.environ.get("LOCAL_RANK") == "0" else SECONDS_FOR_OTHERS)
            words = f"rank {number} on {socket.gethostname()}: {words}"
        _report(words, "0" in (number, os.environ.get("LOCAL_RANK")) or isinstance(error, SINGLE_RANK_ERRORS))
        raise SystemExit(2) from error


def explain_flag_errors(parser: argparse.ArgumentParser) -> None:
    """Make the parser raise a `UsageError` for wrong flags, without 700 lines of usage. Repair what breaks --help."""
    parser.usage = parser.usage or "%(prog)s [--flag [value ...] ...]"

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}. --help lists all flags.")

    parser.error = refuse  # type: ignore[method-assign]
    # Some of Megatron's help texts contain a percent sign, with which --help would fail.
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def _report(words: str, prints: bool = True) -> None:
    """Print an error on standard error under the name of the started program, and hand it to torchrun's report."""
    sys.stdout.flush()
    if prints:
        print(f"{os.path.basename(sys.argv[0])}: error: {words}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": words, "extraInfo": {"timestamp": int(time.time())}}}, file)


def exit_with_message(error: BaseException) -> NoReturn:
    """Print a traceback, unless the user can correct the error, and one short message. End with exit code 1."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as another rank has ended
    cause = unwrap(error)
    if not (isinstance(cause, UsageError) or re.search(LOST_WORKER, str(error))):
        traceback.print_exception(error)
    # Half-built objects print errors when they are freed. Free them before the message.
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    rank = f"rank {os.environ.get('RANK')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    _report(rank + describe_error(cause))
    raise SystemExit(1)


def describe_error(error: BaseException) -> str:
    """Return a `UsageError`'s message with its code, or another error's type and first line, and a remedy."""
    if isinstance(error, UsageError):
        return with_code(error)
    text, kind = str(error).strip(), type(error).__name__
    lines = text.splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1].strip()}"
    reason = f"{kind}: {lines[0]}" if lines else kind
    return (reason if len(reason) <= LENGTH else reason[:LENGTH] + " ...") + _remedy(f"{kind}: {text}")


def _remedy(text: str) -> str:
    """Return the remedy for an error as a line below it, or ""."""
    for pattern, remedy in REMEDIES.items():
        if re.search(pattern, text, re.IGNORECASE):
            return f"\n{remedy}" + (f" {newest_save()}" if pattern in (LOST_WORKER, DISK_FULL) else "")
    return ""


def newest_save() -> str:
    """Return a sentence with the newest complete checkpoint in --save, or "" if the run does not save."""
    from megatron.training.global_vars import get_args

    try:
        save = get_args().save
    except AssertionError:  # the flags are not parsed yet
        return ""
    if not save or "://" in save:
        return ""
    newest = newest_complete(Path(save))
    held = "no whole checkpoint" if newest is None else f"the whole checkpoint of iteration {newest}"
    return f"--save {save} holds {held}."
