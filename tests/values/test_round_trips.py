"""What every part of the layer promises of every annotation: values come back, and nothing but a refusal goes wrong."""

import json
import math
import sqlite3
from typing import Any, Union

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.errors import InvalidArgument, InvalidResult, SchemaError
from engine.limits import Limits
from engine.ranges import key_prefix
from engine.values import compile_column, compile_decoder, compile_encoder, decode_value, encode_value, size_of, to_wire
from engine.values.encoder import compile_shape_encoder, compile_to_wire
from engine.values.shapes import shape_of
from tests import strategies
from tests.strategies import Typed, are_same

pytestmark = pytest.mark.slow  # hundreds of examples each

LIMITS = Limits()


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def is_real_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@given(st.data(), strategies.typed)
def test_a_value_comes_back_from_its_wire_json_with_its_types(data: st.DataObject, typed: Typed) -> None:
    value = data.draw(typed.values)
    payload = compile_encoder(typed.annotation, limits=LIMITS)(value)
    decode = compile_decoder(typed.annotation, limits=LIMITS, is_stored=True)
    assert are_same(decode(msgspec.json.decode(payload)), value)


@given(st.data(), strategies.typed)
def test_the_quick_way_and_the_exact_way_make_the_same_bytes(data: st.DataObject, typed: Typed) -> None:
    value = data.draw(typed.values)
    shape = shape_of(typed.annotation, where="test")
    exact = msgspec.json.encode(compile_to_wire(shape, limits=LIMITS)(value))
    assert compile_shape_encoder(shape, limits=LIMITS)(value) == exact


@given(st.data(), strategies.typed)
def test_what_goes_out_is_strict_json_with_keys_that_clients_take(data: st.DataObject, typed: Typed) -> None:
    payload = compile_encoder(typed.annotation, limits=LIMITS)(data.draw(typed.values))

    def check(wire: Any) -> None:
        if isinstance(wire, dict) and (len(wire) != 1 or next(iter(wire)) not in ("$integer", "$bytes", "$float")):
            assert all(key.isascii() and key.isprintable() and key[:1] != "$" for key in wire)
        if is_real_number(wire):
            assert abs(wire) <= 2**53 or isinstance(wire, float)
        for inner in wire.values() if isinstance(wire, dict) else wire if isinstance(wire, list) else ():
            check(inner)

    check(json.loads(payload.decode("utf-8"), parse_constant=refuse_constant))


@given(strategies.typed, strategies.wire_values)
def test_any_wire_value_is_either_refused_as_an_argument_or_fits(typed: Typed, wire: Any) -> None:
    try:
        value = compile_decoder(typed.annotation, limits=LIMITS)(wire)
    except InvalidArgument:
        return
    compile_encoder(typed.annotation, limits=LIMITS)(value)


@given(strategies.typed, strategies.wire_values | strategies.values)
def test_any_python_value_is_either_refused_as_a_result_or_can_be_read(typed: Typed, value: Any) -> None:
    try:
        payload = compile_encoder(typed.annotation, limits=LIMITS)(value)
    except InvalidResult:
        return
    compile_decoder(typed.annotation, limits=LIMITS)(msgspec.json.decode(payload))


@given(strategies.values)
def test_a_value_without_an_annotation_comes_back(value: Any) -> None:
    def with_floats(value: Any) -> Any:  # a plain number is a double to every client
        if is_real_number(value) and abs(value) <= 2**53:
            return float(value)
        if isinstance(value, list):
            return [with_floats(item) for item in value]
        return {key: with_floats(item) for key, item in value.items()} if isinstance(value, dict) else value

    payload = encode_value(value, LIMITS)
    assert are_same(decode_value(msgspec.json.decode(payload)), with_floats(value))
    assert are_same(decode_value(to_wire(value)), with_floats(value))
    assert size_of(value) > 0


@given(st.data(), strategies.typed)
def test_a_value_comes_back_from_its_column(data: st.DataObject, typed: Typed) -> None:
    column, value = compile_column(typed.annotation, where="t.field"), data.draw(typed.values)
    assume(not (column.is_scalar and isinstance(value, float) and math.isnan(value)))
    with sqlite_table(column.sqlite_type, nullable=column.nullable) as connection:
        connection.execute("INSERT INTO t VALUES (?)", (column.to_column(value),))
        ((stored,),) = connection.execute("SELECT field FROM t").fetchall()
    back = column.from_column(stored)
    assert are_same(back, value + 0.0 if column.is_scalar and isinstance(value, float) else value)
    assert not column.plain or stored == value


@given(st.data(), strategies.typed_scalars | strategies.typed_unions())
def test_scalar_columns_sort_in_sqlite_as_their_order_keys_do(data: st.DataObject, typed: Typed) -> None:
    column = compile_column(typed.annotation, where="t.field")
    assume(column.is_scalar)
    real = typed.values.filter(lambda value: value == value)
    values = data.draw(st.lists(real, min_size=2, max_size=6))
    with sqlite_table(column.sqlite_type, nullable=column.nullable) as connection:
        connection.executemany("INSERT INTO t VALUES (?)", [(column.to_column(value),) for value in values])
        rows = connection.execute("SELECT field FROM t ORDER BY field, rowid").fetchall()
    by_key = sorted((column.from_column(column.to_column(value)) for value in values), key=lambda v: key_prefix((v,)))
    assert [column.from_column(stored) for (stored,) in rows] == by_key


@given(strategies.typed)
def test_a_union_of_one_form_twice_is_a_schema_error(typed: Typed) -> None:
    annotation = Union[list[typed.annotation], list[str], list[int]]  # noqa: UP007 - None has no `|`
    with pytest.raises(SchemaError, match=r"chat:list limit: .* cannot be told apart"):
        compile_decoder(annotation, limits=LIMITS, where="chat:list limit")


class sqlite_table:  # noqa: N801 - used like a function
    """A connection with one STRICT table `t (field)`."""

    def __init__(self, sqlite_type: str, *, nullable: bool) -> None:
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute(f"CREATE TABLE t (field {sqlite_type} {'' if nullable else 'NOT NULL'}) STRICT")

    def __enter__(self) -> sqlite3.Connection:
        return self.connection

    def __exit__(self, *_: object) -> None:
        self.connection.close()
