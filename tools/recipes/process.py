"""Run a training command and keep its log. At Ctrl-C, SIGTERM or a closed terminal, let it save a checkpoint first."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from ..console.flags import group_by_flag

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_BYTES = 2**16  # the end of a log that is searched for the program's last error
STOPPED = 143  # exit code of a training run that a signal stopped


def _signal_training(launcher: int, wanted: signal.Signals) -> None:
    """Signal the training processes, torchrun's children, which have their own sessions.

    They start with SIGTERM ignored and change that soon after. Wait until then, or the signal would be lost.
    """
    parent = psutil.Process(launcher)
    while parent.status() != psutil.STATUS_ZOMBIE:
        children = parent.children()
        if children and (wanted == signal.SIGKILL or not any(_ignores_sigterm(child.pid) for child in children)):
            for child in children:
                child.send_signal(wanted)
            return
        time.sleep(0.5)


def _ignores_sigterm(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False  # it has ended, or this is not Linux
    ignored = next((line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")), "0")
    return bool(int(ignored, 16) >> (signal.SIGTERM - 1) & 1)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the training processes inherit this


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal might be closed
        print(text, flush=True)


def last_error(text: str) -> str:
    """Return the program's last error in its output, or "". torchrun prints about a hundred lines below the error."""
    errors = re.findall(r"^\S+\.py: error: .*?(?=^[EW]\d{4} |^Traceback |\Z)", text, re.MULTILINE | re.DOTALL)
    return errors[-1].strip() if errors else ""


def run_training(command: Sequence[str], log: Path) -> int:
    """Run the command of a training run to its end.

    Args:
        command: program and arguments.
        log: the run's output is appended to this file and printed; its last error is printed again at the end.

    Returns:
        The exit code, 128 + n after signal n; `STOPPED` if a signal to this process ended the run without an error.
    """
    start, stopping = log.stat().st_size if log.exists() else 0, False
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is a run to stop
    # The run and tee get a process group each: a terminal's Ctrl-C reaches only this process. They ignore signals:
    # tee has to write the last line, and torchrun would limit the time for saving.
    job = subprocess.Popen(
        command, env=os.environ | {"PET_SIGNALS_TO_HANDLE": "SIGHUP"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0, preexec_fn=_ignore_signals,
    )  # fmt: skip
    assert job.stdout is not None
    tee = subprocess.Popen(["tee", "-a", str(log)], stdin=job.stdout, process_group=0, preexec_fn=_ignore_signals)
    job.stdout.close()

    def stop(number: int, _: FrameType | None) -> None:
        """Let the run save; a second Ctrl-C kills it. Other signals do not, as schedulers send several."""
        nonlocal stopping
        if stopping and number != signal.SIGINT:
            return
        wanted = signal.SIGKILL if stopping else signal.SIGTERM
        if not stopping:
            _say("Saving a checkpoint; a second Ctrl-C ends at once, without one.")
        stopping = True
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            _signal_training(job.pid, wanted)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = job.wait()
    with contextlib.suppress(subprocess.TimeoutExpired):
        tee.wait(60)  # --async-save's worker outlives a killed rank, and keeps the pipe open
    error = ""
    if code:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - LAST_BYTES))
            error = last_error(file.read().decode(errors="replace"))
    if error:
        print(f"\n{error}", file=sys.stderr, flush=True)
    elif stopping:
        same = "The same command" + " without --ckpt-step" * ("--ckpt-step" in group_by_flag(command))
        _say(f"Stopped. {same} continues from the last checkpoint; the log is {log}")
        return STOPPED
    return code if code >= 0 else 128 - code
