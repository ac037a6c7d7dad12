"""Lock files, and write them atomically: others see the old or the new file. Find the cache folder."""

import errno
import fcntl
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary file's path, wait until the file is on the disk, and rename it to `path`.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    aside = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")  # process ids repeat across containers
    try:
        write(aside)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def find_cache_folder() -> Path:
    """Return a folder for files that can be made again: in $XDG_CACHE_HOME or ~/.cache, or else among temporary files.

    Compiled helpers are loaded from it. A temporary folder that others can write to, or own, is not used.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-remoe"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # it can be written
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder, as an unknown user in a container
        folder = Path(tempfile.gettempdir()) / f"megatron-remoe-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def take_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed, here and in processes that inherit it.

    Returns:
        False if another process holds the lock. On a file system without locks, always True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True
