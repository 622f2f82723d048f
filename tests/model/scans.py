"""Documents of the model test, their order, and which of them a scan goes through: by looking at each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from tests.model.plans import ScanSpec
from tests.model.schemas import AggregateSpec, SchemaSpec

Position = tuple[Any, ...]  # of a document in an index: comparable
END: Position = ("end",)  # of a cursor: behind everything, also what comes later


class Document(msgspec.Struct, frozen=True):
    table: str  # class name
    id: str
    creation_time: float  # ms since the epoch
    fields: Mapping[str, Any]

    def plain(self) -> dict[str, Any]:
        return {"id": self.id, "creation_time": self.creation_time, **self.fields}

    @property
    def is_deleted(self) -> bool:
        return self.fields.get("deleted_at") is not None


State = Mapping[str, Document]  # the documents of all tables by id, deleted ones too, at one timestamp; never changed


class Snapshot(NamedTuple):
    """All there is, and when: what a run sees."""

    state: State
    now: float  # ms since the epoch


class Change(NamedTuple):
    """One written document; None where it is not there."""

    old: Document | None
    new: Document | None


Read = Callable[[Change], bool]  # whether a change may make a difference to what was read


class Refused(Exception):
    """The function fails with this code, and for an AppError with this data."""

    def __init__(self, code: str, data: Any = None) -> None:
        super().__init__(code, data)
        self.code, self.data = code, data


_KIND_ORDER = {type(None): 0, bool: 1, int: 1, float: 1, str: 2, bytes: 3}


def place(value: Any) -> tuple[Any, ...]:
    """Comparable: null, numbers, text by code point, bytes."""
    return (_KIND_ORDER[type(value)], 0 if value is None else value)


class Scan:
    """The documents that a scan goes through, and in which order."""

    def __init__(self, schema: SchemaSpec, spec: ScanSpec, now: float) -> None:
        self.spec = spec
        self.fields = () if spec.index is None else schema.tables[spec.table].indexes[spec.index].fields
        self.bounds = {**spec.bounds, **{name: now - ago for name, ago in spec.ago.items()}}
        n = len(spec.equal)
        self.bounded_field = self.fields[n] if n < len(self.fields) else None  # None: the creation time

    def position(self, document: Document) -> Position:
        return (*(place(document.fields[field]) for field in self.fields), document.creation_time)

    def is_about(self, document: Document | None) -> bool:
        """Whether it is in the scan but for its bounds."""
        return (
            document is not None
            and document.table == self.spec.table
            and (self.spec.with_deleted or not document.is_deleted)
            and all(place(document.fields[field]) == place(value) for field, value in self.spec.equal.items())
        )

    def holds(self, document: Document | None) -> bool:
        if document is None or not self.is_about(document):
            return False
        if not self.bounds:
            return True
        value = document.creation_time if self.bounded_field is None else document.fields[self.bounded_field]
        return value is not None and all(
            {"gt": place(value) > place(bound), "gte": place(value) >= place(bound),
             "lt": place(value) < place(bound), "lte": place(value) <= place(bound)}[name]
            for name, bound in self.bounds.items()
        )  # fmt: skip

    def documents(self, state: State, after: Position | None = None, until: Position | None = None) -> list[Document]:
        """In the order of the scan; between two positions of it, the first exclusive, the second inclusive."""
        found = [document for document in state.values() if self.holds(document)]
        found.sort(key=self.position, reverse=self.spec.is_descending)
        return [document for document in found if self.is_between(document, after, until)]

    def is_between(self, document: Document, after: Position | None, until: Position | None) -> bool:
        if after == END:
            return False
        here = self.position(document)
        if self.spec.is_descending:
            return (after is None or here < after) and (until is None or until == END or here >= until)
        return (after is None or here > after) and (until is None or until == END or here <= until)

    def part_read(self, after: Position | None = None, until: Position | None = None) -> Read:
        """Documents came, went or changed in a part of the scan."""

        def is_inside(document: Document | None) -> bool:
            return document is not None and self.holds(document) and self.is_between(document, after, until)

        return lambda change: is_inside(change.old) or is_inside(change.new)

    def keys_read(self) -> Read:
        """Documents came or went."""
        return lambda change: self.holds(change.old) != self.holds(change.new)

    def keys_ahead_read(self, document: Document) -> Read:
        """Documents came or went before this one."""
        here = self.position(document)

        def is_ahead(other: Document | None) -> bool:
            if other is None or not self.holds(other):
                return False
            there = self.position(other)
            return there > here if self.spec.is_descending else there < here

        return lambda change: is_ahead(change.old) != is_ahead(change.new)

    def keeps(self, document: Document) -> bool:
        chosen = self.spec.filter
        if chosen is None:
            return True
        is_hit = bool(document.fields[chosen.field] == chosen.value)
        if is_hit and chosen.does == "raise":
            raise Refused("FunctionFailed")
        if is_hit and chosen.does == "refuse":
            raise Refused("AppError", {"refused": document.id})
        return is_hit if chosen.does == "keep" else not is_hit


def is_in_cell(aggregate: AggregateSpec, key: Mapping[str, Any], document: Document) -> bool:
    return not document.is_deleted and all(place(document.fields[f]) == place(key[f]) for f in aggregate.fields)


def document_read(id: str) -> Read:
    return lambda change: any(document is not None and document.id == id for document in change)


def changes_between(old: State, new: State) -> list[Change]:
    return [Change(old.get(id), new.get(id)) for id in {**old, **new} if old.get(id) != new.get(id)]
