"""What an app writes in `schema.py`.

    class ChatMessage(Table, name="live_chat_messages"):
        game_id: Id["Game"]
        message: str
        updated_at: UpdatedAt = 0.0
        by_game = index("game_id", "created_at")
        game = foreign_key("game_id", on_delete="cascade")

A document is frozen, and keyword-only: a field may be added anywhere in the class.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, dataclass_transform

import msgspec

from engine.errors import SchemaError
from engine.ids import Id

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_SYSTEM_NAME = re.compile(r"_[A-Za-z0-9_]*")
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # in a class name, but for the first
BUILT_IN_FIELDS = {"id": "_id", "creation_time": "_creationTime"}  # and their names on the wire

T = TypeVar("T", bound="Table")
D = TypeVar("D")
OnDelete = Literal["restrict", "cascade", "set_null"]


class Stamp(msgspec.Struct, frozen=True):
    """Marks the annotation of a field that the engine keeps."""

    kind: Literal["updated", "deleted"]


UpdatedAt = Annotated[float, Stamp("updated")]
"""When the document was last changed, ms since the epoch: `updated_at: UpdatedAt = 0.0`. The engine sets it."""

DeletedAt = Annotated[float | None, Stamp("deleted")]
"""When the document was deleted, ms since the epoch: `deleted_at: DeletedAt = None` makes `delete` keep the row.

A deleted document is absent from everything but `with_deleted()`; `restore` brings it back, `purge` removes it.
"""


class Index(msgspec.Struct, Generic[T], frozen=True, cache_hash=True):
    """What `ChatMessage.by_game` gives: the index to scan, and the class of what comes out."""

    document_type: type[T]
    name: str
    fields: tuple[str, ...]
    is_unique: bool


class Aggregate(msgspec.Struct, Generic[T], frozen=True):
    """What `StreamSession.by_game` gives for an aggregate: what to read a total of."""

    document_type: type[T]
    name: str
    fields: tuple[str, ...]
    sums: tuple[str, ...]


class SearchIndex(msgspec.Struct, Generic[T], frozen=True):
    """What `ChatMessage.search` gives: the search index to look in, and the class of what comes out."""

    document_type: type[T]
    name: str
    field: str
    filters: tuple[str, ...]


class IndexDeclaration:
    """`index(...)` or `unique(...)` in the body of a table's class."""

    def __init__(self, fields: tuple[str, ...], *, is_unique: bool, is_ranked: bool = False) -> None:
        self.fields, self.is_unique, self.is_ranked = fields, is_unique, is_ranked
        self.name = ""  # set by the class body
        self._made: dict[type, Index[Any]] = {}  # by the table that has it

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type[T]) -> Index[T]:
        made = self._made.get(owner)
        if made is None:
            made = self._made[owner] = Index(owner, self.name, self.fields, self.is_unique)
        return made


class AggregateDeclaration:
    """`aggregate(...)` in the body of a table's class."""

    def __init__(self, fields: tuple[str, ...], sums: tuple[str, ...], *, is_public: bool) -> None:
        self.fields, self.sums, self.is_public = fields, sums, is_public
        self.name = ""  # set by the class body

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type[T]) -> Aggregate[T]:
        return Aggregate(owner, self.name, self.fields, self.sums)


class SearchIndexDeclaration:
    """`search_index(...)` in the body of a table's class."""

    def __init__(self, field: str, filters: tuple[str, ...]) -> None:
        self.field, self.filters = field, filters
        self.name = ""  # set by the class body

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type[T]) -> SearchIndex[T]:
        return SearchIndex(owner, self.name, self.field, self.filters)


def index(*fields: str, ranked: bool = False) -> IndexDeclaration:
    """Rows in the order of these fields, then of their creation: `by_game = index("game_id", "created_at")`.

    `ranked=True` also keeps what `rank`, `page` and `count` need to cost O(log n) in it: for leaderboards.
    """
    return IndexDeclaration(fields, is_unique=False, is_ranked=ranked)


def unique(*fields: str) -> IndexDeclaration:
    """An index in which no two documents have the same values. As in SQL, a None is unlike any other None."""
    return IndexDeclaration(fields, is_unique=True)


def aggregate(*fields: str, sum: Sequence[str] = (), public: bool = False) -> AggregateDeclaration:
    """Count and sums of the rows for each value of these fields, kept with every write; no field: of the whole table.

    `viewers = aggregate("game_id", "active", sum=("watch_seconds",))`. Sums are of `int` fields, None counts as 0.
    A total counts every row, also those that a policy hides from a caller: it is refused to callers that a policy
    restricts, unless it is declared `public=True`.
    """
    if isinstance(sum, str):
        raise SchemaError(f"aggregate: sum={sum!r} is a text. Give the names of fields: sum=({sum!r},).")
    return AggregateDeclaration(fields, tuple(sum), is_public=public)


def search_index(field: str, *, filter: Sequence[str] = ()) -> SearchIndexDeclaration:
    """The words of a text field, for `ctx.db.search`: `search = search_index("message", filter=("game_id",))`.

    A search may fix any of the `filter` fields: it then costs what is there under these values.
    """
    if isinstance(filter, str):
        raise SchemaError(f"search_index: filter={filter!r} is a text. Give the names of fields: filter=({filter!r},).")
    return SearchIndexDeclaration(field, tuple(filter))


class ForeignKeyDeclaration:
    """`foreign_key(...)` in the body of a table's class."""

    def __init__(self, field: str, on_delete: OnDelete) -> None:
        self.field, self.on_delete = field, on_delete


def foreign_key(field: str, *, on_delete: OnDelete = "restrict") -> ForeignKeyDeclaration:
    """The document that this field names is there, always: `game = foreign_key("game_id", on_delete="cascade")`.

    When that document is deleted, `"restrict"` refuses, `"cascade"` deletes this one too, and `"set_null"` sets the
    field to None. The field is an `Id[T]` or an `Id[T] | None`, and some index begins with it.
    """
    return ForeignKeyDeclaration(field, on_delete)


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


def declared(document_type: type[Table], kind: type[D]) -> dict[str, D]:
    """The declarations of one kind in the body of a table's class and of its bases, by their names."""
    found: dict[str, D] = {}
    for owner in reversed(document_type.__mro__):
        for name, value in vars(owner).items():
            found.pop(name, None)
            if isinstance(value, kind):
                found[name] = value
    return found


def is_name(name: str, *, is_system: bool = False) -> bool:
    """Whether a table, a field or an index can have this name."""
    return bool(_NAME.fullmatch(name) or (is_system and _SYSTEM_NAME.fullmatch(name)))
