"""Which values are left to msgspec: the hot path of every result."""

import math
from typing import Any

import msgspec
import pytest

from engine.limits import Limits
from engine.schema import Table
from engine.values import Int64, compile_encoder
from engine.values.plain import compile_is_plain
from engine.values.shapes import shape_of

LIMITS = Limits()


class Progress(Table, name="progress"):
    position_seconds: float
    percentage: float | None = None
    thumbnail: bytes | None = None
    notes: dict[str, str] = {}


class Summary(msgspec.Struct):
    rows: list[Progress]
    count: int


def is_plain(annotation: Any, value: Any) -> bool:
    return compile_is_plain(shape_of(annotation, where="test"), LIMITS)(value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list[Progress], [Progress(position_seconds=0.0), Progress(position_seconds=1.5, percentage=0.0)]),
        (Summary | None, Summary([Progress(position_seconds=2.0, notes={"a": "é"})], 1)),
        (dict[str, int | float], {"viewerCount": 0, "share": 0.5}),
        (Any, {"rows": [Progress(position_seconds=2.0)], "none": None, "text": "$"}),
    ],
)
def test_ordinary_results_are_plain(annotation: Any, value: Any) -> None:
    assert is_plain(annotation, value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list[Progress], [Progress(position_seconds=1.0), Progress(position_seconds=-0.0)]),
        (list[Progress], [Progress(position_seconds=1.0, percentage=math.inf)]),
        (list[Progress], [Progress(position_seconds=1.0, thumbnail=b"")]),
        (list[Progress], [Progress(position_seconds=1.0, notes={"$a": "b"})]),
        (list[Progress], [Progress(position_seconds=1.0), None]),
        (Summary, Summary([], 2**53 + 1)),
        (Summary, Summary([], True)),
        (Int64, 1),
        (Any, {"rows": [Progress(position_seconds=math.nan)]}),
        (Any, {1: 2}),
        (Any, [{1}]),
    ],
)
def test_special_and_wrong_values_are_not_plain(annotation: Any, value: Any) -> None:
    assert not is_plain(annotation, value)


def test_an_annotation_may_nest_deeper_than_python_can_nest_loops() -> None:
    annotation: Any = int
    value: Any = 1
    for _ in range(40):
        annotation, value = list[annotation], [value]
    assert compile_encoder(annotation, limits=LIMITS)(value) == b"[" * 40 + b"1" + b"]" * 40
