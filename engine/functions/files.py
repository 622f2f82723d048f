"""The bytes of the files of one database: receiving, reading and removing them.

    upload: received and synced under `incoming/` ─> a loose file's row ─> in the store ─> the file's row instead
    delete: the file's row becomes a loose file's, in one commit ─> bytes removed ─> that row deleted

Invariants
  1. A file's row is committed only after its bytes are durable, and its bytes are removed only after the commit that
     deletes it: whenever the process dies, each file that is acknowledged is whole.
  2. What is in the store and no file's has the row of a loose file. So the next start finds it by reading these rows,
     not by listing the store: that costs what was left over, and never touches what others keep in the same bucket.
  3. A name in `_under_way` belongs to an upload that goes on: nobody removes its bytes.
  4. All that blocks runs on threads of its own, so that slow storage delays neither the loop nor the app's actions.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar, cast

from engine.clock import Clock
from engine.errors import DocumentNotFound, EngineClosed, InvalidArgument, LimitExceeded, Overloaded
from engine.functions.calls import Transactions
from engine.functions.storage import FileAddresses, LooseFile, StoredFile
from engine.ids import Id
from engine.limits import Limits
from engine.ranges import BY_CREATION_TIME
from engine.storage.files import FileStore, OpenedFile, StagedFile, Staging
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction
from engine.transaction.write_set import WriteSet

T = TypeVar("T")

_THREAD_COUNT = 8
_NAME_SIZE_BYTES = 16
_CHUNK_SIZE_BYTES = 64 << 10
_CONTENT_TYPE = re.compile(r"[!#$%&'*+.^_`|~\w-]+/[!#$%&'*+.^_`|~\w-]+([\t ]*;[\t -~]*)?", re.ASCII)
_CONTENT_TYPE_LENGTH_MAX = 255
_PURGE_COUNT = 100  # loose files removed between two commits
_log = logging.getLogger("engine.files")


class Files:
    """What `ctx.storage` and the doors ask of a database's files."""

    def __init__(
        self,
        store: FileStore,
        staging: Staging,
        addresses: FileAddresses,
        transactions: Transactions,
        read: Callable[[], ReadTransaction],
        limits: Limits,
        clock: Clock,
    ) -> None:
        self.addresses = addresses
        self._store, self._staging, self._transactions, self._read = store, staging, transactions, read
        self._limits, self._clock = limits, clock
        self._threads = ThreadPoolExecutor(_THREAD_COUNT, thread_name_prefix="engine-files")
        self._under_way: set[str] = set()  # 3
        self._opened_count = 0  # files that are being read
        self._purging: asyncio.Task[None] | None = None
        self._purge_is_due = False
        self._is_closed = False

    async def start(self) -> None:
        """Remove what an earlier process has left."""
        await self._run(self._staging.clear)
        if self._read().find(LooseFile, BY_CREATION_TIME, limit=1):
            self.purge()

    @property
    def is_idle(self) -> bool:
        """Whether no file is being received, and nothing is being removed."""
        return not self._under_way and (self._purging is None or self._purging.done())

    async def close(self) -> None:
        """Remove nothing more; the next start does."""
        self._is_closed = True
        if self._purging is not None:
            self._purging.cancel()
            await asyncio.wait((self._purging,))
        await asyncio.to_thread(self._threads.shutdown)
        self._store.close()

    # -- addresses

    def now_ms(self) -> float:
        return self._clock.wall_ns() / 1_000_000

    def upload_address(self, now_ms: float) -> str:
        return self.addresses.of_upload(round(now_ms) + self._limits.file_upload_address_seconds * 1_000)

    def check_upload(self, token: str) -> None:
        """Raises Forbidden."""
        self.addresses.check_upload(token, self.now_ms())

    def named_by(self, key: str) -> StoredFile | None:
        """The file that the last part of an address names, if it is there."""
        storage_id = self.addresses.storage_id_of(key)
        file = None if storage_id is None else self._read().get(storage_id)
        return file if isinstance(file, StoredFile) else None

    # -- receiving

    async def store(
        self, chunks: AsyncIterator[bytes], content_type: str | None, *, sha256: str | None = None
    ) -> Id[StoredFile]:
        """Keep what comes as a file; durable on return. A failure leaves nothing.

        Raises LimitExceeded, TimeoutError (it came too slowly), Overloaded, and InvalidArgument for a content type that
        is none, or if it is not what `sha256` (hexadecimal) says.
        """
        self._check_uploads()
        _check_content_type(content_type)
        name = self._clock.entropy(_NAME_SIZE_BYTES).hex()
        self._under_way.add(name)
        is_stored = False
        try:
            staged = await self._run(partial(self._staging.begin, name))
            try:
                await self._receive(staged, chunks)
                received = await self._run(staged.seal)
                if sha256 not in (None, received):
                    raise InvalidArgument(f"Digest: the file that arrived has the SHA-256 {received}, not {sha256}.")
                await self._transactions.write(lambda transaction, _: transaction.insert(LooseFile(file=name)))
                await self._run(partial(self._store.put, name, staged.path))
            finally:
                await self._run(staged.discard)
            file = StoredFile(sha256=received, size=staged.size_bytes, content_type=content_type, file=name)
            storage_id = await self._transactions.write(lambda transaction, _: _keep(transaction, file))
            is_stored = True
            return storage_id
        finally:
            self._under_way.remove(name)
            if not is_stored:
                self.purge()

    def check_size(self, size_bytes: int) -> None:
        """Raises LimitExceeded for a file that is larger than it may be."""
        if size_bytes > self._limits.file_size_bytes_max:
            raise LimitExceeded(
                "bytes of one file",
                used=size_bytes,
                allowed=self._limits.file_size_bytes_max,
                remedy="Upload a smaller one, or raise limits.file_size_bytes_max.",
            )

    def _check_uploads(self) -> None:
        count_max = self._limits.file_upload_count_max
        if len(self._under_way) >= count_max:
            raise Overloaded(
                f"uploads at once: {len(self._under_way):,} under way, {count_max:,} allowed. "
                "Try again, or raise limits.file_upload_count_max."
            )

    async def _receive(self, staged: StagedFile, chunks: AsyncIterator[bytes]) -> None:
        async with asyncio.timeout(self._limits.file_upload_seconds_max):
            async for chunk in chunks:
                self.check_size(staged.size_bytes + len(chunk))
                await self._run(partial(staged.write, chunk))

    # -- reading

    @asynccontextmanager
    async def opened(self, file: StoredFile, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes `start <= i < end` of a file, chunk by chunk. Raises DocumentNotFound and Overloaded."""
        count_max = self._limits.file_download_count_max
        if self._opened_count >= count_max:
            raise Overloaded(
                f"files read at once: {self._opened_count:,} open, {count_max:,} allowed. "
                "Try again, or raise limits.file_download_count_max."
            )
        self._opened_count += 1
        try:
            source = await self._run(partial(self._store.open, file.file, start, end)) if start < end else None
            if source is None and start < end:
                if self._read().get(file.id) is not None:  # not just deleted
                    _log.error("the bytes of file %s are not in the storage any more", file.id)
                raise DocumentNotFound("_storage", file.id, "read")
            try:
                yield self._chunks(source, end - start)
            finally:
                if source is not None:
                    self._threads.submit(source.close)
        finally:
            self._opened_count -= 1

    async def read(self, file: StoredFile) -> bytes | None:
        """All bytes of a file; None if it is deleted meanwhile."""
        try:
            async with self.opened(file, 0, file.size) as chunks:
                return b"".join([chunk async for chunk in chunks])
        except DocumentNotFound:
            return None

    async def _chunks(self, source: OpenedFile | None, left_bytes: int) -> AsyncIterator[bytes]:
        while source is not None and left_bytes:
            chunk = await self._run(partial(source.read, min(left_bytes, _CHUNK_SIZE_BYTES)))
            if not chunk:
                raise OSError(f"the last {left_bytes:,} bytes of a stored file are missing: its storage was damaged")
            left_bytes -= len(chunk)
            yield chunk

    # -- removing

    def committed(self, write_set: WriteSet) -> None:
        """A commit was published: if it deleted files, their bytes go."""
        if any(isinstance(write.old, StoredFile) and write.new is None for write in write_set):
            self.purge()

    def purge(self) -> None:
        """Remove the bytes of loose files, in the background."""
        self._purge_is_due = True
        if not self._is_closed and (self._purging is None or self._purging.done()):
            self._purging = asyncio.create_task(self._purge())

    async def _purge(self) -> None:
        try:
            while self._purge_is_due:
                self._purge_is_due = False
                # read where rows are written: whoever was cancelled while its row was on its way is done by then
                while loose := await self._transactions.write(self._find_loose):
                    for file in loose:
                        await self._run(partial(self._store.delete, file.file))
                    await self._transactions.write(partial(_delete_all, loose))
        except EngineClosed:
            pass
        except (Overloaded, OSError) as error:
            _log.warning("bytes of deleted files are still there, the next start removes them: %s", error)

    def _find_loose(self, transaction: WriteTransaction, _: float) -> list[LooseFile]:
        found = transaction.find(LooseFile, BY_CREATION_TIME, limit=_PURGE_COUNT + len(self._under_way))
        return [file for file in found if file.file not in self._under_way]

    async def _run(self, work: Callable[[], T]) -> T:
        """Do what blocks on a thread (4). Whoever is cancelled waits for it: nothing goes on behind what comes next."""
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait((working,))
            raise


def _check_content_type(content_type: str | None) -> None:
    """It will be a header: whoever is served the file shall not be told more by it than a type."""
    if content_type is None:
        return
    if len(content_type) > _CONTENT_TYPE_LENGTH_MAX or _CONTENT_TYPE.fullmatch(content_type) is None:
        raise InvalidArgument(f"Content-Type: {content_type[:80]!r} is not of the form type/subtype.")


def _keep(transaction: WriteTransaction, file: StoredFile) -> Id[StoredFile]:
    """The bytes are the file's from now on."""
    (loose,) = transaction.find(LooseFile, "by_file", file.file)
    transaction.delete(loose.id)
    return cast("Id[StoredFile]", transaction.insert(file))


def _delete_all(files: list[LooseFile], transaction: WriteTransaction, _: float) -> None:
    for file in files:
        transaction.delete(file.id)
