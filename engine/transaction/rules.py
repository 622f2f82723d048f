"""What a write demands of other documents, and sets off in them: foreign keys.

    written        what it names must be there                      `check_parents`
    deleted        who names it: restrict · cascade · set_null      `Deletion`

Invariants
  1. After each write that succeeded, every document that is there names documents that are there. (A deleted document
     that its table keeps is held to that only when it is restored.)
  2. What a deletion does depends on the documents, not on the order in which they are found: all that cascades is
     found first; what then still names any of it by `restrict` refuses the whole.
  3. Of what is deleted together, children go before the documents that they name: their triggers find these still.

SQLite is not told of foreign keys: it would delete behind the back of the write set, of triggers and of totals.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import msgspec

from engine.errors import ForeignKeyViolation, InvalidDocument
from engine.schema import ForeignKey, Table, TableSchema
from engine.schema.declarations import OnDelete

if TYPE_CHECKING:
    from engine.transaction.transaction import WriteTransaction

D = TypeVar("D", bound=Table)
Operation = Literal["insert", "patch", "replace", "delete"]


class Change(msgspec.Struct, Generic[D], frozen=True):
    """One write of a document, as a trigger is told of it. A deleted document is none, also where it stays."""

    operation: Operation  # "delete" also of a cascade; "insert" also of one that is restored
    old: D | None  # None: it was not there
    new: D | None  # None: it is there no more


def change_of(table: TableSchema, operation: Operation, old: Table | None, new: Table | None) -> Change[Table] | None:
    """What triggers are told; None where only what is deleted was written."""
    old = None if old is None or table.is_deleted(old) else old
    new = None if new is None or table.is_deleted(new) else new
    return Change(operation, old, new) if old is not None or new is not None else None


def check_parents(transaction: "WriteTransaction", table: TableSchema, old: Table | None, new: Table) -> None:
    """ForeignKeyViolation when a document begins to name one that is not there."""
    for key in table.foreign_keys:
        parent_id = getattr(new, key.field)
        if parent_id is None or (old is not None and getattr(old, key.field) == parent_id):
            continue
        if parent_id == new.id:  # also of one that is being restored
            continue
        if not transaction.is_there(parent_id):
            raise ForeignKeyViolation(
                f"{key.table}.{key.field}: there is no document {parent_id!r} in {key.parent}. "
                "Insert it before, or name another one.",
                table=key.table,
                field=key.field,
                value=parent_id,
            )


def check_deletion_stays(table: TableSchema, operation: Operation, old: Table | None, new: D) -> D:
    """The new document as deleted as the old one is; InvalidDocument when it says otherwise."""
    field = str(table.deleted_field)
    given, kept = getattr(new, field), None if old is None else getattr(old, field)
    if given == kept:
        return new
    if given is None and operation == "replace":
        return msgspec.structs.replace(new, **{field: kept})
    raise InvalidDocument(
        f"{operation} {table.name}.{field}: the engine sets this field. Use ctx.db.delete and ctx.db.restore.",
        table=table.name,
        field=field,
        value=given,
    )


class Deletion:
    """The deletion of one document and of all that may not outlive it."""

    def __init__(self, transaction: "WriteTransaction", *, is_for_good: bool) -> None:
        self._transaction = transaction
        self._is_for_good = is_for_good  # then documents that are deleted already count, too
        self._doomed: dict[str, None] = {}  # ids of what goes, and of what is gone

    def run(self, document_id: str) -> None:
        """Do it all, or raise in the middle: the caller undoes."""
        transaction, going = self._transaction, self._doom([document_id])
        while True:
            fired_count = transaction.fired_count
            self._let_go()
            for doomed_id in going:
                found = transaction.find_row(doomed_id, with_deleted=self._is_for_good)
                if found is not None:  # else a trigger has deleted it
                    codec, document = found
                    transaction.delete_alone(codec, document, is_for_good=self._is_for_good)
            if transaction.fired_count == fired_count:
                return
            # a trigger may have given a document one more child before it was gone, or restored one before its parent
            late = [child_id for doomed_id in self._doomed for child_id in self._cascading(doomed_id)]
            restored = [doomed_id for doomed_id in self._doomed if transaction.is_there(doomed_id)]
            going = [*self._doom(late), *restored]

    def _doom(self, document_ids: list[str]) -> list[str]:
        """These documents and all that goes with them, children first (invariant 3); not what is doomed already."""
        going: list[str] = []
        stack = [(document_id, False) for document_id in document_ids]
        known_count = len(self._doomed)
        while stack:
            document_id, is_entered = stack.pop()
            if is_entered:
                going.append(document_id)
            elif document_id not in self._doomed:
                self._doomed[document_id] = None
                self._transaction.expect_writes(len(self._doomed) - known_count)
                stack.append((document_id, True))
                stack += [(child_id, False) for child_id in self._cascading(document_id)]
        return going

    def _cascading(self, document_id: str) -> list[str]:
        return [child_id for _, child_id in self._children(document_id, "cascade")]

    def _let_go(self) -> None:
        """Make what stays name none of the doomed (invariant 2)."""
        fields_by_child: dict[str, list[str]] = {}
        for document_id in self._doomed:
            for key, child_id in self._children(document_id, "restrict"):
                raise ForeignKeyViolation(
                    f"delete {key.parent}: {key.table}.{key.field} of {child_id!r} names {document_id!r}. Delete or "
                    'change such documents first, or declare on_delete="cascade" or "set_null".',
                    table=key.table,
                    field=key.field,
                    value=document_id,
                )
            for key, child_id in self._children(document_id, "set_null"):
                fields_by_child.setdefault(child_id, []).append(key.field)
        for child_id, fields in fields_by_child.items():
            found = self._transaction.find_row(child_id, with_deleted=self._is_for_good)
            if found is not None:  # else a trigger has deleted it
                codec, child = found
                freed = {field: None for field in fields if getattr(child, field) in self._doomed}
                self._transaction.write_over(codec, "patch", child, msgspec.structs.replace(child, **freed))

    def _children(self, document_id: str, on_delete: OnDelete) -> Iterator[tuple[ForeignKey, str]]:
        """What names this document by such keys and is not doomed."""
        transaction = self._transaction
        # one more than can be written is one too many; what is doomed already may stand before it
        limit = transaction.write_room + len(self._doomed) + 1
        for key in transaction.catalog.of_id(document_id).table.child_keys:
            if key.on_delete != on_delete:
                continue
            for child_id in transaction.find_children(key, document_id, limit=limit, with_deleted=self._is_for_good):
                if child_id not in self._doomed:
                    yield key, child_id
