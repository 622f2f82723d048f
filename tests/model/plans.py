"""What queries and mutations of the model test do, as values: the test makes them up, the app under test follows them.

A query follows a *plan*: a list of steps, each of which gives one value. Steps that call other queries hold the plans
of those.
"""

from typing import Any, Literal, Union

import msgspec


class Filter(msgspec.Struct, frozen=True):
    field: str
    does: Literal["keep", "drop", "raise", "refuse"]  # the documents with this value
    value: Any


class ScanSpec(msgspec.Struct, frozen=True):
    table: str
    index: str | None = None  # None: the table itself
    equal: dict[str, Any] = {}
    bounds: dict[str, Any] = {}
    ago: dict[str, float] = {}  # bounds that move with time, in ms
    is_descending: bool = False
    filter: Filter | None = None
    with_deleted: bool = False
    is_unrestricted: bool = False


class Step(msgspec.Struct, frozen=True, tag=True):
    """One value of a plan."""


class ScanAsk(Step, frozen=True):
    scan: ScanSpec
    end: str
    n: int = 0  # of take and loop


class Get(Step, frozen=True):
    ids: list[str]
    with_deleted: bool = False


class Who(Step, frozen=True):
    """Who asks; None for nobody."""

    part: Literal["subject", "role", "nothing"]


class Role(Step, frozen=True):
    """What the query returns that policies judge by."""


class Call(Step, frozen=True):
    """What another query returns, which follows this plan."""

    steps: "list[Plan]"
    does_catch: bool = False


class Each(Step, frozen=True):
    """What a query returns for each document of a scan, called while the scan is under way."""

    scan: ScanSpec
    steps: "list[Plan]"


class When(Step, frozen=True):
    """Some steps, while there is such a document."""

    id: str
    steps: "list[Plan]"


class Refuse(Step, frozen=True):
    """The query refuses, in its own words."""


class TotalOf(Step, frozen=True):
    table: str
    aggregate: str
    key: dict[str, Any]
    numbers: list[str | None]  # fields whose sums are looked at; None: the count


class Rank(Step, frozen=True):
    scan: ScanSpec
    id: str


class RankedPage(Step, frozen=True):
    scan: ScanSpec
    number: int
    size: int
    with_total: bool


class Period(Step, frozen=True):
    """How many whole periods there have been; the query says when there is one more."""

    ms: int


Plan = Union[  # noqa: UP007 - `|` takes no names of what comes later
    ScanAsk, Get, Who, Role, Call, Each, When, Refuse, TotalOf, Rank, RankedPage, Period
]


class Write(msgspec.Struct, frozen=True):
    does: Literal["insert", "patch", "replace", "delete", "restore", "purge", "delete_newest"]
    table: str
    id: str = ""
    fields: dict[str, Any] = {}
    is_unrestricted: bool = False
    with_deleted: bool = False  # of patch and replace
    does_catch: bool = False  # what refuses it


_steps = msgspec.msgpack.Decoder(list[Plan])
_scan = msgspec.msgpack.Decoder(ScanSpec)
_writes = msgspec.msgpack.Decoder(list[Write])


def pack(value: Any) -> bytes:
    """Any of these, or a list, as an argument: JSON would take an int for the double that it is to JavaScript."""
    return msgspec.msgpack.encode(value)


def unpack_steps(raw: bytes) -> list[Plan]:
    return _steps.decode(raw)


def unpack_scan(raw: bytes) -> ScanSpec:
    return _scan.decode(raw)


def unpack_writes(raw: bytes) -> list[Write]:
    return _writes.decode(raw)


def inner_plans(step: Plan) -> list[Plan]:
    """The steps that a step may take in turn."""
    return step.steps if isinstance(step, Call | Each | When) else []
