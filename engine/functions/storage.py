"""`ctx.storage`: files that clients upload, as functions meet them. `files.py` has the bytes.

    @mutation
    async def upload_address(ctx: MutationCtx) -> str:
        return await ctx.storage.generate_upload_url()          # the client POSTs the file there, and gets its id

    @query
    async def picture(ctx: QueryCtx, user_id: Id[User]) -> str | None:
        user = await ctx.db.get(user_id)
        return await ctx.storage.get_url(user.picture) if user and user.picture else None

Invariants
  1. An address is a capability: whoever has it may use it, and nobody can make one, or guess one from the id of a file.
     So ids may be shown to anybody; who is shown an address, a function decides.
  2. The row of a file is there only while its bytes are. Its address depends on the row: subscribers of a query are
     told when the file is gone.
  3. All bytes are named by a row: by the file's, or, before it is there and after it is gone, by that of a loose file.
"""

import hmac
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from engine.errors import Forbidden, FunctionMisuse, InvalidDocument
from engine.ids import Id
from engine.schema import Table, unique
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction

if TYPE_CHECKING:
    from engine.functions.calls import Transactions
    from engine.functions.files import Files
    from engine.functions.run import Run

FILES_PATH = "/api/storage/"
UPLOAD_PATH = "/api/storage/upload"
_SEAL_SIZE_BYTES = 16
_KINDS_BY_METHOD = {
    "generate_upload_url": "mutations and actions",
    "delete": "mutations and actions",
    "store": "actions",
    "get": "actions",
}


class StoredFile(Table, name="_storage", system=True):
    """A file that was uploaded. An app's documents name it by its id: `picture: Id[StoredFile] | None = None`."""

    sha256: str  # hexadecimal
    size: int  # in bytes
    content_type: str | None = None  # as it was given with the upload
    file: str  # the name of its bytes; tells nobody where to get them


class LooseFile(Table, name="_loose_files", system=True, hidden=True):
    """Bytes that are no file's (yet, or any more): removed unless their upload is under way."""

    file: str
    by_file = unique("file")


class FileMetadata(msgspec.Struct, frozen=True):
    """What is known of a file besides its bytes."""

    storage_id: Id[StoredFile]
    sha256: str  # hexadecimal
    size: int  # in bytes
    content_type: str | None


class FileAddresses:
    """Makes and checks the addresses of one database's files (invariant 1). Keeps nothing of them."""

    def __init__(self, secret: bytes, base: str) -> None:
        self.base = base  # where clients reach the server: http://host:port
        self._key = hmac.digest(secret, b"addresses of files", "sha256")

    def of_upload(self, expires_at_ms: int) -> str:
        """An address that takes files until then."""
        return f"{self.base}{UPLOAD_PATH}?token={expires_at_ms}-{self._seal('upload', str(expires_at_ms))}"

    def check_upload(self, token: str, now_ms: float) -> None:
        """Raises Forbidden for a token that was not made here, or is too old."""
        expires_at_ms, _, seal = token.partition("-")
        if not self._is_sealed("upload", expires_at_ms, seal) or now_ms >= int(expires_at_ms):
            raise Forbidden("This upload address is not valid, or not any more. Ask the app for a new one.")

    def of_file(self, storage_id: str) -> str:
        """The address of a file, for as long as it is there."""
        return f"{self.base}{FILES_PATH}{storage_id}-{self._seal('file', storage_id)}"

    def storage_id_of(self, key: str) -> str | None:
        """The id of the file that the last part of an address names; None if it was not made here."""
        storage_id, _, seal = key.partition("-")
        return storage_id if self._is_sealed("file", storage_id, seal) else None

    def _seal(self, purpose: str, text: str) -> str:
        sealed = f"{purpose} {text}".encode(errors="replace")  # an address may hold any bytes
        return hmac.digest(self._key, sealed, "sha256")[:_SEAL_SIZE_BYTES].hex()

    def _is_sealed(self, purpose: str, text: str, seal: str) -> bool:
        return hmac.compare_digest(self._seal(purpose, text).encode(), seal.encode(errors="replace"))


class _Storage(ABC):
    """What all kinds of functions may do."""

    def __init__(self, run: "Run", files: "Files") -> None:
        self._run, self._files = run, files

    async def get_url(self, storage_id: Id[StoredFile]) -> str | None:
        """The address of a file, for whoever is given it; None when the file is gone. It ends with the file only."""
        file = await self._find(storage_id)
        return None if file is None else self._files.addresses.of_file(file.id)

    async def get_metadata(self, storage_id: Id[StoredFile]) -> FileMetadata | None:
        """Digest, size and content type of a file; None when it is gone."""
        file = await self._find(storage_id)
        return None if file is None else FileMetadata(file.id, file.sha256, file.size, file.content_type)

    @abstractmethod
    async def _find(self, storage_id: str) -> StoredFile | None: ...

    if not TYPE_CHECKING:  # a checker shall still find misspelt names

        def __getattr__(self, name: str) -> Any:
            kinds = _KINDS_BY_METHOD.get(name)
            if kinds is None:
                raise AttributeError(f"ctx.storage has no {name!r}")
            raise FunctionMisuse(f"{self._run.function.path}: ctx.storage.{name} is there in {kinds} only.")


class QueryStorage(_Storage):
    """`ctx.storage` of a query."""

    def __init__(self, run: "Run", files: "Files", transaction: ReadTransaction) -> None:
        super().__init__(run, files)
        self._transaction = transaction

    async def _find(self, storage_id: str) -> StoredFile | None:
        if self._run.wants_pause:
            await self._run.pause()
        return file_of(self._transaction, storage_id)


class MutationStorage(QueryStorage):
    """`ctx.storage` of a mutation."""

    def __init__(self, run: "Run", files: "Files", transaction: WriteTransaction) -> None:
        super().__init__(run, files, transaction)
        self._writes = transaction

    async def generate_upload_url(self) -> str:
        """An address to which anybody who has it can POST a file, for an hour; the answer is `{"storageId": …}`."""
        self._run.check_open()
        return self._files.upload_address(self._writes.now)

    async def delete(self, storage_id: Id[StoredFile]) -> None:
        """Remove a file. Its bytes go once this is committed. Raises DocumentNotFound."""
        self._run.check_open()
        delete_file(self._writes, storage_id)


class ActionStorage(_Storage):
    """`ctx.storage` of an action: each call is a commit of its own."""

    def __init__(self, run: "Run", files: "Files", transactions: "Transactions") -> None:
        super().__init__(run, files)
        self._transactions = transactions

    async def generate_upload_url(self) -> str:
        """An address to which anybody who has it can POST a file, for an hour; the answer is `{"storageId": …}`."""
        self._run.check_open()
        return self._files.upload_address(self._files.now_ms())

    async def delete(self, storage_id: Id[StoredFile]) -> None:
        """Remove a file. Raises DocumentNotFound."""
        self._run.check_open()
        await self._transactions.write(lambda transaction, _: delete_file(transaction, storage_id))

    async def store(self, content: bytes, content_type: str | None = None) -> Id[StoredFile]:
        """Keep these bytes as a file; they are durable when this returns. Raises LimitExceeded."""
        self._run.check_open()
        return await self._files.store(_once(content), content_type)

    async def get(self, storage_id: Id[StoredFile]) -> bytes | None:
        """All bytes of a file; None when it is gone."""
        file = await self._find(storage_id)
        return None if file is None else await self._files.read(file)

    async def _find(self, storage_id: str) -> StoredFile | None:
        self._run.check_open()
        return await self._transactions.write(lambda transaction, _: file_of(transaction, storage_id))


def file_of(transaction: ReadTransaction, storage_id: str) -> StoredFile | None:
    """The row of a file; None when it is gone. Raises InvalidDocument for an id of anything else."""
    document = transaction.get(storage_id)
    if document is not None and not isinstance(document, StoredFile):
        raise InvalidDocument(f"{storage_id!r} is the id of another document: files have an Id[StoredFile].")
    return document


def delete_file(transaction: WriteTransaction, storage_id: str) -> None:
    """Delete the row of a file; its bytes become loose with it. Raises DocumentNotFound."""
    file_of(transaction, storage_id)
    transaction.delete(storage_id)


def loosen(transaction: WriteTransaction, deleted: StoredFile) -> None:
    """The row of a file was deleted, by whomever (invariant 3)."""
    transaction.insert(LooseFile(file=deleted.file))


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
