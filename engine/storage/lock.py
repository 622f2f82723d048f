"""`DATABASE.lock`: which process serves a database, and where.

Invariants
  1. Who serves a database holds an exclusive `flock` on the file; it goes with the process, however that ends.
"""

import fcntl
import os
from pathlib import Path

import msgspec

from engine.errors import ConfigError


class LockHolder(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who serves a database, as `DATABASE.lock` says."""

    pid: int | None = None  # None: it has only just started
    address: str | None = None  # where it serves; None while it does not
    key: str | None = None  # what its administration asks for


def lock_holder(path: str | Path) -> LockHolder | None:
    """The process that serves this database now, if one does."""
    try:
        file = os.open(_lock_path(Path(path)), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        content = os.pread(file, 1 << 16, 0)
        if not content:
            return None  # closed in good order
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parse_holder(content)
        return None  # it has died: the lock went with it
    finally:
        os.close(file)


def _lock_path(path: Path) -> Path:
    return Path(f"{path.resolve()}.lock")


def _parse_holder(content: bytes) -> LockHolder:
    try:
        return msgspec.json.decode(content, type=LockHolder)
    except msgspec.DecodeError:
        return LockHolder()


class DatabaseLock:
    """The hold of this process (invariant 1). The file stays; its content goes on close."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _parse_holder(os.pread(self._file, 1 << 16, 0))
            os.close(self._file)
            raise ConfigError(
                f"{path} is in use by process {holder.pid or '(starting)'}"
                f"{f' at {holder.address}' if holder.address else ''}. Stop that process, or use another database."
            ) from None
        self.write(LockHolder(pid=os.getpid()))

    def write(self, holder: LockHolder | None) -> None:
        os.ftruncate(self._file, 0)
        if holder is not None:
            os.pwrite(self._file, msgspec.json.encode(holder), 0)

    def release(self) -> None:
        self.write(None)
        os.close(self._file)
