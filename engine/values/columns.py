"""Python values to SQLite columns and back, compiled from a field's annotation.

    str, Literal of str, Id → TEXT · int, Int64, bool, Literal of int → INTEGER · float → REAL · bytes → BLOB
    unions of those without bool → ANY · everything else → TEXT that holds wire JSON, which cannot be indexed
    `| None` makes any of them nullable: NULL is None

Invariants
  1. `from_column(to_column(value)) == value` for every value that fits the field; -0.0 in a scalar comes back as 0.0.
  2. A scalar column orders in SQLite as `ranges.py` orders its values in Python: NaN is refused, -0.0 stored as 0.0.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from engine.errors import InvalidArgument, InvalidDocument
from engine.ranges import Scalar
from engine.values import shapes
from engine.values.decoder import compile_shape_decoder
from engine.values.encoder import compile_shape_encoder
from engine.values.shapes import (
    Anything,
    Bool,
    Bytes,
    Constrained,
    Float,
    Int,
    Int64Shape,
    LiteralShape,
    Null,
    Shape,
    Str,
    UnionShape,
)
from engine.values.wire import UNBOUNDED, Mismatch, describe


class Column(msgspec.Struct, frozen=True):
    """How one field is stored."""

    sqlite_type: str  # of a STRICT table
    nullable: bool
    is_scalar: bool  # may be indexed and compared in SQL
    to_column: Callable[[Any], Scalar]  # of a value that fits, or None; InvalidDocument for NaN and what no JSON holds
    from_column: Callable[[Any], Any]  # of what SQLite gave; InvalidDocument when it does not fit the annotation
    plain: bool = False  # value and column are the same object both ways
    is_bool: bool = False  # 0 and 1 in SQLite
    is_float: bool = False  # `value + 0.0` stores it, once NaN is refused; comes back as it is
    is_json: bool = False


def compile_column(annotation: Any, *, where: str) -> Column:
    """The column of a field; SchemaError, beginning with `where`, for an annotation that cannot be stored."""
    shape = shapes.shape_of(annotation, where=where)
    alternatives = shape.alternatives if isinstance(shape, UnionShape) else (shape,)
    scalars = [alternative for alternative in alternatives if not isinstance(alternative, Null)]
    nullable = len(scalars) < len(alternatives) or isinstance(shape, Anything)
    types = {_scalar_type(scalar) for scalar in scalars}
    is_bool = any(isinstance(_bare(scalar), Bool) for scalar in scalars)
    if "JSON" in types or not types or (is_bool and len(scalars) > 1):
        return _json_column(shape, nullable, where)
    holds_float = any(isinstance(_bare(scalar), Float) for scalar in scalars)
    is_float = holds_float and len(scalars) == 1
    return Column(
        sqlite_type=types.pop() if len(types) == 1 else "ANY",
        nullable=nullable,
        is_scalar=True,
        to_column=_number_to_column(where, is_float=is_float) if holds_float else _same,
        from_column=_bool_from_column if is_bool else _same,
        plain=not is_bool and not holds_float,
        is_bool=is_bool,
        is_float=is_float,
    )


def size_of(value: Any) -> int:
    """Bytes that a value counts for in every limit: the formula of Convex (section 9 of the protocol page)."""
    match value:
        case None | bool():
            return 1
        case int() | float():
            return 9
        case str():
            return 2 + (len(value) if value.isascii() else len(value.encode()))
        case bytes():
            return 2 + len(value)
        case list() | tuple():
            return 2 + sum(map(size_of, value))
        case dict():
            return 2 + sum(len(key) + 1 + size_of(item) for key, item in value.items())
        case msgspec.Struct():
            names = zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
            return 2 + sum(len(wire_name) + 1 + size_of(getattr(value, name)) for name, wire_name in names)
    raise InvalidDocument(f"{describe(value)} is no value that the engine can store or send.")


def _scalar_type(shape: Shape) -> str:
    match _bare(shape):
        case Str():
            return "TEXT"
        case Int() | Int64Shape() | Bool():
            return "INTEGER"
        case Float():
            return "REAL"
        case Bytes():
            return "BLOB"
        case LiteralShape(choices):
            return "TEXT" if isinstance(choices[0], str) else "INTEGER"
    return "JSON"


def _bare(shape: Shape) -> Shape:
    return shape.inner if isinstance(shape, Constrained) else shape


def _same(value: Any) -> Any:
    return value


def _bool_from_column(value: Any) -> Any:
    return None if value is None else value == 1


def _number_to_column(where: str, *, is_float: bool) -> Callable[[Any], Scalar]:
    """For columns with floats among what they hold; in a REAL column an int becomes one."""

    def to_column(value: Any) -> Scalar:
        if type(value) is float or (is_float and value is not None):
            if value != value:
                raise InvalidDocument(f"{where}: NaN has no place in an order, so a scalar field refuses it.")
            return float(value) + 0.0  # -0.0 + 0.0 is 0.0
        scalar: Scalar = value
        return scalar

    return to_column


def _json_column(shape: Shape, nullable: bool, where: str) -> Column:
    encode = compile_shape_encoder(shape, limits=UNBOUNDED)
    decode_json = msgspec.json.Decoder().decode
    decode = compile_shape_decoder(shape, limits=UNBOUNDED, is_stored=True)

    def to_column(value: Any) -> Scalar:
        if value is None and nullable:
            return None
        try:
            return encode(value).decode()
        except Mismatch as error:
            raise InvalidDocument(str(error.under(where))) from None

    def from_column(text: Any) -> Any:
        if text is None and nullable:
            return None
        try:
            return decode(decode_json(text))
        except (InvalidArgument, msgspec.DecodeError, TypeError) as error:
            raise InvalidDocument(f"{where}: {error}") from None

    return Column(
        sqlite_type="TEXT",
        nullable=nullable,
        is_scalar=False,
        to_column=to_column,
        from_column=from_column,
        is_json=True,
    )
