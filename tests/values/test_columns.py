"""How fields are stored."""

import math
from typing import Annotated, Any, Literal

import msgspec
import pytest

from engine.errors import InvalidDocument
from engine.ids import Id
from engine.values import Int64, compile_column, size_of


class Point(msgspec.Struct, frozen=True):
    x: float
    n: Int64 = 0


@pytest.mark.parametrize(
    ("annotation", "sqlite_type", "nullable"),
    [
        (str, "TEXT", False),
        (Id["Game"], "TEXT", False),
        (Literal["a", "b"] | None, "TEXT", True),
        (Annotated[str, msgspec.Meta(max_length=3)] | None, "TEXT", True),
        (int, "INTEGER", False),
        (Int64, "INTEGER", False),
        (bool | None, "INTEGER", True),
        (Literal[1, 2], "INTEGER", False),
        (float, "REAL", False),
        (bytes | None, "BLOB", True),
        (int | float, "ANY", False),
        (Literal["a", 1], "ANY", False),
        (str | bytes | None, "ANY", True),
    ],
)
def test_a_scalar_field_has_a_column_of_its_own_type(annotation: Any, sqlite_type: str, nullable: bool) -> None:
    column = compile_column(annotation, where="games.x")
    assert (column.sqlite_type, column.nullable, column.is_scalar, column.is_json) == (
        sqlite_type,
        nullable,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("annotation", "nullable"),
    [(list[int], False), (dict[str, str] | None, True), (Point, False), (bool | int, False), (Any, True), (None, True)],
)
def test_any_other_field_is_json_text_that_cannot_be_indexed(annotation: Any, nullable: bool) -> None:
    column = compile_column(annotation, where="games.x")
    assert (column.sqlite_type, column.nullable, column.is_scalar, column.is_json) == ("TEXT", nullable, False, True)


@pytest.mark.parametrize(
    ("annotation", "value", "stored"),
    [
        (float, -0.0, 0.0),
        (float, 5, 5.0),
        (int | float, 5, 5),
        (bool, True, True),
        (float | None, None, None),
        (Point, Point(-0.0, 5), '{"x":{"$float":"AAAAAAAAAIA="},"n":{"$integer":"BQAAAAAAAAA="}}'),
        (list[float] | None, [1.0, math.nan], '[1.0,{"$float":"AAAAAAAA+H8="}]'),
        (list[float] | None, None, None),
        (Any, None, None),
        (Any, [None], "[null]"),
    ],
)
def test_a_value_is_stored_in_a_form_that_other_tools_can_read(annotation: Any, value: Any, stored: Any) -> None:
    to_column = compile_column(annotation, where="games.x").to_column
    assert repr(to_column(value)) == repr(stored)


@pytest.mark.parametrize("annotation", [float, float | None, int | float])
def test_a_scalar_field_refuses_nan(annotation: Any) -> None:
    with pytest.raises(InvalidDocument, match=r"^games\.x: NaN has no place in an order"):
        compile_column(annotation, where="games.x").to_column(math.nan)


def test_a_nested_value_that_does_not_fit_is_refused_in_both_directions() -> None:
    column = compile_column(list[int], where="games.x")
    with pytest.raises(InvalidDocument, match=r"^games\.x\[1\]: expected int, got 'a'$"):
        column.to_column([1, "a"])
    with pytest.raises(InvalidDocument, match=r"^games\.x: \[1\]: expected int, got 'a'$"):
        column.from_column('[1,"a"]')
    with pytest.raises(InvalidDocument, match=r"^games\.x: "):
        column.from_column("[1,")


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        (None, 1),
        (True, 1),
        (5, 9),
        (1.5, 9),
        ("né", 5),
        (b"abc", 5),
        ([1, "a"], 2 + 9 + 3),
        ({"ab": None, "c": True}, 2 + 4 + 3),
        (Point(1.0), 2 + (1 + 1 + 9) + (1 + 1 + 9)),
    ],
)
def test_the_size_of_a_value_follows_the_formula_of_the_protocol_page(value: Any, size_bytes: int) -> None:
    assert size_of(value) == size_bytes
