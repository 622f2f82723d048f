"""`ctx.storage`: addresses that nobody can make up, rows that say what is there, bytes that go with their row."""

import asyncio
import hashlib
import re
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.clock import Clock
from engine.engine import Engine
from engine.errors import Forbidden, FunctionMisuse, InvalidArgument, InvalidDocument, LimitExceeded, Overloaded
from engine.functions.storage import FileAddresses, LooseFile, StoredFile
from engine.limits import Limits
from engine.ranges import BY_CREATION_TIME
from engine.storage.files import FileStore
from engine.testing import ManualClock
from tests.functions.apps import SECONDS_MAX, OpenApp, open_app, write_app

SCHEMA = """
    from engine import Id, StoredFile, Table, index

    class Item(Table, name="items"):
        key: str
        picture: Id[StoredFile] | None = None
        by_key = index("key")
"""

FUNCTIONS = """
    @mutation
    async def upload_address(ctx: MutationCtx) -> str:
        return await ctx.storage.generate_upload_url()

    @query
    async def url(ctx: QueryCtx, file: Id[StoredFile]) -> str | None:
        return await ctx.storage.get_url(file)

    @mutation
    async def url_in_mutation(ctx: MutationCtx, file: Id[StoredFile]) -> str | None:
        return await ctx.storage.get_url(file)

    @action
    async def url_in_action(ctx: ActionCtx, file: Id[StoredFile]) -> str | None:
        return await ctx.storage.get_url(file)

    @query
    async def metadata(ctx: QueryCtx, file: Id[StoredFile]) -> FileMetadata | None:
        return await ctx.storage.get_metadata(file)

    @query
    async def row(ctx: QueryCtx, file: Id[StoredFile]) -> StoredFile | None:
        return await ctx.db.get(file)

    @query
    async def url_of_any(ctx: QueryCtx, id: str) -> str | None:
        return await ctx.storage.get_url(id)

    @mutation
    async def add(ctx: MutationCtx, key: str, picture: Id[StoredFile] | None = None) -> Id[Item]:
        return await ctx.db.insert(Item(key=key, picture=picture))

    @mutation
    async def remove(ctx: MutationCtx, file: Id[StoredFile]) -> None:
        await ctx.storage.delete(file)

    @mutation
    async def remove_and_fail(ctx: MutationCtx, file: Id[StoredFile]) -> None:
        await ctx.storage.delete(file)
        raise ValueError("no")

    @mutation
    async def remove_past_storage(ctx: MutationCtx, file: Id[StoredFile]) -> None:
        await ctx.db.delete(file)

    @action
    async def store(ctx: ActionCtx, content: bytes, content_type: str | None = None) -> Id[StoredFile]:
        return await ctx.storage.store(content, content_type)

    @action
    async def content(ctx: ActionCtx, file: Id[StoredFile]) -> bytes | None:
        return await ctx.storage.get(file)

    @action
    async def remove_in_action(ctx: ActionCtx, file: Id[StoredFile]) -> None:
        await ctx.storage.delete(file)

    @action
    async def upload_address_in_action(ctx: ActionCtx) -> str:
        return await ctx.storage.generate_upload_url()

    @query
    async def delete_in_query(ctx: QueryCtx, file: Id[StoredFile]) -> None:
        await ctx.storage.delete(file)

    @mutation
    async def store_in_mutation(ctx: MutationCtx) -> Any:
        return await ctx.storage.store(b"x")

    @query
    async def misspelt(ctx: QueryCtx) -> Any:
        return await ctx.storage.get_address("x")
"""


def files_on_disk(directory: Path) -> list[str]:
    """The names of all files in the store and on their way in."""
    return sorted(path.name for path in (directory / "engine.db.files").rglob("*") if path.is_file())


def loose_files(app: OpenApp) -> list[str]:
    return [file.file for file in app.engine.files._read().find(LooseFile, BY_CREATION_TIME)]


class Crash(OSError):
    """What ends an upload where a test wants it to."""


def fail() -> None:
    raise Crash


class HookedStore:
    """A store in which something happens before or after a file gets its place."""

    def __init__(
        self, store: FileStore, *, put: Callable[[], None] | None = None, has_put: Callable[[], None] | None = None
    ) -> None:
        self._store, self._before, self._after = store, put, has_put
        self.open, self.delete, self.close = store.open, store.delete, store.close

    def put(self, name: str, source: Path) -> None:
        if self._before is not None:
            self._before()
        self._store.put(name, source)
        if self._after is not None:
            self._after()


async def in_chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def opened(directory: Path, *, clock: Clock | None = None, **limits: Any) -> Any:
    return open_app(directory, FUNCTIONS, schema=SCHEMA, limits=Limits(**limits) if limits else None, clock=clock)


# -- what functions do with files


async def test_an_action_keeps_a_file_and_reads_it_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        for content in (b"hello", b"", bytes(200_000)):
            file = await app.call("m:store", content=content, content_type="text/plain")
            assert await app.call("m:content", file=file) == content
            metadata = await app.call("m:metadata", file=file)
            assert (metadata.storage_id, metadata.size, metadata.content_type) == (file, len(content), "text/plain")
            assert metadata.sha256 == hashlib.sha256(content).hexdigest()
            row = await app.call("m:row", file=file)
            assert (row.id, row.sha256, row.size) == (file, metadata.sha256, metadata.size)
            assert abs(row.creation_time - app.clock.wall_ns() / 1_000_000) < 1
        assert loose_files(app) == []


async def test_a_file_has_one_address_in_every_kind_of_function(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        file = await app.call("m:store", content=b"hello")
        url = await app.call("m:url", file=file)
        assert re.fullmatch(rf"http://127\.0\.0\.1:3210/api/storage/{file}-[0-9a-f]{{32}}", url)
        assert await app.call("m:url_in_mutation", file=file) == url
        assert await app.call("m:url_in_action", file=file) == url
        other = await app.call("m:store", content=b"hello")
        assert (await app.call("m:url", file=other))[-32:] != url[-32:]
    async with open_app(tmp_path) as app:
        assert await app.call("m:url", file=file) == url, "it lasts as long as the file"


async def test_a_deleted_file_has_no_address_and_its_subscribers_are_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        file, other = [await app.call("m:store", content=b"hello") for _ in range(2)]
        async with app.watched("m:url", file=file) as results, app.watched("m:url", file=other):
            await app.call("m:remove", file=file)
            assert await anext(results) is None
            await app.idle()
            assert app.run_count("m:url") == 1, "the other's watchers are left alone"
        assert await app.call("m:content", file=file) is None
        assert await app.call("m:metadata", file=file) is None
        failure = await app.failure("m:remove", file=file)
        assert failure.code == "DocumentNotFound"


async def test_documents_name_files_and_only_files(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        file = await app.call("m:store", content=b"hello")
        item = await app.call("m:add", key="a", picture=file)
        with pytest.raises(InvalidArgument, match="picture"):
            await app.call("m:add", key="b", picture=item)
        with pytest.raises(InvalidDocument, match="is the id of another document: files have an Id"):
            await app.call("m:url_of_any", id=item)
        with pytest.raises(InvalidDocument, match="is not an id of any table"):
            await app.call("m:url_of_any", id="nonsense")


async def test_each_kind_of_function_is_told_what_it_may_not_do(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        file = await app.call("m:store", content=b"hello")
        with pytest.raises(FunctionMisuse, match=r"ctx\.storage\.delete is there in mutations and actions only"):
            await app.call("m:delete_in_query", file=file)
        with pytest.raises(FunctionMisuse, match=r"m:store_in_mutation: ctx\.storage\.store is there in actions only"):
            await app.call("m:store_in_mutation")
        with pytest.raises(FunctionMisuse, match=r"_storage is the engine's own table: .*ctx\.storage"):
            await app.call("m:remove_past_storage", file=file)
        assert "ctx.storage has no 'get_address'" in (await app.failure("m:misspelt")).likeness
        assert await app.call("m:content", file=file) == b"hello"


# -- addresses


def token_of(address: str) -> str:
    return address.partition("?token=")[2]


@pytest.mark.parametrize("path", ["m:upload_address", "m:upload_address_in_action"])
async def test_an_upload_address_is_good_for_its_time_and_no_longer(tmp_path: Path, path: str) -> None:
    async with opened(tmp_path, file_upload_address_seconds=60) as app:
        address = await app.call(path)
        assert address.startswith("http://127.0.0.1:3210/api/storage/upload?token=")
        files = app.engine.files
        files.check_upload(token_of(address))
        await app.turn(59)
        files.check_upload(token_of(address))
        await app.turn(1.001)
        with pytest.raises(Forbidden, match="not valid, or not any more"):
            files.check_upload(token_of(address))


def test_an_address_that_was_changed_or_made_elsewhere_is_worth_nothing() -> None:
    mine, foreign = (FileAddresses(secret, "http://x") for secret in (b"1" * 32, b"2" * 32))
    token, storage_id = token_of(mine.of_upload(2_000)), "0" * 28
    key = mine.of_file(storage_id).rpartition("/")[2]
    mine.check_upload(token, 1_000)
    assert mine.storage_id_of(key) == storage_id
    later = "3" + token[1:]
    for wrong in ("", "-", token[:-1], later, token_of(foreign.of_upload(2_000)), f"{token} ", "é-é", f"-{token}"):
        with pytest.raises(Forbidden):
            mine.check_upload(wrong, 1_000)
    foreign_key = foreign.of_file(storage_id).rpartition("/")[2]
    seal_of_token = token.partition("-")[2]
    for wrong in ("", "-", storage_id, key[:-1], "1" + key[1:], foreign_key, f"2000-{seal_of_token}", "é-é", "../x-y"):
        assert mine.storage_id_of(wrong) is None
    with pytest.raises(Forbidden):  # one purpose's seal is none for the other
        mine.check_upload(f"{storage_id}-{key.partition('-')[2]}", 1_000)


async def test_an_address_tells_nothing_of_the_bytes_place_and_the_row_nothing_of_the_address(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        file = await app.call("m:store", content=b"hello")
        row, url = await app.call("m:row", file=file), await app.call("m:url", file=file)
        assert row.file not in url
        assert url[-32:] not in str(row)


# -- bytes come and go with their row


async def test_bytes_go_only_after_the_commit_that_deletes_their_row(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        file, other = [await app.call("m:store", content=b"hello") for _ in range(2)]
        names = {id: (await app.call("m:row", file=id)).file for id in (file, other)}
        await app.failure("m:remove_and_fail", file=file)
        await app.idle()
        assert files_on_disk(tmp_path) == sorted(names.values())
        await app.call("m:remove", file=file)
        await app.call("m:remove_in_action", file=other)
        await app.idle()
        assert files_on_disk(tmp_path) == []
        assert loose_files(app) == []


async def test_whoever_deletes_the_row_deletes_the_bytes(tmp_path: Path) -> None:
    """Not only `ctx.storage`: whatever writes through a transaction."""
    async with opened(tmp_path) as app:
        file = await app.call("m:store", content=b"hello")
        await app.engine.backend.write(lambda transaction, _: transaction.delete(file))
        await app.idle()
        assert files_on_disk(tmp_path) == []


async def test_a_trigger_can_make_a_file_go_with_the_document_that_names_it(tmp_path: Path) -> None:
    functions = """
        @trigger(Item)
        async def delete_the_picture_too(ctx: MutationCtx, change: Change[Item]) -> None:
            if change.new is None and change.old is not None and change.old.picture is not None:
                await ctx.storage.delete(change.old.picture)

        @action
        async def store(ctx: ActionCtx) -> Id[StoredFile]:
            return await ctx.storage.store(b"hello")

        @mutation
        async def add(ctx: MutationCtx, picture: Id[StoredFile]) -> Id[Item]:
            return await ctx.db.insert(Item(key="a", picture=picture))

        @mutation
        async def remove(ctx: MutationCtx, item: Id[Item]) -> None:
            await ctx.db.delete(item)
    """
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        item, other = [await app.call("m:add", picture=await app.call("m:store")) for _ in range(2)]
        await app.call("m:remove", item=item)
        await app.idle()
        assert len(files_on_disk(tmp_path)) == 1
        await app.call("m:remove", item=other)
        await app.idle()
        assert files_on_disk(tmp_path) == []


async def test_bytes_that_a_process_could_not_remove_are_removed_at_the_next_start(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(tmp_path, clock=clock) as app:
        file, kept = [await app.call("m:store", content=b"hello") for _ in range(2)]
        kept_name = (await app.call("m:row", file=kept)).file
        app.engine.files._is_closed = True  # as if it died between the commit and what follows
        await app.call("m:remove", file=file)
        await app.idle()
        assert len(files_on_disk(tmp_path)) == 2
    async with opened(tmp_path, clock=clock) as app:
        await app.idle()
        assert files_on_disk(tmp_path) == [kept_name]
        assert loose_files(app) == []
        assert await app.call("m:content", file=kept) == b"hello"


@pytest.mark.parametrize("step", ["received", "put", "has put"])
async def test_an_upload_that_a_crash_ends_leaves_nothing_after_the_next_start(tmp_path: Path, step: str) -> None:
    clock = ManualClock()
    async with opened(tmp_path, clock=clock) as app:
        files = app.engine.files
        files._is_closed = True  # nothing is cleaned up after it
        if step == "received":  # and nothing more was done with it
            files._staging.begin("ab" * 16).seal()
        else:
            files._store = HookedStore(files._store, **{step.replace(" ", "_"): fail})
            with pytest.raises(Crash):
                await files.store(in_chunks(b"hello"), None)
            assert len(loose_files(app)) == 1
        assert len(files_on_disk(tmp_path)) == (step != "put")
    async with opened(tmp_path, clock=clock) as app:
        await app.idle()
        assert (files_on_disk(tmp_path), loose_files(app)) == ([], [])


async def test_what_is_being_uploaded_is_not_taken_for_garbage(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        files, loop = app.engine.files, asyncio.get_running_loop()
        seen: list[tuple[int, int]] = []

        async def purge() -> None:
            files.purge()
            assert files._purging is not None
            await files._purging
            seen.append((len(files_on_disk(tmp_path)), len(loose_files(app))))

        def purge_from_a_thread() -> None:
            asyncio.run_coroutine_threadsafe(purge(), loop).result(SECONDS_MAX)

        files._store = HookedStore(files._store, has_put=purge_from_a_thread)
        file = await app.call("m:store", content=b"hello")
        assert seen == [(1, 1)]
        assert await app.call("m:content", file=file) == b"hello"


async def test_an_upload_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"hel"
        raise ConnectionResetError

    async with opened(tmp_path, file_size_bytes_max=10) as app:
        files = app.engine.files
        with pytest.raises(ConnectionResetError):
            await files.store(broken(), None)
        with pytest.raises(LimitExceeded, match=r"bytes of one file: 11 used, 10 allowed.*limits\.file_size_bytes_max"):
            await files.store(in_chunks(b"hello ", b"world"), None)
        with pytest.raises(InvalidArgument, match=r"has the SHA-256 2cf24d.*, not 00"):
            await files.store(in_chunks(b"hello"), None, sha256="00" * 32)
        await files.store(in_chunks(b"hello", b"world"), None)
        await app.idle()
        assert len(files_on_disk(tmp_path)) == 1
        assert loose_files(app) == []


@pytest.mark.parametrize("content_type", ["html", "text/html, image/png", "image/png\r\nSet-Cookie: a=b", "imäge/png"])
async def test_a_content_type_that_could_not_be_a_header_is_refused(tmp_path: Path, content_type: str) -> None:
    async with opened(tmp_path) as app:
        failure = await app.failure("m:store", content=b"hello", content_type=content_type)
        assert failure.code == "InvalidArgument"
        assert files_on_disk(tmp_path) == []


async def test_an_upload_that_is_cancelled_while_it_gets_its_place_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as app:
        files = app.engine.files
        is_putting, may_put, put = threading.Event(), threading.Event(), files._store.put

        def put_slowly(name: str, source: Path) -> None:
            content = source.read_bytes()  # as it is sent to a bucket, whatever becomes of its name
            is_putting.set()
            assert may_put.wait(SECONDS_MAX)
            source.write_bytes(content)
            put(name, source)

        files._store.put = put_slowly
        upload = asyncio.create_task(files.store(in_chunks(b"hello"), None))
        assert await asyncio.to_thread(is_putting.wait, SECONDS_MAX)
        upload.cancel()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not upload.done(), "else its bytes come when nothing names them any more"
        may_put.set()
        with pytest.raises(asyncio.CancelledError):
            await upload
        await app.idle()
        assert (files_on_disk(tmp_path), loose_files(app)) == ([], [])


async def test_one_who_waits_for_a_sender_too_long_gives_up(tmp_path: Path) -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield b"hel"
        await app.clock.sleep(1e9)

    async with opened(tmp_path, file_upload_seconds_max=0) as app:
        with pytest.raises(TimeoutError):
            await app.engine.files.store(silent(), None)
        await app.idle()
        assert files_on_disk(tmp_path) == []


async def test_only_so_many_uploads_and_downloads_go_on_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path, file_upload_count_max=1, file_download_count_max=1) as app:
        files = app.engine.files

        async def nested() -> AsyncIterator[bytes]:
            with pytest.raises(Overloaded, match=r"uploads at once: 1 under way, 1 allowed.*file_upload_count_max"):
                await files.store(in_chunks(b"x"), None)
            yield b"hello"

        file = files._read().get(await files.store(nested(), None))
        assert isinstance(file, StoredFile)
        async with files.opened(file, 0, 5) as chunks:
            with pytest.raises(Overloaded, match=r"files read at once: 1 open, 1 allowed.*file_download_count_max"):
                await files.read(file)
            assert [chunk async for chunk in chunks] == [b"hello"]
        assert await files.read(file) == b"hello"


async def test_bytes_that_are_missing_in_the_store_are_a_file_that_is_gone_and_somebody_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as app:
        file = await app.call("m:store", content=b"hello")
        name = (await app.call("m:row", file=file)).file
        (path,) = (tmp_path / "engine.db.files").rglob(name)
        path.write_bytes(b"hel")
        assert "the last 2 bytes of a stored file are missing" in (await app.failure("m:content", file=file)).likeness
        path.unlink()
        assert await app.call("m:content", file=file) is None
        assert f"the bytes of file {file} are not in the storage any more" in caplog.text


async def test_a_store_that_does_not_answer_keeps_nobody_from_deleting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    async with opened(tmp_path, clock=clock) as app:
        file = await app.call("m:store", content=b"hello")

        def refuse(name: str) -> None:
            raise Overloaded("The file storage does not answer.")

        app.engine.files._store.delete = refuse
        await app.call("m:remove", file=file)
        await app.idle()
        assert "the next start removes them: The file storage does not answer." in caplog.text
        assert len(loose_files(app)) == 1
    async with opened(tmp_path, clock=clock) as app:
        await app.idle()
        assert (files_on_disk(tmp_path), loose_files(app)) == ([], [])


async def test_files_of_a_temporary_database_go_with_it(tmp_path: Path) -> None:
    write_app(tmp_path / "app", FUNCTIONS, schema=SCHEMA)
    async with Engine.open(tmp_path / "app", ":memory:", clock=ManualClock()) as engine:
        await engine.action("m:store", content=b"hello")
        directory = engine.database.path.parent
        assert len(files_on_disk(directory)) == 1
    assert files_on_disk(directory) == []
