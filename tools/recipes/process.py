"""Run a training and keep its log; let it save a checkpoint at Ctrl-C and SIGTERM."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_BYTES = 2**16  # end of a log that is searched for the program's last message
STOPPED = 143  # exit code of a training that saved at a signal


class _Training:
    """A running training that signals stop."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        # Both get their own process group, so that a terminal's Ctrl-C reaches only this process. They ignore signals:
        # tee has to write the last line, and torchrun would limit the time for saving.
        self._job = subprocess.Popen(
            command, env=os.environ | {"PET_SIGNALS_TO_HANDLE": "SIGHUP"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0, preexec_fn=_ignore_signals,
        )  # fmt: skip
        assert self._job.stdout is not None
        self._log = subprocess.Popen(
            ["tee", "-a", str(log)], stdin=self._job.stdout, process_group=0, preexec_fn=_ignore_signals
        )
        self._job.stdout.close()
        # The signal that the handler wants to send, and the one that was sent. Each is set in one place only, because
        # the handler may interrupt `_send`.
        self._wanted: signal.Signals | None = None
        self._sent: signal.Signals | None = None
        self.stopping = False

    def stop(self, number: int, _: FrameType | None) -> None:
        """Let the training save; a second Ctrl-C kills it. A second SIGTERM does not, as schedulers send several."""
        if not self.stopping:
            self.stopping, self._wanted = True, signal.SIGTERM
            print("Saving a checkpoint; a second Ctrl-C ends at once, without one.", flush=True)
        elif number == signal.SIGINT:
            self._wanted = signal.SIGKILL

    def _send(self) -> None:
        """Send the signal to the training processes, torchrun's children, which have their own sessions.

        They start with SIGTERM ignored and change that soon after. Wait until then, or the signal would be lost.
        """
        wanted = self._wanted
        if wanted is None or wanted == self._sent:
            return
        children = psutil.Process(self._job.pid).children()
        if not children or (wanted == signal.SIGTERM and any(_ignores_sigterm(child.pid) for child in children)):
            return
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(wanted)
        self._sent = wanted

    def wait(self) -> int:
        """Return the exit code, once all output is in the log."""
        while True:
            try:
                code = self._job.wait(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                self._send()
        self._log.wait()
        return code


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


def _last_error(log: Path, start: int) -> str:
    """Return the program's last message in a log after `start`; torchrun prints a hundred lines below it."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - LAST_BYTES))
        text = file.read().decode(errors="replace")
    errors = re.findall(r"^\S+\.py: error: .*?(?=^[EW]\d{4} |^Traceback |\Z)", text, re.MULTILINE | re.DOTALL)
    return errors[-1].strip() if errors else ""


def run_training(command: Sequence[str], log: Path) -> int:
    """Run a training to its end.

    Args:
        command: its words.
        log: the training's output is appended to this file and printed; its last error is printed again at the end.

    Returns:
        Its exit code; `STOPPED` if Ctrl-C or SIGTERM ended it without an error.
    """
    start = log.stat().st_size if log.exists() else 0
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is something to stop
    try:
        training = _Training(command, log)
        for number in SIGNALS:
            signal.signal(number, training.stop)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = training.wait()
    if code and (error := _last_error(log, start)):
        print(f"\n{error}", file=sys.stderr, flush=True)
    elif training.stopping:
        print(f"Stopped. The same command goes on from the last checkpoint; the log is {log}", flush=True)
        return STOPPED
    return code if code >= 0 else 128 - code
