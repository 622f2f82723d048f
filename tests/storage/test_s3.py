"""Files in a bucket: against a real server of the S3 protocol."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import ConfigError, Overloaded
from engine.storage.s3 import S3FileStore, S3Location
from tests.storage.s3_server import BUCKET, S3Server, s3_server

NAME, OTHER = "0" * 32, "1" * 32

pytestmark = pytest.mark.slow  # a server process starts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


def location(server: S3Server, prefix: str = "live/") -> S3Location:
    return S3Location(bucket=BUCKET, endpoint=server.address, region="us-east-1", prefix=prefix)


def file(directory: Path, content: bytes) -> Path:
    path = directory / "file"
    path.write_bytes(content)
    return path


def read(store: S3FileStore, name: str, start: int, end: int) -> bytes | None:
    opened = store.open(name, start, end)
    if opened is None:
        return None
    pieces = []
    while piece := opened.read(4_096):
        pieces.append(piece)
    opened.close()
    return b"".join(pieces)


def test_a_file_is_kept_read_in_parts_and_deleted(server: S3Server, tmp_path: Path) -> None:
    store, content = S3FileStore(location(server)), os.urandom(100_000)
    store.put(NAME, file(tmp_path, content))
    assert server.keys() == [f"live/{NAME}"]
    assert read(store, NAME, 0, len(content)) == content
    assert read(store, NAME, 5, 50_005) == content[5:50_005]
    assert read(store, OTHER, 0, 1) is None
    store.delete(NAME)
    store.delete(NAME)
    assert server.keys() == []
    assert read(store, NAME, 0, 1) is None
    store.close()


def test_what_has_another_prefix_is_not_touched(server: S3Server, tmp_path: Path) -> None:
    mine, other = S3FileStore(location(server, "mine/")), S3FileStore(location(server, "other/"))
    for store in (mine, other):
        store.put(NAME, file(tmp_path, b"content"))
    mine.delete(NAME)
    assert read(mine, NAME, 0, 7) is None
    assert read(other, NAME, 0, 7) == b"content"
    for store in (mine, other):
        store.delete(NAME)
        store.close()


def test_a_bucket_that_is_not_there_and_a_server_that_does_not_answer_are_for_trying_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path) as server:
        missing = S3FileStore(S3Location(bucket="missing", endpoint=server.address, region="us-east-1"))
        with pytest.raises(Overloaded, match="does not answer as it should"):
            missing.put(NAME, file(tmp_path, b"content"))
        missing.close()
        store = S3FileStore(location(server))
        server.stop()
        for use in (
            lambda: store.put(NAME, file(tmp_path, b"content")),
            lambda: store.open(NAME, 0, 1),
            lambda: store.delete(NAME),
        ):
            with pytest.raises(Overloaded, match="does not answer as it should") as refusal:
                use()
            assert refusal.value.__cause__ is not None
        store.close()


@pytest.mark.parametrize("endpoint", ["no address", "ftp//x"])
def test_an_endpoint_that_is_none_is_an_error_of_the_configuration(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"\[storage\]"):
        S3FileStore(S3Location(bucket=BUCKET, endpoint=endpoint, region="us-east-1"))


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(ConfigError, match=r"pip install 'reactive-engine\[s3\]'"):
        S3FileStore(S3Location(bucket=BUCKET))
