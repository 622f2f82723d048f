"""Where the bytes of uploaded files lie: the seam between kinds of storage, the staging directory, and files on disk.

    DATABASE.files/incoming/NAME    is being received
    DATABASE.files/3f/a0/NAME       stored

Invariants
  1. A name is 32 hexadecimal digits of the engine's own making; nothing else ever becomes part of a path or a key.
  2. A stored file is whole and durable: it was written and synced under `incoming/` before it got its place.
  3. A file that the disk has no room for leaves nothing behind, and is `StorageFull`.

Every call here blocks: it belongs on a thread. Which names are in use is the database's to say (`functions/files.py`).
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from engine.errors import StorageFull
from engine.storage.disk import free_size_bytes, make_directory, os_errors_translated, sync_directory

_NAME = re.compile(r"[0-9a-f]{32}")
_INCOMING = "incoming"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DIRECTORY_MODE = 0o700


class OpenedFile(Protocol):
    """A stored file that is being read."""

    def read(self, size_bytes: int, /) -> bytes:
        """The next bytes, at most so many; empty at the end."""

    def close(self) -> None: ...


class FileStore(Protocol):
    """Keeps files by their names. Raises StorageFull, and Overloaded when it cannot be reached."""

    def put(self, name: str, source: Path) -> None:
        """Keep what lies at `source`, which may be gone afterwards; durable on return."""

    def open(self, name: str, start: int, end: int) -> OpenedFile | None:
        """Read the bytes `start <= i < end`, of which there is at least one; None if there is no such file."""

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if it is not there."""

    def close(self) -> None: ...


def files_directory(database: Path) -> Path:
    """The directory beside a database; it is made with the first file."""
    return Path(f"{database}.files")


class DiskFileStore:
    """Files on the local disk, two levels of directories deep."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, name: str, source: Path) -> None:
        path = self._path(name)
        with _full_disk_told():
            make_directory(path.parent, _DIRECTORY_MODE)
            source.rename(path)
            sync_directory(path.parent)

    def open(self, name: str, start: int, end: int) -> OpenedFile | None:
        try:
            file = self._path(name).open("rb")
        except FileNotFoundError:
            return None
        file.seek(start)
        return file

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is open between calls."""

    def _path(self, name: str) -> Path:
        assert _NAME.fullmatch(name), f"invariant 1: {name!r}"
        return self._directory / name[:2] / name[2:4] / name


class Staging:
    """Files on their way in."""

    def __init__(self, directory: Path, free_size_bytes_min: int = 0) -> None:
        """`free_size_bytes_min`: what the disk has to have left for a file to be taken in."""
        self._directory, self._free_size_bytes_min = directory / _INCOMING, free_size_bytes_min

    def begin(self, name: str) -> "StagedFile":
        assert _NAME.fullmatch(name), f"invariant 1: {name!r}"
        with _full_disk_told():
            make_directory(self._directory, _DIRECTORY_MODE)
            if free_size_bytes(self._directory) < self._free_size_bytes_min:
                raise StorageFull(
                    f"The disk has less than {self._free_size_bytes_min:,} bytes left: no file is taken in. "
                    "Try again when there is room, or lower limits.free_size_bytes_min."
                )
            return StagedFile(self._directory / name)

    def clear(self) -> None:
        """Remove what an earlier process has left."""
        with os_errors_translated(f"clearing {self._directory}"), suppress(FileNotFoundError):
            for path in self._directory.iterdir():
                path.unlink()


class StagedFile:
    """One file that is being received."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0  # received so far
        self._digest = hashlib.sha256()
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")

    def write(self, chunk: bytes) -> None:
        with _full_disk_told():
            self._file.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def seal(self) -> str:
        """Nothing more comes: what there is, is on disk. Gives its SHA-256, hexadecimal."""
        with _full_disk_told():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Remove it, if it is still here."""
        with suppress(OSError):  # what was not written because the disk is full
            self._file.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def _full_disk_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull("The disk is full: the file was not stored. Try again when there is room.") from error
        raise
