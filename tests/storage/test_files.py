"""Files on disk: whole, durable, private, and gone when they are to be."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StorageFull
from engine.storage import files
from engine.storage.disk import free_size_bytes
from engine.storage.files import DiskFileStore, StagedFile, Staging, files_directory

NAME, OTHER = "3fa0" + "0" * 28, "3fa1" + "1" * 28


def received(directory: Path, content: bytes, name: str = NAME) -> StagedFile:
    staged = Staging(directory).begin(name)
    for start in range(0, len(content), 7):
        staged.write(content[start : start + 7])
    staged.seal()
    return staged


def read(store: DiskFileStore, name: str, start: int, end: int) -> bytes | None:
    opened = store.open(name, start, end)
    if opened is None:
        return None
    try:
        return opened.read(end - start)
    finally:
        opened.close()


def test_what_was_received_is_kept_whole_under_its_name(tmp_path: Path) -> None:
    directory = files_directory(tmp_path / "engine.db")
    content = os.urandom(10_000)
    staged = Staging(directory).begin(NAME)
    staged.write(content)
    assert staged.seal() == hashlib.sha256(content).hexdigest()
    assert staged.size_bytes == len(content)
    store = DiskFileStore(directory)
    assert store.open(NAME, 0, 1) is None
    store.put(NAME, staged.path)
    staged.discard()
    assert (tmp_path / "engine.db.files" / "3f" / "a0" / NAME).read_bytes() == content
    assert read(store, NAME, 0, len(content)) == content
    assert read(store, NAME, 9_990, 9_995) == content[9_990:9_995]
    assert list((directory / "incoming").iterdir()) == []


def test_a_deleted_file_is_gone_and_may_be_deleted_again(tmp_path: Path) -> None:
    store = DiskFileStore(tmp_path)
    for name in (NAME, OTHER):
        store.put(name, received(tmp_path, b"content", name).path)
    store.delete(NAME)
    store.delete(NAME)
    assert read(store, NAME, 0, 1) is None
    assert read(store, OTHER, 0, 7) == b"content"


def test_one_who_reads_a_file_reads_on_when_it_is_deleted(tmp_path: Path) -> None:
    store = DiskFileStore(tmp_path)
    store.put(NAME, received(tmp_path, b"content").path)
    opened = store.open(NAME, 0, 7)
    assert opened is not None
    store.delete(NAME)
    assert opened.read(7) == b"content"
    opened.close()


def test_only_this_user_can_read_files(tmp_path: Path) -> None:
    directory = files_directory(tmp_path / "engine.db")
    DiskFileStore(directory).put(NAME, received(directory, b"content").path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory, *directory.rglob("*"))}
    assert modes == {"engine.db.files": 0o700, "incoming": 0o700, "3f": 0o700, "a0": 0o700, NAME: 0o600}


def test_what_was_discarded_or_left_by_a_process_that_died_is_gone(tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    staging.clear()  # there is no directory yet
    received(tmp_path, b"content").discard()
    unfinished = staging.begin(NAME)
    unfinished.write(b"con")
    unfinished.discard()
    assert list((tmp_path / "incoming").iterdir()) == []
    received(tmp_path, b"content")
    staging.clear()
    assert list((tmp_path / "incoming").iterdir()) == []


@pytest.mark.parametrize("name", ["", "x" * 32, "../../../../etc/passwd", "3F" + "0" * 30, NAME + "\n", f"/{NAME}"])
def test_only_a_name_of_the_engines_own_becomes_a_path(tmp_path: Path, name: str) -> None:
    store, staging = DiskFileStore(tmp_path), Staging(tmp_path)
    for use in (lambda: staging.begin(name), lambda: store.open(name, 0, 1), lambda: store.delete(name)):
        with pytest.raises(AssertionError, match="invariant 1"):
            use()


def test_with_little_room_on_the_disk_no_file_is_taken_in(tmp_path: Path) -> None:
    free = free_size_bytes(tmp_path)
    with pytest.raises(StorageFull, match=r"less than .* bytes left: no file is taken in"):
        Staging(tmp_path, 2 * free).begin(NAME)
    assert list((tmp_path / "incoming").iterdir()) == []
    Staging(tmp_path, free // 2).begin(NAME).discard()


def test_a_file_and_every_name_on_the_way_to_it_are_synced_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power may fail at any moment: a name is synced after what it names, and before the next step."""
    events: list[tuple[str, str]] = []

    def noted(what: str, call: Callable[..., Any], name: Callable[..., object]) -> Callable[..., Any]:
        def note(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            events.append((what, str(name(*arguments))))
            return result

        return note

    def path_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    directory = tmp_path / "files"
    monkeypatch.setattr(os, "fsync", noted("sync", os.fsync, path_of))
    monkeypatch.setattr(Path, "mkdir", noted("make", Path.mkdir, lambda path, _: path.name))
    monkeypatch.setattr(Path, "rename", noted("rename", Path.rename, lambda path, target: target.name))
    DiskFileStore(directory).put(NAME, received(directory, b"content").path)
    assert events == [
        ("make", "files"),
        ("sync", tmp_path.name),
        ("make", "incoming"),
        ("sync", "files"),
        ("sync", NAME),
        ("make", "3f"),
        ("sync", "files"),
        ("make", "a0"),
        ("sync", "3f"),
        ("rename", NAME),
        ("sync", "a0"),
    ]
    events.clear()
    DiskFileStore(directory).put(NAME, received(directory, b"content").path)
    assert events == [("sync", NAME), ("rename", NAME), ("sync", "a0")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_told_from_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    expected = OSError if code == errno.EIO else StorageFull
    staged = Staging(tmp_path).begin(NAME)
    staged.write(b"content")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(expected):
        staged.seal()
    monkeypatch.setattr(files, "sync_directory", fail)
    with pytest.raises(expected):
        DiskFileStore(tmp_path).put(NAME, staged.path)
    staged.discard()
