"""What every query must return, worked out again from plain dicts: by looking at every document.

Written from `design.md` and from what the features promise, not from the engine: it knows no index, no read set and no
SQL. Beside the result it says what the run has looked at, so that a test can tell which writes, which people and which
time may make it run again. What mutations do is in `writes.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from engine.identity import Identity
from tests.model.plans import (
    Call,
    Each,
    Get,
    Period,
    Plan,
    Rank,
    RankedPage,
    Refuse,
    Role,
    ScanAsk,
    ScanSpec,
    TotalOf,
    When,
    Who,
    pack,
    unpack_steps,
)
from tests.model.scans import (
    END,
    Change,
    Document,
    Position,
    Read,
    Refused,
    Scan,
    Snapshot,
    document_read,
    is_in_cell,
    place,
)
from tests.model.schemas import PolicySpec, SchemaSpec


class LooksFurther(Exception):
    """A policy looks at what is not the same for all rows of a scan."""


class Asked(NamedTuple):
    """A query that another one calls; without steps the one that policies judge by."""

    steps: bytes | None
    is_restricted: bool


class Moving(NamedTuple):
    """A bound that moves with time: documents with such a value cross it."""

    table: str
    field: str | None  # None: the creation time
    ago: float


Part = str | Asked  # of who asks: of the identity, or what a query returned for it


class Run:
    """One run of a query, or the reads of a mutation: what it gives, how it fails, and what it looked at."""

    def __init__(
        self,
        schema: SchemaSpec,
        snapshot: Snapshot,
        identity: Identity | None,
        *,
        is_restricted: bool = True,
        is_tracked: bool = True,
    ) -> None:
        self.schema, self.snapshot, self.identity = schema, snapshot, identity
        self.state, self.now = snapshot
        self.is_restricted, self.is_tracked = is_restricted, is_tracked
        self.value: Any = None
        self.refused: tuple[str, Any] | None = None
        self.reads: list[Read] = []
        self.more_reads: list[Read] = []  # what moving bounds may look at besides
        self.parts: dict[Part, Any] = {}
        self.has_called_inline = False  # a query that asks nobody, though it may have when the engine ran it last
        self.moving: set[Moving] = set()
        self.periods: set[int] = set()
        self.end_position: Position | None = None  # of a page
        self.split_position: Position | None = None

    def end(self, work: Callable[["Run"], Any]) -> "Run":
        try:
            self.value = work(self)
        except Refused as refused:
            self.refused = refused.code, refused.data
        return self

    @property
    def seen(self) -> Any:
        """What two results must have in common to be equal for a client."""
        return ("refused", *self.refused) if self.refused is not None else ("value", self.value)

    def is_touched_by(self, changes: Iterable[Change]) -> bool:
        return any(read(change) for change in changes for read in self.reads)

    def may_be_touched_by(self, changes: Iterable[Change]) -> bool:
        return any(read(change) for change in changes for read in (*self.reads, *self.more_reads))

    def is_touched_by_time(self, until: float, documents: Iterable[Document]) -> bool:
        """Whether any of these documents has come to a moving bound by then, or a period to its end."""

        def is_passed(bound: Moving, document: Document) -> bool:
            value = place(document.creation_time if bound.field is None else document.fields[bound.field])
            old, new = place(self.now - bound.ago), place(until - bound.ago)
            return (value < old, value <= old) != (value < new, value <= new)

        return any(self.now // ms != until // ms for ms in self.periods) or any(
            is_passed(bound, document)
            for document in documents
            for bound in self.moving
            if bound.table == document.table
        )

    # -- steps

    def follow(self, steps: Sequence[Plan]) -> list[Any]:
        results: list[Any] = []
        for step in steps:
            if isinstance(step, When):
                if self.get(step.id) is not None:
                    results += self.follow(step.steps)
            else:
                results.append(self.do(step))
        return results

    def do(self, step: Plan) -> Any:
        match step:
            case ScanAsk(spec, end, n):
                result = self.scan(spec, end, n)
                return {"unrestricted": result} if spec.is_unrestricted else result
            case Get(ids, with_deleted):
                documents = [self.get(id, with_deleted=with_deleted) for id in ids]
                return [document and document.plain() for document in documents]
            case Who(part):
                is_there = self.is_somebody
                if not is_there or part == "nothing":
                    return is_there
                return self.subject if part == "subject" else self.claim("role")
            case Role():
                return self.ask(Asked(None, self.is_restricted))
            case Call(steps, does_catch):
                try:
                    return self.ask(Asked(pack(steps), self.is_restricted))
                except Refused as refused:
                    if not does_catch:
                        raise
                    return {"caught": refused.data} if refused.code == "AppError" else "caught"
            case Each(spec, steps):
                return self.each(spec, Asked(pack(steps), self.is_restricted))
            case Refuse():
                raise Refused("AppError", "refused")
            case TotalOf(table, aggregate, key, numbers):
                return self.total(table, aggregate, key, numbers)
            case Rank(spec, id):
                return self.rank(spec, id)
            case RankedPage(spec, number, size, with_total):
                result = self.ranked_page(spec, number, size, with_total=with_total)
                return {"unrestricted": result} if spec.is_unrestricted else result
            case Period(ms):
                self.periods.add(ms)
                return self.now // ms
        raise AssertionError(step)

    # -- who asks

    @property
    def is_somebody(self) -> bool:
        self.parts["present"] = self.identity is not None
        return self.identity is not None

    @property
    def subject(self) -> str:
        assert self.identity is not None
        self.parts["subject"] = self.identity.subject
        return self.identity.subject

    def claim(self, name: str) -> Any:
        assert self.identity is not None
        self.parts[f"claims.{name}"] = self.identity.claims.get(name)
        return self.identity.claims.get(name)

    def ask(self, asked: Asked) -> Any:
        """What another query returns; if it asks who asks, that alone is what this run depends on."""
        inner = self.run_of(asked, self.snapshot)
        if inner.parts and (inner.refused is None or inner.refused[0] == "AppError"):
            self.parts[asked] = inner.seen
        else:
            self.has_called_inline = True
            self.parts |= inner.parts
            self.reads += inner.reads
            self.more_reads += inner.more_reads
            self.moving |= inner.moving
            self.periods |= inner.periods
        if inner.refused is not None:
            raise Refused(*inner.refused)
        return inner.value

    def role(self) -> str | None:
        """The query that policies judge by: while it is valid, the role of the caller."""
        if not self.is_somebody:
            return None
        subject = self.subject
        found = None
        if "User" in self.schema.tables:
            found = self.scan(ScanSpec("User", "by_until", {"subject": subject}, ago={"gt": 0.0}), "first")
        if found is None:
            return "stranger"
        if found["role"] == "banned":
            raise Refused("AppError", "banned")
        role: str = found["role"]
        return role

    @property
    def viewer(self) -> str | None:
        role: str | None = self.ask(Asked(None, is_restricted=False))
        return role

    def run_of(self, asked: Asked, snapshot: Snapshot) -> "Run":
        run = Run(self.schema, snapshot, self.identity, is_restricted=asked.is_restricted, is_tracked=self.is_tracked)
        return run.end(lambda run: run.role() if asked.steps is None else run.follow(unpack_steps(asked.steps)))

    # -- policies

    def may(self, operation: str, table: str, *rows: Mapping[str, Any]) -> bool:
        """Whether the caller may do that to a row with these fields."""
        policy = self.schema.tables[table].policy
        return policy is None or not self.is_restricted or bool(_JUDGES[policy.kind](self, policy, operation, *rows))

    def sees(self, document: Document) -> bool:
        return self.may("read", document.table, document.fields)

    def sees_all_alike(self, table: str, equal: Mapping[str, Any]) -> bool | None:
        """Whether the caller may read whatever has these values; None: that depends on more than these."""
        if self.schema.tables[table].policy is None or not self.is_restricted:
            return True
        try:
            return self.may("read", table, _Probe(equal))
        except LooksFurther:
            return None

    def _judge(self, spec: ScanSpec) -> bool | None:
        """The same for a scan, before it is known what is in it; a mutation may change meanwhile who may read."""
        if spec.is_unrestricted:
            return True
        if not self.is_tracked:
            return True if self.schema.tables[spec.table].policy is None or not self.is_restricted else None
        return self.sees_all_alike(spec.table, spec.equal)

    # -- reading

    def get(self, id: str, *, with_deleted: bool = False, is_restricted: bool = True) -> Document | None:
        self.reads.append(document_read(id))
        document = self.state.get(id)
        if document is None or (document.is_deleted and not with_deleted):
            return None
        return document if not is_restricted or self.sees(document) else None

    def scan(self, spec: ScanSpec, end: str, n: int = 0) -> Any:
        scan = self._begin(spec)
        documents = scan.documents(self.state)
        match end:
            case "count":
                alike = self._judge(spec)
                if alike is False:
                    return 0
                if alike and spec.filter is None:
                    self.reads.append(scan.keys_read())
                    return len(documents)
                self.reads.append(scan.part_read())
                return sum(self._keeps(scan, document) for document in documents)
            case "collect":
                self.reads.append(scan.part_read())
                self._judge(spec)
                return [document.plain() for document in documents if self._keeps(scan, document)]
            case "first" | "unique":
                taken = self._take(scan, documents, 1 if end == "first" else 2)
                if len(taken) == 2:
                    raise Refused("NotUnique")
                return taken[0].plain() if taken else None
            case "take":
                return [document.plain() for document in self._take(scan, documents, n)]
        # a loop that breaks after n; 0 never does
        return [document.plain() for document in self._walk(scan, documents, n, lambda document: document)]

    def each(self, spec: ScanSpec, asked: Asked) -> list[Any]:
        scan = self._begin(spec)
        return self._walk(scan, scan.documents(self.state), 0, lambda _: self.ask(asked))

    def page(
        self, spec: ScanSpec, num_items: int, after: Position | None, until: Position | None
    ) -> tuple[list[dict[str, Any]], bool]:
        """The documents of a page and whether it is the last; `until` None: its end is where it gets to now."""
        if after == END:
            self.end_position = END
            return [], True
        scan = self._begin(spec)
        looked_at: list[Document] = []
        kept: list[Document] = []
        end = END if until is None else until
        try:
            for document in scan.documents(self.state, after, until):
                looked_at.append(document)
                if len(looked_at) == 1:
                    self._judge(spec)
                if self._keeps(scan, document):
                    kept.append(document)
                    if until is None and len(kept) == num_items:
                        end = scan.position(document)
                        break
        except Refused:
            # nothing says how far it would have got
            self.reads.append(scan.part_read(after, scan.position(looked_at[-1])))
            raise
        self.reads.append(scan.part_read(after, end))
        self.end_position = end
        if len(looked_at) > 2:
            self.split_position = scan.position(looked_at[len(looked_at) // 2 - 1])
        return [document.plain() for document in kept], end == END

    def total(self, table: str, name: str, key: Mapping[str, Any], numbers: Sequence[str | None]) -> list[int]:
        aggregate = self.schema.tables[table].aggregates[name]
        if not aggregate.is_public and not self.sees_all_alike(table, key):
            raise Refused("FunctionMisuse")
        results = []
        for field in numbers:

            def amount(document: Document | None, field: str | None = field) -> int:
                if document is None or document.table != table or not is_in_cell(aggregate, key, document):
                    return 0
                return 1 if field is None else document.fields[field] or 0

            self.reads.append(lambda change, amount=amount: amount(change.old) != amount(change.new))
            results.append(sum(map(amount, self.state.values())))
        return results

    def rank(self, spec: ScanSpec, id: str) -> int | None:
        self._check_ranked(spec)
        scan, document = self._begin(spec), self.state.get(id)
        if document is None or not scan.holds(document):
            self.reads.append(document_read(id))
            return None
        here = scan.position(document)

        def is_here(other: Document | None) -> bool:
            return other is not None and other.id == id and scan.holds(other) and scan.position(other) == here

        self.reads.append(lambda change: is_here(change.old) != is_here(change.new))
        self.reads.append(scan.keys_ahead_read(document))
        return scan.documents(self.state).index(document)

    def ranked_page(self, spec: ScanSpec, number: int, size: int, *, with_total: bool) -> dict[str, Any]:
        self._check_ranked(spec)
        scan = self._begin(spec)
        documents = scan.documents(self.state)
        page = documents[number * size : (number + 1) * size]
        if not page:
            self.reads.append(scan.keys_read())
        else:
            if number:
                self.reads.append(scan.keys_ahead_read(page[0]))
            before = scan.position(documents[number * size - 1]) if number else None
            self.reads.append(scan.part_read(before, scan.position(page[-1]) if len(page) == size else None))
        if with_total:
            self.reads.append(scan.keys_read())
        return {"page": [document.plain() for document in page], "total": len(documents) if with_total else None}

    def _check_ranked(self, spec: ScanSpec) -> None:
        if self._judge(spec) is not True or spec.filter is not None:
            raise Refused("FunctionMisuse")

    def _begin(self, spec: ScanSpec) -> Scan:
        scan = Scan(self.schema, spec, self.now)
        if spec.ago:
            self.moving |= {Moving(spec.table, scan.bounded_field, ago) for ago in spec.ago.values()}
            self.more_reads.append(lambda change: scan.is_about(change.old) or scan.is_about(change.new))
        return scan

    def _keeps(self, scan: Scan, document: Document) -> bool:
        return (scan.spec.is_unrestricted or self.sees(document)) and scan.keeps(document)

    def _take(self, scan: Scan, documents: Sequence[Document], n: int) -> list[Document]:
        taken: list[Document] = []
        if n == 0:
            return taken
        self._judge(scan.spec)
        for document in documents:
            try:
                is_kept = self._keeps(scan, document)
            except Refused:
                self.reads.append(scan.part_read(until=scan.position(document)))
                raise
            if is_kept:
                taken.append(document)
                if len(taken) == n:
                    self.reads.append(scan.part_read(until=scan.position(document)))
                    return taken
        self.reads.append(scan.part_read())
        return taken

    def _walk(self, scan: Scan, documents: Sequence[Document], n: int, do: Callable[[Document], Any]) -> list[Any]:
        results: list[Any] = []
        for number, document in enumerate(documents):
            try:
                if number == 0:
                    self._judge(scan.spec)
                if self._keeps(scan, document):
                    results.append(do(document))
            except Refused:
                self.reads.append(scan.part_read(until=scan.position(document)))
                raise
            if n and len(results) == n:
                self.reads.append(scan.part_read(until=scan.position(document)))
                return results
        self.reads.append(scan.part_read())
        return results


class _Probe(dict[str, Any]):
    """A row of which only some values are known."""

    def __missing__(self, field: str) -> Any:
        raise LooksFurther


# -- what the policies of `schemas.POLICIES` mean; the last row is the new one

Row = Mapping[str, Any]


def _role(run: Run, policy: PolicySpec, operation: str, *rows: Row) -> bool:
    match operation:
        case "insert":
            return run.viewer != "stranger"
        case "update":
            return run.viewer == "mod" or rows[0][policy.field] == rows[1][policy.field]
        case "delete":
            return bool(rows[0][policy.field] == policy.value)
    return rows[0][policy.field] == policy.value or run.viewer == "mod"


def _viewer(run: Run, policy: PolicySpec, operation: str, *rows: Row) -> bool:
    match operation:
        case "insert":
            return run.viewer == "mod"
        case "delete":
            return run.viewer != "stranger"
    return run.viewer == "mod" or rows[-1][policy.field] == policy.value


def _owner(run: Run, policy: PolicySpec, operation: str, *rows: Row) -> bool:
    return operation == "delete" or (run.is_somebody and rows[-1][policy.field] == run.subject)


def _claim(run: Run, policy: PolicySpec, operation: str, *rows: Row) -> bool:
    match operation:
        case "insert":
            return True
        case "update":
            return run.is_somebody
        case "delete":
            return False
    return rows[0][policy.field] == policy.value or (run.is_somebody and run.claim("role") == "admin")


def _linked(run: Run, policy: PolicySpec, operation: str, *rows: Row) -> bool:
    if operation == "delete" or rows[-1][policy.field] is None:
        return run.viewer == "mod"
    parent = run.get(rows[-1][policy.field], is_restricted=False)
    return parent is not None and bool(parent.fields[policy.parent_field] == policy.value)


def _granted(run: Run, policy: PolicySpec, operation: str, *rows: Row) -> bool:
    match operation:
        case "insert" | "update":
            return True
        case "delete":
            return run.viewer is not None
    scan = Scan(run.schema, ScanSpec("User", "by_role", {"role": "mod"}), run.now)
    for user in scan.documents(run.state):
        run.reads.append(scan.part_read(until=scan.position(user)))
        if user.fields["subject"] == rows[0][policy.field]:
            return True
    run.reads.append(scan.part_read())
    return False


def _strict(run: Run, policy: PolicySpec, operation: str, *rows: Row) -> bool:
    if operation != "read":
        return operation == "delete" or bool(rows[-1][policy.field] != policy.value)
    if rows[0][policy.field] == policy.value:
        raise Refused("AppError", "nobody may look at this")
    return run.viewer != "stranger"


def _closed(run: Run, policy: PolicySpec, operation: str, *rows: Row) -> bool:
    return False


_JUDGES: Mapping[str, Callable[..., bool]] = {
    "role": _role,
    "viewer": _viewer,
    "owner": _owner,
    "claim": _claim,
    "linked": _linked,
    "granted": _granted,
    "strict": _strict,
    "closed": _closed,
}
