"""The WAL of a database from outside: how much is in it, and whether one that a dead process has left has lost some.

SQLite takes in the frames of a WAL up to the first one whose checksum is wrong: so it drops what a crash has torn. A
bit that has rotted drops in the same way all the commits after it, and nothing is said. But only the last commit can be
torn, as each is synced before the next one is written: what lies behind a damaged one tells the two apart.

Invariants
  1. A process starts with an empty WAL, so all frames that have the salt of its header are of one process.
  2. Nothing is changed here: what is refused stays as it was.

A bit that rots in the last commit looks as if that was torn. Clients who have seen that commit are told (`sync/`).
"""

import os
import struct
from pathlib import Path

from engine.errors import StorageFailed

# sqlite.org/fileformat2.html, 4.1
_HEADER = struct.Struct(">I4xI4x4s4sII")  # magic; version; size of a page; checkpoints; two salts; checksum
_MAGIC = 0x377F0682  # and one more if checksums are big-endian
_INDEX_HEAD = struct.Struct("=I12xI76xI")  # version, frames, frames checkpointed: sqlite.org/walformat.html, 2.1
_INDEX_VERSION = 3007000
FRAME_HEADER_SIZE_BYTES = 24
_FRAME = struct.Struct(">4xI4s4s8x")  # page; size of the database after a commit, else 0; salts; checksum


class WalIndex:
    """The index of the WAL that the connections of an open database share, seen from outside."""

    def __init__(self, database_path: Path) -> None:
        self.wal_path = Path(f"{database_path}-wal")
        self._index_path = f"{database_path}-shm"
        self._index_file = -1  # open from `open` to `close`

    def open(self) -> None:
        self._index_file = os.open(self._index_path, os.O_RDONLY | os.O_CLOEXEC)

    def read_frame_count_taken(self) -> int:
        """Frames that a connection has taken in, checkpointed or not; not while one has locks (see `close`)."""
        _, frame_count, _ = _INDEX_HEAD.unpack(Path(self._index_path).read_bytes()[: _INDEX_HEAD.size])
        return int(frame_count)

    def read_frame_count(self) -> int:
        """Frames before the place where the next write goes; 0 when all are checkpointed and it starts anew."""
        head = os.pread(self._index_file, _INDEX_HEAD.size, 0)
        version, frame_count, frame_count_checkpointed = _INDEX_HEAD.unpack(head)
        assert version in (0, _INDEX_VERSION), f"unknown WAL index {version}"  # 0: nothing was written yet
        return 0 if frame_count == frame_count_checkpointed else int(frame_count)

    def close(self) -> None:
        """Only when no connection is left: closing a file drops all locks that this process has on it (POSIX)."""
        if self._index_file >= 0:
            os.close(self._index_file)


def check_wal(wal: Path, frame_count_taken: int, remedy: str) -> None:
    """Raises StorageFailed if SQLite has taken fewer frames than were durable."""
    frames_size_bytes = wal.stat().st_size - _HEADER.size
    with wal.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return
        page_size_bytes, salts = _read_header(header)
        if page_size_bytes is None:
            if frames_size_bytes > _FRAME.size:
                raise StorageFailed(f"{wal} is damaged at its start, and what it had is lost: {remedy}")
            return
        frame_size_bytes = _FRAME.size + page_size_bytes
        has_commit = False
        for index in range(frame_count_taken, frames_size_bytes // frame_size_bytes):
            file.seek(_HEADER.size + index * frame_size_bytes)
            size_after_commit, *frame_salts = _FRAME.unpack(file.read(_FRAME.size))
            if not any(map(salts.__contains__, frame_salts)):  # an older one; of these, one salt may be damaged
                continue
            if has_commit:
                raise StorageFailed(f"{wal} is damaged: commits behind frame {frame_count_taken:,} are lost; {remedy}")
            has_commit = size_after_commit != 0


def _read_header(header: bytes) -> tuple[int | None, set[bytes]]:
    """The size of a page, None if the header is damaged; and the salts."""
    magic, page_size_bytes, first_salt, second_salt, first, second = _HEADER.unpack(header)
    words = struct.unpack_from(">6I" if magic & 1 else "<6I", header)
    sums = [0, 0]
    for index, word in enumerate(words):
        sums[index % 2] = (sums[index % 2] + word + sums[(index + 1) % 2]) & 0xFFFFFFFF
    is_whole = magic & ~1 == _MAGIC and sums == [first, second]
    return (page_size_bytes if is_whole else None), {first_salt, second_salt}
