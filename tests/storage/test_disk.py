"""Directories that last, room, and what errors of the file system mean."""

import errno
import os
from pathlib import Path

import pytest

from engine.errors import ConfigError, EngineError, StorageFailed, StorageFull
from engine.limits import Limits
from engine.storage.connections import Database
from engine.storage.disk import free_size_bytes, make_directory, os_errors_translated


def test_each_new_directory_has_its_name_synced_before_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    mkdir, fsync = Path.mkdir, os.fsync

    def noted_mkdir(path: Path, mode: int, *, exist_ok: bool) -> None:
        mkdir(path, mode, exist_ok=exist_ok)
        events.append(f"make {path.name}")

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    monkeypatch.setattr(Path, "mkdir", noted_mkdir)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    make_directory(tmp_path / "a" / "b", 0o700)
    assert events == ["make a", f"sync {tmp_path.name}", "make b", "sync a"]
    make_directory(tmp_path / "a" / "b")
    assert len(events) == 4


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EACCES, ConfigError),
        (errno.EROFS, ConfigError),
        (errno.EIO, StorageFailed),
        (errno.ENXIO, StorageFailed),
    ],
)
def test_an_error_of_the_file_system_is_one_of_ours(number: int, kind: type[EngineError]) -> None:
    with (
        pytest.raises(kind, match="opening it failed"),
        os_errors_translated("opening it"),
    ):
        raise OSError(number, os.strerror(number))


def test_a_database_where_there_can_be_none_is_a_matter_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"opening .*engine\.db failed"):
        Database.open(tmp_path / "file" / "engine.db", Limits())


def test_free_room_is_that_of_this_user(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    assert 0 < free_size_bytes(tmp_path) <= disk.f_bfree * disk.f_frsize
