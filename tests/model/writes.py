"""What a mutation does to the documents, worked out again over a plain dict: constraints, cascades, triggers, policies.

Written from what the features promise; each write looks at every document. Nobody can know beforehand the ids that a
mutation makes: the app under test tells what it began to insert, and that is taken by what it is about.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.identity import Identity
from tests.model.clients import Mutation
from tests.model.oracle import Run
from tests.model.plans import ScanSpec, Write
from tests.model.scans import Document, Refused, Snapshot, State, is_in_cell, place
from tests.model.schemas import SchemaSpec, TableSpec

TRIGGER_DEPTH_MAX = 4
_SUM_MAX = 2**63


class Mutating:
    """One mutation under way."""

    def __init__(
        self,
        schema: SchemaSpec,
        state: State,
        now: float,
        inserts: Sequence[Mapping[str, Any]],
        identity: Identity | None,
    ) -> None:
        self.schema, self.now, self.identity = schema, now, identity
        self.documents: dict[str, Document] = dict(state)
        self._inserts = list(inserts)  # what the engine began to insert
        self._write_count = self._nobody_count = 0
        self._trigger_depth = 0

    def do(self, mutation: Mutation) -> list[Any]:
        """What the mutation returns, having done what it does; raises Refused as it would."""
        results = self.do_all(mutation.writes)
        if mutation.inside is not None:
            before = dict(self.documents)
            try:
                inside = self.do_all(mutation.inside)
                if mutation.does_fail:
                    raise Refused("AppError")
            except Refused as refused:
                self.documents = before
                inside = [refused.code]
            return [*results, *inside, *self.do_all(mutation.after)]
        results += self.run().follow(mutation.reads)
        if mutation.does_fail:
            raise Refused("AppError")
        return results

    def do_all(self, writes: Sequence[Write]) -> list[Any]:
        """Each document as it is after its write, or how that was refused."""
        results = []
        for write in writes:
            before = dict(self.documents)
            try:
                id = self._do(write)
            except Refused as refused:
                self.documents = before
                if not write.does_catch:
                    raise
                results.append(refused.code)
            else:
                results.append(self.documents[id].plain() if id in self.documents else None)
        return results

    def run(self, *, is_restricted: bool = True) -> Run:
        """The reads of the mutation, or of a policy: of all that was written so far."""
        snapshot = Snapshot(dict(self.documents), self.now)
        return Run(self.schema, snapshot, self.identity, is_restricted=is_restricted, is_tracked=False)

    # -- as functions write: by the policies

    def _do(self, write: Write) -> str:
        self._write_count += 1
        run, table = self.run(is_restricted=not write.is_unrestricted), self.schema.tables[write.table]
        match write.does:
            case "insert":
                self._check(run.may("insert", write.table, write.fields))
                return self._insert(write.table, write.fields)
            case "restore" if not table.keeps_deleted:
                raise Refused("FunctionMisuse" if write.id in self.documents else "DocumentNotFound")
            case "delete_newest":
                newest = run.scan(
                    ScanSpec(write.table, is_descending=True, is_unrestricted=write.is_unrestricted), "first"
                )
                if newest is not None:
                    self._check(run.may("delete", write.table, self.documents[newest["id"]].fields))
                    self._delete(newest["id"], is_for_good=False)
                return ""
        old = run.get(write.id, with_deleted=write.with_deleted or write.does in ("restore", "purge"))
        if old is None:
            raise Refused("DocumentNotFound")
        match write.does:
            case "patch" | "replace":
                # what `replace` does not name are the engine's own fields
                fields = {**old.fields, **write.fields}
                self._check(run.may("update", write.table, old.fields, fields))
                self._write_over(write.does, old, fields)
            case "delete":
                self._check(run.may("delete", write.table, old.fields))
                self._delete(write.id, is_for_good=False)
            case "restore":
                fields = {**old.fields, "deleted_at": None}
                self._check(run.may("update", write.table, old.fields, fields))
                if old.is_deleted:
                    self._put("insert", old, {**fields, "updated_at": self.now} if table.has_updated else fields)
            case "purge":
                self._check(run.may("delete", write.table, old.fields))
                if not table.keeps_deleted:
                    raise Refused("FunctionMisuse")
                self._delete(write.id, is_for_good=True)
        return write.id

    def _check(self, is_allowed: bool) -> None:
        if not is_allowed:
            raise Refused("Forbidden")

    # -- as the engine writes

    def _insert(self, table: str, fields: Mapping[str, Any]) -> str:
        spec = self.schema.tables[table]
        id, creation_time = self._made(table, fields)
        kept = {"deleted_at": None} if spec.keeps_deleted else {}
        stamped = {"updated_at": self.now} if spec.has_updated else {}
        self._put("insert", Document(table, id, creation_time, {}), {**fields, **kept, **stamped})
        return id

    def _write_over(self, operation: str, old: Document, fields: Mapping[str, Any]) -> None:
        if {**fields} == {**old.fields}:
            return
        stamped = {"updated_at": self.now} if self.schema.tables[old.table].has_updated else {}
        self._put(operation, old, {**fields, **stamped})

    def _put(self, operation: str, old: Document, fields: Mapping[str, Any]) -> None:
        """Put these fields in the place of a document that is there, is deleted, or has none yet."""
        table = self.schema.tables[old.table]
        new = Document(old.table, old.id, old.creation_time, fields)
        if not new.is_deleted:
            self._check_parents(table, old, new)
            self._check_unique(table, new)
        self.documents[new.id] = new
        self._after(operation, old if old.fields and not old.is_deleted else None, None if new.is_deleted else new)

    def _check_parents(self, table: TableSpec, old: Document, new: Document) -> None:
        for field in table.keys:
            named = new.fields[field]
            if named in (None, new.id) or (not old.is_deleted and old.fields.get(field) == named):
                continue
            if named not in self.documents or self.documents[named].is_deleted:
                raise Refused("ForeignKeyViolation")

    def _check_unique(self, table: TableSpec, new: Document) -> None:
        for index in table.indexes.values():
            if index.is_unique:
                wanted = [place(new.fields[field]) for field in index.fields]
                others = [other for other in self.documents.values() if other.table == new.table]
                if place(None) not in wanted and any(
                    [place(other.fields[field]) for field in index.fields] == wanted
                    for other in others
                    if other.id != new.id and not other.is_deleted
                ):
                    raise Refused("UniqueViolation")

    def _delete(self, id: str, *, is_for_good: bool) -> None:
        counting = [document for document in self.documents.values() if is_for_good or not document.is_deleted]
        doomed = [id]
        for doomed_id in doomed:  # which grows
            naming = [child.id for child in counting if self._names(child, doomed_id, "cascade")]
            doomed += [child_id for child_id in naming if child_id not in doomed]
        stays = [document for document in counting if document.id not in doomed]
        if any(self._names(child, doomed_id, "restrict") for child in stays for doomed_id in doomed):
            raise Refused("ForeignKeyViolation")
        for child in stays:
            keys = self.schema.tables[child.table].keys
            freed = {field: None for field in keys if child.fields[field] in doomed}
            if freed:
                now = self.documents[child.id]  # a trigger may have changed it
                self._write_over("patch", now, {**now.fields, **freed})
        for doomed_id in reversed(doomed):
            old = self.documents[doomed_id]
            if is_for_good or not self.schema.tables[old.table].keeps_deleted:
                del self.documents[doomed_id]
            else:
                fields = {**old.fields, "deleted_at": self.now}
                self.documents[doomed_id] = Document(old.table, old.id, old.creation_time, fields)
            self._after("delete", None if old.is_deleted else old, None, old.table)

    def _names(self, child: Document, id: str, on_delete: str) -> bool:
        keys = self.schema.tables[child.table].keys
        return any(key.on_delete == on_delete and child.fields[field] == id for field, key in keys.items())

    def _after(self, operation: str, old: Document | None, new: Document | None, table: str = "") -> None:
        """A document was written; deleted ones are none."""
        document = new or old
        if document is None:
            return
        self._check_sums(document.table)
        for trigger in self.schema.tables[document.table].triggers:
            if self._trigger_depth == TRIGGER_DEPTH_MAX:
                raise Refused("LimitExceeded")
            self._trigger_depth += 1
            try:
                _TRIGGERS[trigger.kind](self, operation, document, new, trigger.field, trigger.value)
            finally:
                self._trigger_depth -= 1

    def _check_sums(self, table: str) -> None:
        documents = [document for document in self.documents.values() if document.table == table]
        for aggregate in self.schema.tables[table].aggregates.values():
            for key in documents:
                in_cell = [document for document in documents if is_in_cell(aggregate, key.fields, document)]
                for field in aggregate.sums:
                    if not -_SUM_MAX <= sum(document.fields[field] or 0 for document in in_cell) < _SUM_MAX:
                        raise Refused("TotalOverflow")

    def _made(self, table: str, fields: Mapping[str, Any]) -> tuple[str, float]:
        """Id and creation time of what is inserted; made up where the engine has refused it."""
        for i, entry in enumerate(self._inserts):
            if (entry["write"], entry["table"], entry["fields"]) == (self._write_count, table, fields):
                del self._inserts[i]
                if "id" in entry:
                    return entry["id"], entry["creation_time"]
                break
        self._nobody_count += 1
        return f"nobody {self._nobody_count}", 1e15 + self._nobody_count

    # -- triggers: those of `functions/_doings.py`

    def _log(self, operation: str, document: Document, *_: Any) -> None:
        self._insert("Log", {"about": document.id, "operation": operation, "kind": document.table})

    def _count(self, operation: str, document: Document, *_: Any) -> None:
        for counter in self.documents.values():
            if counter.table == "Counter" and counter.fields["name"] == document.table:
                self._write_over("patch", counter, {**counter.fields, "n": counter.fields["n"] + 1})
                return
        self._insert("Counter", {"name": document.table, "n": 1})

    def _refuse(self, operation: str, document: Document, new: Document | None, field: str, value: Any) -> None:
        if new is not None and new.fields[field] == value:
            raise Refused("AppError")

    def _touch(self, operation: str, document: Document, new: Document | None, field: str, value: Any) -> None:
        parent = None if new is None else self.documents.get(new.fields[field])
        if parent is not None and not parent.is_deleted:
            self._write_over("patch", parent, {**parent.fields, "touched": parent.fields["touched"] + 1})


_TRIGGERS: Mapping[str, Callable[..., None]] = {
    "log": Mutating._log,
    "count": Mutating._count,
    "refuse": Mutating._refuse,
    "touch": Mutating._touch,
}
