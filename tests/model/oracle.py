"""What every query must return, worked out again from plain dicts: by looking at every document.

Written from `design.md`, not from the engine: it knows no index, no read set and no SQL. Beside the result it says
what the run has looked at, so that a test can tell which writes may make it run again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from engine.identity import Identity
from tests.model.schemas import SchemaSpec

Position = tuple[Any, ...]  # of a document in an index: comparable
END: Position = ("end",)  # of a cursor: behind everything, also what comes later


class Document(msgspec.Struct, frozen=True):
    table: str
    id: str
    creation_time: float  # ms since the epoch
    fields: Mapping[str, Any]

    def plain(self) -> dict[str, Any]:
        return {"id": self.id, "creation_time": self.creation_time, **self.fields}


State = Mapping[str, Document]  # the documents of all tables by id, at one timestamp; never changed


class Change(NamedTuple):
    """One written document; None where it is not there."""

    old: Document | None
    new: Document | None


class Refused(Exception):
    """The function fails with this code, and for an AppError with this data."""

    def __init__(self, code: str, data: Any = None) -> None:
        super().__init__(code, data)
        self.code, self.data = code, data


Read = Callable[[Change], bool]  # whether a change may make a difference to what was read


class Evaluation(msgspec.Struct):
    """What one run gives: a value, or how it fails; and what it read."""

    value: Any = None
    refused: tuple[str, Any] | None = None
    reads: list[Read] = []
    parts: dict[str, Any] = {}  # of the identity
    end_position: Position | None = None  # of a page
    split_position: Position | None = None

    def is_touched_by(self, changes: Iterable[Change]) -> bool:
        return any(read(change) for change in changes for read in self.reads)

    @property
    def seen(self) -> Any:
        """What two results must have in common to be equal for a client."""
        return ("refused", *self.refused) if self.refused is not None else ("value", self.value)


# -- the order of values: null, numbers, text by code point, bytes

_KIND_ORDER = {type(None): 0, bool: 1, int: 1, float: 1, str: 2, bytes: 3}


def place(value: Any) -> tuple[Any, ...]:
    return (_KIND_ORDER[type(value)], 0 if value is None else value)


class Scan:
    """The documents that a scan goes through, and in which order."""

    def __init__(self, schema: SchemaSpec, spec: Any) -> None:
        self.spec = spec
        self.fields = () if spec.index is None else schema[spec.table].indexes[spec.index].fields

    def position(self, document: Document) -> Position:
        return (*(place(document.fields[field]) for field in self.fields), document.creation_time)

    def holds(self, document: Document | None) -> bool:
        if document is None or document.table != self.spec.table:
            return False
        if any(place(document.fields[field]) != place(value) for field, value in self.spec.equal.items()):
            return False
        if not self.spec.bounds:
            return True
        n = len(self.spec.equal)
        value = document.fields[self.fields[n]] if n < len(self.fields) else document.creation_time
        return value is not None and all(
            {"gt": place(value) > place(bound), "gte": place(value) >= place(bound),
             "lt": place(value) < place(bound), "lte": place(value) <= place(bound)}[name]
            for name, bound in self.spec.bounds.items()
        )  # fmt: skip

    def documents(self, state: State, after: Position | None = None, until: Position | None = None) -> list[Document]:
        """In the order of the scan; between two positions of it, the first exclusive, the second inclusive."""
        found = [document for document in state.values() if self.holds(document)]
        found.sort(key=self.position, reverse=self.spec.is_descending)
        return [document for document in found if self.is_between(document, after, until)]

    def is_between(self, document: Document, after: Position | None, until: Position | None) -> bool:
        here = self.position(document)
        if after == END:
            return False
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


class Oracle:
    """Runs queries and mutations over states."""

    def __init__(self, schema: SchemaSpec) -> None:
        self.schema = schema

    # -- queries: each method is one function of `functions/model.py`

    def evaluate(self, run: Callable[[Evaluation], Any]) -> Evaluation:
        evaluation = Evaluation()
        try:
            evaluation.value = run(evaluation)
        except Refused as refused:
            evaluation.refused = refused.code, refused.data
        return evaluation

    def scan(self, state: State, ask: Any, reads: list[Read]) -> Any:
        scan = Scan(self.schema, ask.scan)
        documents = scan.documents(state)
        match ask.end:
            case "count" if ask.scan.filter is None:
                reads.append(scan.keys_read())
                return len(documents)
            case "count" | "collect":
                reads.append(scan.part_read())
                kept = [document for document in documents if scan.keeps(document)]
                return len(kept) if ask.end == "count" else [document.plain() for document in kept]
            case "first" | "unique":
                taken = self._take(scan, documents, 1 if ask.end == "first" else 2, reads)
                if len(taken) == 2:
                    raise Refused("NotUnique")
                return taken[0].plain() if taken else None
            case "take":
                taken = self._take(scan, documents, ask.n, reads) if ask.n else []
                return [document.plain() for document in taken]
            case _:  # a loop that breaks after n; 0 never does
                return [document.plain() for document in self._take(scan, documents, ask.n or -1, reads)]

    def _take(self, scan: Scan, documents: Sequence[Document], n: int, reads: list[Read]) -> list[Document]:
        taken: list[Document] = []
        for document in documents:
            try:
                is_kept = scan.keeps(document)
            except Refused:
                reads.append(scan.part_read(until=scan.position(document)))
                raise
            if is_kept:
                taken.append(document)
                if len(taken) == n:
                    reads.append(scan.part_read(until=scan.position(document)))
                    return taken
        reads.append(scan.part_read())
        return taken

    def get(self, state: State, ids: Sequence[str], reads: list[Read]) -> Any:
        found = []
        for id in ids:
            reads.append(_document_read(id))
            found.append(state[id].plain() if id in state else None)
        return found

    def nested(self, state: State, asks: Sequence[Any], does_catch: bool, reads: list[Read]) -> Any:
        results: list[Any] = []
        for ask in asks:
            try:
                results.append(self.scan(state, ask, reads))
            except Refused:
                if not does_catch:
                    raise
                results.append("caught")
        return results

    def who(
        self, state: State, identity: Identity | None, parts: Sequence[str], when: str, more: Sequence[str],
        evaluation: Evaluation,
    ) -> Any:  # fmt: skip
        evaluation.parts["present"] = identity is not None
        if identity is None:
            return None
        evaluation.reads.append(_document_read(when))
        shown = {}
        for part in [*parts, *(more if when in state else [])]:
            shown[part] = identity.subject if part == "subject" else identity.claims.get(part)
            evaluation.parts[part] = shown[part]
        return shown

    def page(
        self, state: State, spec: Any, num_items: int, after: Position | None, until: Position | None,
        evaluation: Evaluation,
    ) -> Any:  # fmt: skip
        """The documents of a page and whether it is the last; `until` None: its end is where it gets to now."""
        if after == END:
            evaluation.end_position = END
            return [], True
        scan = Scan(self.schema, spec)
        looked_at: list[Document] = []
        kept: list[Document] = []
        end = END if until is None else until
        try:
            for document in scan.documents(state, after, until):
                looked_at.append(document)
                if scan.keeps(document):
                    kept.append(document)
                    if until is None and len(kept) == num_items:
                        end = scan.position(document)
                        break
        except Refused:
            # nothing says how far it would have got
            evaluation.reads.append(scan.part_read(after, scan.position(looked_at[-1])))
            raise
        evaluation.reads.append(scan.part_read(after, end))
        evaluation.end_position = end
        if len(looked_at) > 2:
            evaluation.split_position = scan.position(looked_at[len(looked_at) // 2 - 1])
        return [document.plain() for document in kept], end == END

    # -- mutations

    def write(self, state: State, write: Any, id: str, creation_time: float) -> State:
        """The state after one write; an insert makes a document with this id and creation time."""
        documents, old = dict(state), state.get(id)
        if write.does == "insert":
            assert all(creation_time > other.creation_time for other in state.values()), "creation times grow"
            self._put(documents, Document(write.table, id, creation_time, write.fields))
        elif write.does == "delete_newest":
            in_table = [document for document in state.values() if document.table == write.table]
            if in_table:
                del documents[max(in_table, key=lambda document: document.creation_time).id]
        elif old is None:
            raise Refused("DocumentNotFound")
        elif write.does == "delete":
            del documents[id]
        else:
            fields = {**old.fields, **write.fields} if write.does == "patch" else write.fields
            self._put(documents, Document(old.table, old.id, old.creation_time, fields))
        return documents

    def _put(self, documents: dict[str, Document], document: Document) -> None:
        for index in self.schema[document.table].indexes.values():
            if index.is_unique:
                wanted = [place(document.fields[field]) for field in index.fields]
                others = [other for other in documents.values() if other.table == document.table]
                if place(None) not in wanted and any(
                    [place(other.fields[field]) for field in index.fields] == wanted
                    for other in others
                    if other.id != document.id
                ):
                    raise Refused("UniqueViolation")
        documents[document.id] = document


def _document_read(id: str) -> Read:
    return lambda change: any(document is not None and document.id == id for document in change)


def changes_between(old: State, new: State) -> list[Change]:
    return [Change(old.get(id), new.get(id)) for id in {**old, **new} if old.get(id) != new.get(id)]
