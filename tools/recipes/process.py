"""Run a training command and keep its log. At Ctrl-C, SIGTERM or a closed terminal, let it save a checkpoint first."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from ..console.flags import group_by_flag
from .layout import RecipeError

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


def first_exit_code(text: str) -> int:
    """Return the exit code of the process that failed first, in torchrun's report; 1 if there is no report."""
    codes = re.findall(r"^Root Cause .*?^ *exitcode *: (-?\d+)", text, re.MULTILINE | re.DOTALL)
    return int(codes[-1]) if codes else 1


@contextlib.contextmanager
def open_log(log: Path) -> Iterator[int]:
    """Create the log of a run, lock it, and return its descriptor. The lock lasts until no process holds that.

    Raises:
        RecipeError: another run writes to the log, or the file cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a")
    except OSError as error:
        raise RecipeError(f"OUTPUT_DIR={log.parent} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "Wait until it ends, stop it, or set a different OUTPUT_DIR"
            raise RecipeError(f"OUTPUT_DIR={log.parent}: another run writes there. {remedy}") from error
        except OSError:  # a file system without locks: Megatron's processes still find the lock in --save
            _say(f"{log} cannot be locked: do not start a second run with this OUTPUT_DIR.")
        yield file.fileno()


def _describe_stop(command: Sequence[str]) -> str:
    from megatron.remoe.start.checkpoint_files import newest_iteration  # imports PyTorch

    flags = group_by_flag(command)
    save = "".join(flags.get("--save", ()))
    newest = newest_iteration(Path(save))
    if not newest and "://" not in save:
        return "Stopped before the first checkpoint. The same command starts again"
    same = "The same command" + " without --ckpt-step" * ("--ckpt-step" in flags)
    return f"Stopped. {same} continues from " + (f"iteration {newest}" if newest else "the last checkpoint")


def run_training(command: Sequence[str], log: Path, title: str = "") -> int:
    """Run the command of a training run to its end.

    Args:
        command: program and arguments.
        log: `title` and the run's output are appended to this file; the output is printed, and its last error again at
            the end.
        title: a line for the log.

    Returns:
        The exit code of the process that failed first, 128 + n after signal n; `STOPPED` if a signal to this process
        ended the run without an error.

    Raises:
        RecipeError: another run writes to the log, or the file cannot be written.
    """
    with open_log(log) as file:
        os.write(file, title.encode())
        return _run(command, log, file)


def _run(command: Sequence[str], log: Path, file: int) -> int:
    start, stopping = log.stat().st_size, False
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is a run to stop
    # The run and tee get a process group each: a terminal's Ctrl-C reaches only this process. They ignore signals:
    # tee has to write the last line, and torchrun would limit the time for saving.
    job = subprocess.Popen(
        command, env=os.environ | {"PET_SIGNALS_TO_HANDLE": "SIGHUP"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0, preexec_fn=_ignore_signals,
    )  # fmt: skip
    assert job.stdout is not None
    tee = subprocess.Popen(
        ["tee", "-a", str(log)], stdin=job.stdout, process_group=0, preexec_fn=_ignore_signals, pass_fds=[file],
    )  # fmt: skip
    job.stdout.close()

    def stop(number: int, _: FrameType | None) -> None:
        """Let the run save; a second Ctrl-C kills it. Other signals do not, as schedulers send several."""
        nonlocal stopping
        if stopping and number != signal.SIGINT:
            return
        wanted = signal.SIGKILL if stopping else signal.SIGTERM
        if not stopping:
            _say("Stopping; a run that trains saves a checkpoint first. A second Ctrl-C ends at once, without one.")
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
        with log.open("rb") as output:
            output.seek(max(start, log.stat().st_size - LAST_BYTES))
            text = output.read().decode(errors="replace")
        error = last_error(text)
        code = first_exit_code(text) if code == 1 else code  # torchrun's own
    if error:
        print(f"\n{error}", file=sys.stderr, flush=True)
    elif stopping:
        _say(f"{_describe_stop(command)}; the log is {log}")
        return STOPPED
    return code if code >= 0 else 128 - code
