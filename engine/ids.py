"""Document ids: making, checking, and the table and creation time that an id carries.

    tag (4 characters) · creation tick (11) · chance (13)      28 characters of 0-9a-v, 5 bits each

The *tag* is a hash of the table's name, so an id of another table is refused without a look-up. The *creation tick*
counts 2⁻¹² ms since the epoch; it is the primary key of the row, so `get(id)` needs no index of ids, rows lie in the
order they were made, and every SQLite index ends in it by itself. The chance part is 65 unguessable bits.

Invariants
  1. Ticks strictly grow within a database, so no two documents share one, whatever their table.
  2. Ids of one table sort as their documents were made.
"""

import hashlib
import re
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

TICKS_PER_MS = 4096  # a double holds ms since the epoch exactly to 2⁻¹² ms until the year 2039
ID_LENGTH = 28
TAG_LENGTH = 4
_TICK_END = 15
_DIGITS = "0123456789abcdefghijklmnopqrstuv"
_PAIRS = tuple(high + low for high in _DIGITS for low in _DIGITS)
looks_like_id = re.compile(rf"[0-9a-v]{{{ID_LENGTH}}}").fullmatch  # of some table

T_co = TypeVar("T_co", covariant=True)


class IdOf:
    """The mark in an annotation that says which table an id belongs to; `target` is a class or a class name."""

    def __init__(self, target: Any) -> None:
        self.target = target

    @property
    def target_name(self) -> str:
        """The name of the document class, as `schema.py` spells it."""
        target = self.target
        return target if isinstance(target, str) else getattr(target, "__forward_arg__", None) or target.__name__

    def __repr__(self) -> str:
        return f"Id[{self.target_name}]"


if TYPE_CHECKING:

    class Id(str, Generic[T_co]):
        """The id of a document of table `T`: a `str` at run time."""

else:

    class Id:
        """`Id[Game]`, or `Id["Game"]` for a class that comes later: a `str` at run time that names its table."""

        def __class_getitem__(cls, target: Any) -> Any:
            return Annotated[str, IdOf(target)]


def table_tag(table: str) -> str:
    """The first four characters of every id of the table."""
    bits = int.from_bytes(hashlib.sha256(table.encode()).digest()[:3]) >> 4
    return _PAIRS[bits >> 10] + _PAIRS[bits & 1023]


def make_id(tag: str, tick: int, entropy: bytes) -> str:
    """A new id; `entropy` is 9 bytes, of which 65 bits are used."""
    chance = int.from_bytes(entropy) & ((1 << 65) - 1)
    number, pairs = tick << 65 | chance, _PAIRS
    characters = "".join([pairs[number >> shift & 1023] for shift in range(110, -1, -10)])
    return tag + characters


def is_id(value: str, tag: str) -> bool:
    """Whether the text is an id of the table with this tag (not whether the document exists)."""
    return value.startswith(tag) and looks_like_id(value) is not None


def tick_of(document_id: str) -> int:
    """The creation tick inside a well-formed id."""
    return int(document_id[TAG_LENGTH:_TICK_END], 32)


def creation_time_of(tick: int) -> float:
    """Milliseconds since the epoch, exactly."""
    return tick / TICKS_PER_MS
