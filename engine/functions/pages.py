"""Pages: cursors that cannot be forged into another query, and ranges that stay gapless while data changes.

A page is the documents with `cursor < key <= end`. On its first run the end is where `num_items` documents were found;
that end is the *journal*, and every re-run reads up to it, so the next page goes on where this one stops.

Invariants
  1. A cursor is a position in one index range of one query: it is authenticated together with function, arguments,
     index, range and order. It is encrypted: the document that it stands at may be one that the caller may not see.
     Equal positions make equal cursors, so that a result that is the same has the same bytes.
  2. END is a position after everything: documents appended later fall into the page that ends there.
  3. With an end the page holds all documents up to it, however many there are now.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec

from engine.errors import InvalidCursor, LimitExceeded
from engine.ranges import IndexRange, OrderKey, after, before
from engine.schema import IndexSchema, Table

if TYPE_CHECKING:
    from engine.functions.scan import Reading

T = TypeVar("T")
D = TypeVar("D", bound=Table)

_MAC_SIZE_BYTES = 16
_END = b""  # the payload of the END position
_ROWS_READ_DEFAULT = 16_000  # half of what a run may read: the rest is for what the function adds to the page


class PaginationOptions(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a client asks of one page; the hooks of the official clients fill it in."""

    num_items: int  # size of the page when it is first read
    cursor: str | None = None  # exclusive start; None for the first page
    end_cursor: str | None = None  # inclusive end; overrides num_items
    id: float | None = None  # tells one use of a hook from the next; not looked at
    maximum_rows_read: int | None = None
    maximum_bytes_read: int | None = None


class Page(msgspec.Struct, Generic[T], kw_only=True, rename="camel"):
    """One page of results, as the hooks of the official clients want it."""

    page: list[T]
    is_done: bool
    continue_cursor: str
    split_cursor: str | None = None  # a position inside the page, where a page that has grown is cut in two
    page_status: Literal["SplitRecommended", "SplitRequired"] | None = None


class CursorSeal:
    """Makes and opens the cursors of one paginated query (invariant 1)."""

    def __init__(self, secret: bytes, fingerprint: bytes) -> None:
        self._key = hashlib.blake2b(fingerprint, key=secret, digest_size=32).digest()

    def seal(self, position: OrderKey | None) -> str:
        """The cursor of a full key without its closing rank; None for END."""
        payload = _END if position is None else msgspec.msgpack.encode(position)
        mac = self._mac(payload)
        return base64.urlsafe_b64encode(mac + self._crypt(mac, payload)).decode()

    def open(self, cursor: str) -> OrderKey | None:
        """The position of a cursor that `seal` made for this query. Raises InvalidCursor."""
        try:
            sealed = base64.urlsafe_b64decode(cursor.encode("ascii"))
        except (binascii.Error, UnicodeEncodeError) as error:
            raise InvalidCursor("the cursor is damaged") from error
        mac = sealed[:_MAC_SIZE_BYTES]
        payload = self._crypt(mac, sealed[_MAC_SIZE_BYTES:])
        if not hmac.compare_digest(mac, self._mac(payload)):
            raise InvalidCursor("the cursor belongs to another query")
        return None if payload == _END else tuple(msgspec.msgpack.decode(payload))

    def _crypt(self, mac: bytes, payload: bytes) -> bytes:
        """Encrypt, or decrypt: the digest of a payload is what no other payload under this key is encrypted with."""
        stream = hashlib.shake_256(self._key + mac).digest(len(payload))
        return bytes(a ^ b for a, b in zip(payload, stream, strict=True))

    def _mac(self, payload: bytes) -> bytes:
        return hashlib.blake2b(payload, key=self._key, digest_size=_MAC_SIZE_BYTES).digest()


def read_page(
    options: PaginationOptions,
    journal: str | None,
    seal: CursorSeal,
    index: IndexSchema,
    index_range: IndexRange,
    start_reading: "Callable[[IndexRange], Reading[D]]",
    keeps: Callable[[D], bool],
    *,
    descending: bool,
) -> Page[D]:
    """Read the page that `options` and the journal describe."""
    end_cursor = _end_cursor(options, journal)
    rest = index_range
    if options.cursor is not None:
        position = seal.open(options.cursor)
        if position is None:  # after END there is nothing
            return Page(page=[], is_done=True, continue_cursor=seal.seal(None))
        rest = _from(rest, position, descending=descending)
    end: OrderKey | None = None
    if end_cursor is not None:
        end = seal.open(end_cursor)
        if end is not None:
            rest = _until(rest, end, descending=descending)

    reading = start_reading(rest)
    rows_max = max(1, min(options.maximum_rows_read or _ROWS_READ_DEFAULT, _ROWS_READ_DEFAULT))
    page: list[D] = []
    keys: list[OrderKey] = []  # of every document looked at, kept or not
    was_cut = False
    while not reading.is_exhausted:
        room = rows_max - len(keys)
        if room <= 0:
            was_cut = True
            break
        if end_cursor is None and len(page) >= options.num_items:
            break
        wanted = room if end_cursor is not None else min(room, options.num_items - len(page))
        for document in reading.next_chunk(wanted):
            reading.saw(document)  # before the predicate, which may raise
            keys.append(index.key_of(document)[:-1])
            if keeps(document):
                page.append(document)
    is_at_end = reading.is_exhausted and (end_cursor is None or end is None)
    if end_cursor is not None:
        reading.saw_the_end()  # also what was not read: a change there changes how the page must be split
        continue_cursor, is_done = end_cursor, end is None
    else:
        if is_at_end:
            reading.saw_the_end()
        continue_cursor, is_done = seal.seal(None if is_at_end else keys[-1]), is_at_end
    status: Literal["SplitRecommended", "SplitRequired"] | None = None
    if was_cut and end_cursor is not None:
        status = "SplitRequired"
    elif len(keys) > rows_max * 3 // 4:
        status = "SplitRecommended"
    return Page(
        page=page,
        is_done=is_done,
        continue_cursor=continue_cursor,
        split_cursor=seal.seal(keys[len(keys) // 2 - 1]) if len(keys) > 2 else None,
        page_status=status,
    )


def cut_page(
    options: PaginationOptions, journal: str | None, seal: CursorSeal, found: list[tuple[OrderKey, D]]
) -> Page[D]:
    """The page that `options` and the journal describe of documents that are all at hand, sorted by their position.

    A document's position must follow from the document: then pages are gapless as those of a range are.
    """
    end_cursor = _end_cursor(options, journal)
    if options.cursor is not None:
        start = seal.open(options.cursor)
        found = [] if start is None else [(position, document) for position, document in found if position > start]
    if end_cursor is not None:
        end = seal.open(end_cursor)
        page = found if end is None else [(position, document) for position, document in found if position <= end]
        continue_cursor, is_done = end_cursor, end is None
    else:
        page = found[: options.num_items]
        is_done = len(page) == len(found)
        continue_cursor = seal.seal(None if is_done else page[-1][0])
    return Page(page=[document for _, document in page], is_done=is_done, continue_cursor=continue_cursor)


def _end_cursor(options: PaginationOptions, journal: str | None) -> str | None:
    """Where the page ends, if that was decided before."""
    if options.num_items < 1:
        raise LimitExceeded("numItems of a page", used=options.num_items, allowed=1, remedy="Ask for 1 or more.")
    return options.end_cursor if options.end_cursor is not None else journal


def _from(index_range: IndexRange, position: OrderKey, *, descending: bool) -> IndexRange:
    """What comes after a position, in reading order."""
    if descending:
        end = max(index_range.start, min(index_range.end, before(position)))
        return IndexRange(index_range.table, index_range.index, index_range.start, end)
    start = min(index_range.end, max(index_range.start, after(position)))
    return IndexRange(index_range.table, index_range.index, start, index_range.end)


def _until(index_range: IndexRange, position: OrderKey, *, descending: bool) -> IndexRange:
    """What comes up to and with a position, in reading order."""
    if descending:
        start = min(index_range.end, max(index_range.start, before(position)))
        return IndexRange(index_range.table, index_range.index, start, index_range.end)
    end = max(index_range.start, min(index_range.end, after(position)))
    return IndexRange(index_range.table, index_range.index, index_range.start, end)


def fingerprint_of(path: str, arguments: dict[str, Any], *source: Any) -> bytes:
    """What a cursor is bound to: everything that says which documents come in which order."""
    fixed = {name: value for name, value in arguments.items() if not isinstance(value, PaginationOptions)}
    parts = (path, fixed, *source)
    return hashlib.blake2b(msgspec.msgpack.encode(parts, order="deterministic"), digest_size=32).digest()
