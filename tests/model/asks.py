"""What subscribers ask and mutations write in the model test: made up, and on the wire."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec

from tests.model.choices import Choices
from tests.model.plans import (
    Call,
    Each,
    Filter,
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
    Write,
    pack,
)
from tests.model.schemas import Pool, SchemaSpec, TableSpec, nobody

_AGO = [0.0, 0.5, 1_000.0, 10_000.0]  # ms
_MOVING_KINDS = {"time", "float", "float | None", "int", "int | None", "str | float | None"}
PERIODS_MS = [1_000, 60_000]


class Query(msgspec.Struct, frozen=True):
    """One ask of a function in `functions/model.py`."""

    path: ClassVar[str]

    @property
    def key(self) -> str:
        """The same for equal asks, so that asking with it shares as asking without it would."""
        raise NotImplementedError

    @property
    def run_key(self) -> str:
        """What the function keeps in `ran`."""
        return self.key

    def arguments(self) -> bytes:
        raise NotImplementedError


class PlanQuery(Query, frozen=True):
    path = "model:plan"
    steps: list[Plan]

    @property
    def key(self) -> str:
        return self.path + " " + _digest(self.steps)

    def arguments(self) -> bytes:
        return encode({"key": self.key, "steps": pack(self.steps)})


class SlowPlanQuery(PlanQuery, frozen=True):
    path = "model:slow_plan"


class PageQuery(Query, frozen=True):
    path = "model:page"
    scan: ScanSpec
    num_items: int
    cursor: str | None = None
    end_cursor: str | None = None

    @property
    def key(self) -> str:
        """The same for all pages of a list: a cursor is of one list."""
        return self.path + " " + _digest(self.scan)

    @property
    def run_key(self) -> str:
        return f"{self.key} {self.num_items} {self.cursor} {self.end_cursor}"

    def arguments(self) -> bytes:
        options = {"numItems": float(self.num_items), "cursor": self.cursor}
        if self.end_cursor is not None:
            options["endCursor"] = self.end_cursor
        return encode({"key": self.key, "scan": pack(self.scan), "paginationOpts": options})


class Asking:
    """What can be asked of one schema at one time."""

    def __init__(self, choices: Choices, schema: SchemaSpec, pool: Pool) -> None:
        self._choices, self._tables, self._pool = choices, schema.tables, pool
        self._names = sorted(schema.tables)
        self._by_time = [  # indexes, and how many of their fields come before a time
            (name, index_name, [table.kinds.get(field) for field in index.fields].index("time"))
            for name, table in sorted(schema.tables.items())
            for index_name, index in table.indexes.items()
            if "time" in [table.kinds.get(field) for field in index.fields]
        ]

    def query(self) -> Query:
        choices = self._choices
        kind = choices.one(["scan"] * 4 + ["called"] * 2 + ["plan"] * 5 + ["slow", "page", "page"])
        match kind:
            case "scan":
                return PlanQuery([self._scan_ask()])
            case "called":
                return PlanQuery([Call([self._scan_ask()])])
            case "slow":
                return SlowPlanQuery([self._scan_ask()])
            case "page":
                return PageQuery(self._scan(), choices.between(1, 3))
        return PlanQuery(choices.many(lambda: self.step(2), 1, 2))

    def step(self, depth: int) -> Plan:
        """One step, which may call others so deep."""
        choices, tables = self._choices, self._tables.values()
        kinds: list[Callable[[], Plan]] = [
            *[self._scan_ask] * 5,
            lambda: Get(choices.many(self._id, 1, 2), choices.chance(4)),
            lambda: Who(choices.one(["subject", "role", "nothing"])),
        ]
        if "User" in self._tables:
            kinds += [Role] * 5
        if any(table.aggregates for table in tables):
            kinds += [self._total] * 3
        if any(index.is_ranked for table in tables for index in table.indexes.values()):
            kinds += [self._rank] * 3
        if any("time" in table.kinds.values() for table in tables):
            kinds += [lambda: Period(choices.one(PERIODS_MS))]
        if depth:
            kinds += [lambda: Call(self._inner(depth), choices.chance(2))] * 7
            kinds += [lambda: Each(self._scan(), self._inner(depth))] * 2
            kinds += [lambda: When(self._id(), [Refuse()] if choices.chance(3) else self._inner(depth))]
        return choices.one(kinds)()

    def _inner(self, depth: int) -> list[Plan]:
        return self._choices.many(lambda: self.step(depth - 1), 1, 2)

    def _id(self) -> str:
        newest = [id for ids in self._pool.ids.values() for id in ids[-3:]]
        return self._choices.one([*newest, nobody(self._names[0])])

    def _scan_ask(self) -> ScanAsk:
        end = self._choices.one(["collect", "take", "first", "unique", "count", "loop"])
        return ScanAsk(self._scan(), end, self._choices.between(0, 3) if end in ("take", "loop") else 0)

    def _scan(self) -> ScanSpec:
        if self._by_time and self._choices.chance(3):
            return self._scan_of_time()
        class_name = self._choices.one(self._names)
        return self._scan_of(class_name, self._choices.one([None, *self._tables[class_name].indexes]))

    def _scan_of_time(self) -> ScanSpec:
        """What has come, or is still to come."""
        choices = self._choices
        class_name, index, equal_count = choices.one(self._by_time)
        table = self._tables[class_name]
        fields = table.indexes[index].fields[:equal_count]
        return ScanSpec(
            class_name,
            index,
            {field: choices.one(table.values(field, self._pool)) for field in fields},
            ago={choices.one(["gte", "gt", "lt", "lte"]): choices.one(_AGO)},
            is_descending=choices.chance(2),
            filter=self._filter(table),
        )

    def _scan_of(self, class_name: str, index: str | None) -> ScanSpec:
        choices, table = self._choices, self._tables[class_name]
        fields = () if index is None else table.indexes[index].fields
        equal_count = choices.one([0, *range(len(fields) + 1)])
        equal = {field: choices.one(table.values(field, self._pool)) for field in fields[:equal_count]}
        bounds: dict[str, Any] = {}
        ago: dict[str, float] = {}
        kind = table.kinds.get(fields[equal_count], "id") if equal_count < len(fields) else "creation"
        moves_in = {"time": 2, "creation": 3}.get(kind, 12 if kind in _MOVING_KINDS else 0)
        for names in (["gt", "gte"], ["lt", "lte"]):
            if choices.chance(2):
                name = choices.one(names)
                if moves_in and choices.chance(moves_in):
                    ago[name] = choices.one(_AGO)
                elif kind == "creation":
                    bounds[name] = choices.one([0.0, *self._pool.creation_times])
                else:
                    values = table.values(fields[equal_count], self._pool)
                    bounds[name] = choices.one([value for value in values if value is not None])
        return ScanSpec(
            class_name,
            index,
            equal,
            bounds,
            ago,
            is_descending=choices.chance(2),
            filter=self._filter(table),
            with_deleted=table.keeps_deleted and choices.chance(4),
            is_unrestricted=table.policy is not None and choices.chance(8),
        )

    def _filter(self, table: TableSpec) -> Filter | None:
        does = self._choices.one([None, None, None, "keep", "drop", "raise", "refuse"])
        if does is None:
            return None
        field = self._choices.one(sorted(table.fields))
        return Filter(field, does, self._choices.one(table.values(field, self._pool)))

    def _total(self) -> TotalOf:
        choices = self._choices
        class_name, name = choices.one([(c, name) for c in self._names for name in self._tables[c].aggregates])
        table = self._tables[class_name]
        aggregate = table.aggregates[name]
        key = {field: choices.one(table.values(field, self._pool)) for field in aggregate.fields}
        return TotalOf(class_name, name, key, choices.many(lambda: choices.one([None, *aggregate.sums]), 1, 2))

    def _rank(self) -> Rank | RankedPage:
        choices = self._choices
        class_name, index = choices.one(
            [(c, name) for c in self._names for name, index in self._tables[c].indexes.items() if index.is_ranked]
        )
        scan = msgspec.structs.replace(self._scan_of(class_name, index), with_deleted=False)
        if not choices.chance(10):
            scan = msgspec.structs.replace(scan, filter=None)
        if choices.chance(2):
            return Rank(scan, choices.one([*self._pool.ids.get(class_name, ()), nobody(class_name)]))
        return RankedPage(scan, choices.between(0, 2), choices.between(1, 3), choices.chance(2))


# -- what is written


def insert(choices: Choices, schema: SchemaSpec, pool: Pool) -> Write:
    class_name = choices.one(sorted(schema.tables))
    return Write("insert", class_name, "", _fields(choices, schema.tables[class_name], pool), is_unrestricted=True)


def write(choices: Choices, schema: SchemaSpec, pool: Pool) -> Write:
    class_name = choices.one(sorted(schema.tables))
    table, ids = schema.tables[class_name], pool.ids.get(class_name, ())
    kinds = ["insert", "insert", "patch", "replace", "delete"] if ids else ["insert"]
    if ids and table.keeps_deleted:
        kinds += ["delete", "restore", "restore", "purge"]
    does = choices.one([*kinds, "delete_newest"])
    id, fields = "", {}
    match does:
        case "insert":
            fields = _fields(choices, table, pool)
        case "replace":
            id, fields = choices.one(ids), _fields(choices, table, pool)
        case "patch":
            id = choices.one(ids)
            fields = {name: choices.one(table.values(name, pool)) for name in choices.some(sorted(table.fields), 1, 2)}
        case "delete" | "restore" | "purge":
            id = choices.one([*ids[:2], *ids[:2], *ids, nobody(class_name)])  # those that many name more often
    return Write(
        does,
        class_name,
        id,
        fields,
        is_unrestricted=table.policy is None or choices.chance(2),
        with_deleted=table.keeps_deleted and does in ("patch", "replace") and choices.chance(2),
        does_catch=choices.chance(2),
    )


def _fields(choices: Choices, table: TableSpec, pool: Pool) -> dict[str, Any]:
    return {field: choices.one(table.values(field, pool)) for field in table.fields}


# -- on the wire


def encode(value: Any) -> bytes:
    """Arguments as JSON: as section 9 of the protocol has them."""
    return json.dumps(_to_wire(value)).encode()


def _to_wire(value: Any) -> Any:
    match value:
        case bytes():
            return {"$bytes": b64encode(value).decode()}
        case dict():
            return {key: _to_wire(item) for key, item in value.items()}
    return value


def _digest(value: Any) -> str:
    return hashlib.blake2s(pack(value), digest_size=6).hexdigest()
