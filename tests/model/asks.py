"""What subscribers ask and mutations write in the model test: as values, as strategies, and on the wire."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec
from hypothesis import strategies as st

from engine.ids import make_id, table_tag
from tests.model.schemas import SchemaSpec, TableSpec


class Filter(msgspec.Struct, frozen=True):
    field: str
    does: Literal["keep", "drop", "raise", "refuse"]
    value: Any


class ScanSpec(msgspec.Struct, frozen=True):
    table: str
    index: str | None
    equal: dict[str, Any]
    bounds: dict[str, Any]
    is_descending: bool
    filter: Filter | None


class ScanAsk(msgspec.Struct, frozen=True):
    scan: ScanSpec
    end: str
    n: int


class Write(msgspec.Struct, frozen=True):
    does: str
    table: str
    id: str
    fields: dict[str, Any]


class Query(msgspec.Struct, frozen=True):
    """One ask of a function in `functions/model.py`; the fields are its arguments."""

    path: ClassVar[str]

    @property
    def key(self) -> str:
        """The same for equal asks, so that asking with it shares as asking without it would."""
        return self.path + " " + _digest(msgspec.structs.asdict(self))

    @property
    def run_key(self) -> str:
        """What the function keeps in `ran`."""
        return self.key

    def arguments(self) -> bytes:
        return encode({"key": self.key, **msgspec.structs.asdict(self)})


class ScanQuery(Query, frozen=True):
    path = "model:scan"
    ask: ScanAsk


class SlowScanQuery(ScanQuery, frozen=True):
    path = "model:slow_scan"


class GetQuery(Query, frozen=True):
    path = "model:get"
    ids: list[str]


class NestedQuery(Query, frozen=True):
    path = "model:nested"
    asks: list[ScanAsk]
    does_catch: bool


class WhoQuery(Query, frozen=True):
    path = "model:who"
    parts: list[str]
    when: str
    more: list[str]


class PageQuery(Query, frozen=True):
    path = "model:page"
    scan: ScanSpec
    num_items: int
    cursor: str | None = None
    end_cursor: str | None = None

    @property
    def key(self) -> str:
        """The same for all pages of a list: a cursor is of one list."""
        return self.path + " " + _digest({"scan": self.scan})

    @property
    def run_key(self) -> str:
        return f"{self.key} {self.num_items} {self.cursor} {self.end_cursor}"

    def arguments(self) -> bytes:
        options = {"numItems": self.num_items, "cursor": self.cursor}
        if self.end_cursor is not None:
            options["endCursor"] = self.end_cursor
        return encode({"key": self.key, "scan": self.scan, "paginationOpts": options})


# -- strategies


def nobody(spec: SchemaSpec, class_name: str) -> str:
    """An id of the table that no document has."""
    return make_id(table_tag(_table_name(class_name)), 2, bytes(9))


def _table_name(class_name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in class_name).lstrip("_")


@st.composite
def scan_specs(draw: st.DrawFn, schema: SchemaSpec, creation_times: Sequence[float]) -> ScanSpec:
    class_name = draw(st.sampled_from(sorted(schema)))
    table = schema[class_name]
    index = draw(st.sampled_from([None, *table.indexes]))
    fields = () if index is None else table.indexes[index].fields
    equal_count = draw(st.sampled_from([0, *range(len(fields) + 1)]))
    equal = {field: draw(table.values(field)) for field in fields[:equal_count]}
    if equal_count < len(fields):
        bound_values = table.values(fields[equal_count]).filter(lambda value: value is not None)
    else:
        bound_values = st.sampled_from([0.0, *creation_times[-3:]])
    bounds: dict[str, Any] = {}
    for side in (["gt", "gte"], ["lt", "lte"]):
        name = draw(st.sampled_from([None, None, *side]))
        if name is not None:
            bounds[name] = draw(bound_values)
    return ScanSpec(class_name, index, equal, bounds, draw(st.booleans()), draw(filters(table)))


@st.composite
def filters(draw: st.DrawFn, table: TableSpec) -> Filter | None:
    does = draw(st.sampled_from([None, None, None, "keep", "drop", "raise", "refuse"]))
    if does is None:
        return None
    field = draw(st.sampled_from(sorted(table.kinds)))
    return Filter(field, does, draw(table.values(field)))


@st.composite
def scan_asks(draw: st.DrawFn, schema: SchemaSpec, creation_times: Sequence[float]) -> ScanAsk:
    end = draw(st.sampled_from(["take", "first", "unique", "collect", "count", "loop"]))
    n = draw(st.integers(0, 3)) if end in ("take", "loop") else 0
    return ScanAsk(draw(scan_specs(schema, creation_times)), end, n)


@st.composite
def queries(draw: st.DrawFn, schema: SchemaSpec, ids: Sequence[str], creation_times: Sequence[float]) -> Query:
    asks = scan_asks(schema, creation_times)
    some_ids = st.sampled_from([*ids[-6:], nobody(schema, next(iter(schema)))])
    match draw(st.sampled_from(["scan"] * 6 + ["slow", "get", "nested", "who", "page", "page"])):
        case "scan":
            return ScanQuery(draw(asks))
        case "slow":
            return SlowScanQuery(draw(asks))
        case "get":
            return GetQuery(draw(st.lists(some_ids, min_size=1, max_size=2)))
        case "nested":
            return NestedQuery(draw(st.lists(asks, min_size=1, max_size=2)), draw(st.booleans()))
        case "who":
            parts = st.lists(st.sampled_from(["subject", "role"]), max_size=1)
            return WhoQuery(draw(parts), draw(some_ids), draw(parts))
        case _:
            return PageQuery(draw(scan_specs(schema, creation_times)), draw(st.integers(1, 3)))


@st.composite
def inserts(draw: st.DrawFn, schema: SchemaSpec) -> Write:
    class_name = draw(st.sampled_from(sorted(schema)))
    return Write("insert", class_name, "", draw(schema[class_name].documents()))


@st.composite
def writes(draw: st.DrawFn, schema: SchemaSpec, ids_by_table: dict[str, list[str]]) -> Write:
    class_name = draw(st.sampled_from(sorted(schema)))
    table, ids = schema[class_name], ids_by_table.get(class_name, [])
    some = ["insert", "insert", "patch", "replace", "delete"] if ids else ["insert"]
    does = draw(st.sampled_from([*some, "delete_newest"]))
    match does:
        case "insert":
            return draw(inserts(schema))
        case "replace":
            return Write(does, class_name, draw(st.sampled_from(ids)), draw(table.documents()))
        case "patch":
            fields = draw(st.lists(st.sampled_from(sorted(table.kinds)), min_size=1, max_size=2, unique=True))
            return Write(does, class_name, draw(st.sampled_from(ids)), {f: draw(table.values(f)) for f in fields})
        case "delete_newest":
            return Write(does, class_name, "", {})
        case _:
            return Write(does, class_name, draw(st.sampled_from([*ids, *ids, nobody(schema, class_name)])), {})


# -- on the wire


def encode(value: Any) -> bytes:
    return json.dumps(to_wire(value)).encode()


def to_wire(value: Any) -> Any:
    """As section 9 of the protocol has it; every int as int64, so that it stays one where anything may come."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return {"$integer": base64.b64encode(value.to_bytes(8, "little", signed=True)).decode()}
        case float():
            return value if math.isfinite(value) else {"$float": base64.b64encode(_double(value)).decode()}
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case list() | tuple():
            return [to_wire(item) for item in value]
        case dict():
            return {key: to_wire(item) for key, item in value.items()}
        case msgspec.Struct():
            return to_wire(msgspec.structs.asdict(value))
    raise TypeError(f"{value!r} has no wire form")


def _double(value: float) -> bytes:
    return bytes.fromhex("000000000000f07f" if value > 0 else "000000000000f0ff")


def _digest(value: Any) -> str:
    return hashlib.blake2s(encode(value), digest_size=6).hexdigest()
