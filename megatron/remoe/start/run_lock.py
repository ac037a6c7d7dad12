"""Allow one training at a time in a --save folder: refuse a second one, and take over the lock of a dead one."""

import argparse
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from megatron.remoe.files.errors import UsageError
from megatron.remoe.files.files import sync, write_text
from megatron.remoe.start.environment import make_writable_folder

LOCK, HOLDER = "training.lock", "training.lock.holder"
HEARTBEAT_SECONDS = 5.0
# Building the data's index can block the interpreter for minutes, without a heartbeat.
LEASE_SECONDS = 300.0
SPARE_SECONDS = 2.0


@contextmanager
def lock_save_folder(args: argparse.Namespace, lease_seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Lock the --save folder on the first rank. Do nothing if nothing is trained or saved.

    The lock is a file with a heartbeat, which works on any file system that machines share. Its holder counts as dead
    if its process no longer exists on this machine, or if there was no heartbeat for `lease_seconds`.

    Args:
        args: Megatron's parsed arguments.
        lease_seconds: the same for all trainings that share a folder.

    Raises:
        UsageError: after the heartbeat of another training, whose host, process and start it names; or after
            `lease_seconds` if the lock is not from this program.
        DataError: the folder cannot be written.
    """
    if args.rank or args.skip_train or not args.save or "://" in args.save:
        yield
        return
    make_writable_folder("--save", args.save)
    lock, holder = Path(args.save, LOCK), Path(args.save, HOLDER)
    beats = min(HEARTBEAT_SECONDS, lease_seconds / 3)
    lease = SoftFileLease(lock, lease_duration=lease_seconds, heartbeat_interval=beats, on_compromise=_lost)
    _acquire(lease, holder, lease_seconds)
    try:
        sync(lock)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, started {started}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lease.release()


def _acquire(lease: SoftFileLease, holder: Path, lease_seconds: float) -> None:
    lock, save, started, beat = Path(lease.lock_file), f"--save {holder.parent}", time.monotonic(), 0
    while True:
        try:
            lease.acquire(timeout=0)
            return
        except (Timeout, LeaseSettingsMismatch):
            waited = time.monotonic() - started
        try:
            before, beat = beat, lock.lstat().st_mtime_ns
            who = holder.read_text(errors="replace") if holder.is_file() else "one that has just started"
        except FileNotFoundError:
            continue  # it has ended
        if before not in (0, beat):
            raise UsageError(
                f"{save}: another training writes there: {who}. Wait until it ends, stop it, or give another --save.",
                "REMOE-E103",
            )
        if waited > lease_seconds + SPARE_SECONDS:
            raise UsageError(
                f"{save}: {lock} is not from this version of the program, and nothing has changed it for "
                f"{waited:.0f} s. If no training runs there, remove it.",
                "REMOE-E104",
            )
        if not before:
            locked = f"is locked by another training: {who}. Waiting for a sign of life, up to {lease_seconds:.0f} s."
            print(f"{save} {locked}", file=sys.stderr, flush=True)
        time.sleep(min(HEARTBEAT_SECONDS, lease_seconds) / 10)


def _lost(compromise: LeaseCompromise) -> None:
    words = f"{compromise.lock_file} was lost ({compromise.reason})"
    if compromise.reason != "owner-changed":
        print(f"{words}: another training could start in the same --save folder.", file=sys.stderr, flush=True)
        return
    print(f"error: {words}: another training took it over, and this one ends.", file=sys.stderr, flush=True)
    os._exit(1)  # in a thread: the run must not save again
