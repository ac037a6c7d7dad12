"""Allow one training run at a time in a --save folder: refuse a second one, and take over the lock of a dead one."""

import argparse
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from megatron.remoe.files.errors import UsageError
from megatron.remoe.files.files import sync
from megatron.remoe.start.checks import make_writable_folder

LOCK = "training.lock"
HEARTBEAT_SECONDS = 5.0
# Building the data's index can block the interpreter for minutes, without a heartbeat.
LEASE_SECONDS = 300.0
SPARE_SECONDS = 2.0
SECONDS_TO_APPEAR = 10.0  # a network file system can show a new file late


@contextmanager
def lock_save_folder(args: argparse.Namespace, lease_seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Lock the --save folder on the first rank. Do nothing if nothing is trained or saved.

    The lock is a file with a heartbeat, which works on any file system that machines share. Its holder counts as dead
    if its process no longer exists on this machine, or if there was no heartbeat for `lease_seconds`.

    Args:
        args: Megatron's parsed arguments.
        lease_seconds: must be the same for all runs that share a folder.

    Raises:
        UsageError: another run is alive (the message names its host and process), or a lock that this program did not
            write is still there after `lease_seconds`.
        DataError: the folder cannot be written.
    """
    if args.rank or args.skip_train or not args.save or "://" in args.save:
        yield
        return
    make_writable_folder("--save", args.save)
    lock = Path(args.save, LOCK)
    beats = min(HEARTBEAT_SECONDS, lease_seconds / 3)
    lease = SoftFileLease(lock, lease_duration=lease_seconds, heartbeat_interval=beats, on_compromise=_lost)
    _acquire(lease, lock, lease_seconds)
    try:
        sync(lock)
        yield
    finally:
        lease.release()


def check_folders_are_shared(args: argparse.Namespace, model_chunks: list[Any]) -> list[Any]:
    """Check that every node sees the first rank's lock in --save, and that all ranks load the same checkpoint.

    Call it on all ranks, after torch.distributed starts.

    Args:
        args: Megatron's parsed arguments.
        model_chunks: the model; returned unchanged, as Megatron expects of a hook.

    Raises:
        UsageError: a node does not see the lock, or ranks chose different checkpoints. All ranks raise it.
    """
    is_unseen = bool(args.save and not args.skip_train and "://" not in args.save and args.local_rank == 0)
    end = time.monotonic() + SECONDS_TO_APPEAR
    while is_unseen and (is_unseen := not Path(args.save, LOCK).exists()) and time.monotonic() < end:
        time.sleep(0.5)
    answers = [("", "")] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, (socket.gethostname() if is_unseen else "", args.resume_folder))
    hosts, folders = ({*each} for each in zip(*answers, strict=True))
    if host := max(hosts):
        problem = f"{host} does not see the first node's {LOCK} there. Give a folder that all nodes share"
        raise UsageError(f"--save {args.save}: {problem}.", "REMOE-E105")
    if len(folders) > 1:
        problem = f"ranks read different checkpoints there ({', '.join(sorted(folders))})"
        raise UsageError(
            f"{args.resume_flag}: {problem}. Give a folder that all nodes share, or start again.",
            "REMOE-E105",
        )
    return model_chunks


def _acquire(lease: SoftFileLease, lock: Path, lease_seconds: float) -> None:
    started, beat = time.monotonic(), 0
    while True:
        try:
            lease.acquire(timeout=0)
            return
        except (Timeout, LeaseSettingsMismatch):
            waited = time.monotonic() - started
        try:
            before, beat = beat, lock.lstat().st_mtime_ns
            holder = ", ".join(re.findall("^(?:pid|host)=.*", lock.read_text(errors="replace"), re.MULTILINE))
        except FileNotFoundError:
            continue  # the other run has ended
        if before not in (0, beat) or waited > lease_seconds + SPARE_SECONDS:
            raise UsageError(
                f"--save {lock.parent}: another run writes there ({holder}). Wait until it ends, stop it, or give a "
                f"different --save. If there is no such run, remove {lock}.",
                "REMOE-E103",
            )
        if not before:
            locked = f"is locked by another run ({holder}). Waiting for a sign of life"
            print(f"--save {lock.parent} {locked}, up to {lease_seconds:.0f} s.", file=sys.stderr, flush=True)
        time.sleep(min(HEARTBEAT_SECONDS, lease_seconds) / 10)


def _lost(compromise: LeaseCompromise) -> None:
    words = f"{compromise.lock_file} was lost ({compromise.reason})"
    if compromise.reason != "owner-changed":
        print(f"{words}: another run could start in the same --save folder.", file=sys.stderr, flush=True)
        return
    print(f"error: {words}: another run took it over, and this one ends.", file=sys.stderr, flush=True)
    os._exit(1)  # sys.exit would end only this thread, and the run must not save again
