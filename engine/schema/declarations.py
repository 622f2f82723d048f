"""What an app writes in `schema.py`.

    class ChatMessage(Table, name="live_chat_messages"):
        game_id: Id["Game"]
        message: str
        by_game = index("game_id", "created_at")

A document is frozen, and keyword-only: a field may be added anywhere in the class.
"""

import re
from typing import Any, ClassVar, Generic, Self, TypeVar, dataclass_transform

import msgspec

from engine.ids import Id

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_SYSTEM_NAME = re.compile(r"_[A-Za-z0-9_]*")
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # in a class name, but for the first
BUILT_IN_FIELDS = {"id": "_id", "creation_time": "_creationTime"}  # and their names on the wire

T = TypeVar("T", bound="Table")


class Index(msgspec.Struct, Generic[T], frozen=True):
    """What `ChatMessage.by_game` gives: the index to scan, and the class of what comes out."""

    document_type: type[T]
    name: str
    fields: tuple[str, ...]
    is_unique: bool


class IndexDeclaration:
    """`index(...)` or `unique(...)` in the body of a table's class."""

    def __init__(self, fields: tuple[str, ...], *, is_unique: bool) -> None:
        self.fields, self.is_unique = fields, is_unique
        self.name = ""  # set by the class body

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type[T]) -> Index[T]:
        return Index(owner, self.name, self.fields, self.is_unique)


def index(*fields: str) -> IndexDeclaration:
    """Rows in the order of these fields, then of their creation: `by_game = index("game_id", "created_at")`."""
    return IndexDeclaration(fields, is_unique=False)


def unique(*fields: str) -> IndexDeclaration:
    """An index in which no two documents have the same values. As in SQL, a None is unlike any other None."""
    return IndexDeclaration(fields, is_unique=True)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class TableMeta(msgspec.StructMeta):
    """Makes the classes of documents; `name` is the table's name.

    `system=True` marks the engine's own tables, `hidden=True` those of them that no function reads.
    """

    def __new__(
        mcls,
        class_name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        name: str = "",
        system: bool = False,
        hidden: bool = False,
    ) -> type:
        namespace["__table_name__"] = name or _WORD_START.sub("_", class_name).lower()
        namespace["__is_system_table__"] = system
        namespace["__is_hidden_table__"] = hidden
        return super().__new__(mcls, class_name, bases, namespace, frozen=True, kw_only=True, rename=BUILT_IN_FIELDS)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Table(msgspec.Struct, metaclass=TableMeta):
    """The base of an app's tables: an instance is one document, immutable."""

    __table_name__: ClassVar[str]
    __is_system_table__: ClassVar[bool]
    __is_hidden_table__: ClassVar[bool]

    # both are given by the engine when the document is stored
    id: Id[Self] = ""  # type: ignore[assignment]  # to the checker an Id is more than a str
    creation_time: float = 0.0  # ms since the epoch


def is_name(name: str, *, is_system: bool = False) -> bool:
    """Whether a table, a field or an index can have this name."""
    return bool(_NAME.fullmatch(name) or (is_system and _SYSTEM_NAME.fullmatch(name)))
