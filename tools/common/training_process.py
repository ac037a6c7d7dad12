"""Start a training as a process, and stop it."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    keep_open: IO[str],
    folder: Path | None = None,
    output: IO[str] | int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start a training that Ctrl-C does not reach: `end` stops it. The process also holds the lock of `keep_open`."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(keep_open.fileno(),),
    )


def end(process: subprocess.Popen[str], signal_number: signal.Signals, seconds: float) -> str | None:
    """Ask a process to end, and kill it if it does not within `seconds`.

    Returns:
        The rest of its output, "" if that goes to a file; None if it was killed.
    """
    process.send_signal(signal_number)
    try:
        return process.communicate(timeout=seconds)[0] or ""
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()  # no effect after it has ended
        process.wait()
