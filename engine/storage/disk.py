"""What the file system does besides reading and writing: directories that last, room, and its errors in our words.

A name is durable when the directory that has it is synced, not before: `fsync` of a file says nothing of its name.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from engine.errors import ConfigError, StorageFailed, StorageFull

_WRONG_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
_making_directories = threading.Lock()


@contextlib.contextmanager
def os_errors_translated(what: str) -> Iterator[None]:
    """What an error of the file system means to the engine; `what`: was being done."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                raise StorageFull(f"The disk is full: {what} failed. Try again when there is room.") from error
            case number if number in _WRONG_PATH:
                raise ConfigError(f"{what} failed: {error}. Use another path, or give access to it.") from error
            case _:
                raise StorageFailed(f"{what} failed: {error}. The system's log may say more.") from error


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Make a directory and those above it, unless they are there; their names are on disk when this returns."""
    with _making_directories:  # one that another thread has made is on disk too
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for directory in reversed(missing):
            directory.mkdir(mode, exist_ok=True)  # another process may be as fast
            sync_directory(directory.parent)


def sync_directory(path: Path) -> None:
    """The names in a directory are on disk when this returns."""
    directory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def free_size_bytes(directory: Path) -> int:
    """What the disk of a directory has left for this user."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize
