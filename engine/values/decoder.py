"""Wire values to Python values, compiled from an annotation.

Invariants
  1. What a decoder gives fits its annotation, as `msgspec.convert(..., strict=True)` judges, and passed the limits.
  2. A refusal names the path of the wrong value, what was expected there and what came.
  3. A name of a record's field may be spelled in snake_case or camelCase, not both at once; keys of a dict are data.

A decoder is a tree of closures, one for each shape: an argument of type `str` costs one call.
"""

from collections.abc import Callable
from typing import Any

from engine.errors import InvalidArgument, SchemaError
from engine.ids import is_id
from engine.limits import Limits
from engine.values import shapes
from engine.values.shapes import (
    Anything,
    Bool,
    Bytes,
    Constrained,
    DictShape,
    Float,
    Int,
    Int64Shape,
    ListShape,
    LiteralShape,
    Null,
    RecordField,
    RecordShape,
    Shape,
    Str,
    UnionShape,
)
from engine.values.wire import (
    EXACT_INT_MAX,
    UNBOUNDED,
    Mismatch,
    WireValue,
    check_count,
    check_keys,
    check_nesting,
    check_text,
    describe,
    double_of,
    is_special,
    mismatch,
    special_value,
    value_of,
)

Decode = Callable[[Any], Any]  # wire value -> value, or Mismatch
TagOf = Callable[[str], str]  # document class name -> the tag of its ids


class Decoder:
    """`decoder(wire)` gives the Python value, or raises InvalidArgument (invariant 2)."""

    __slots__ = ("_decode", "_depth_max", "shape")

    def __init__(self, shape: Shape, decode: Decode, depth_max: int | None) -> None:
        self.shape = shape
        self._decode = decode
        self._depth_max = depth_max  # None: no value of this shape can nest too deep

    def __call__(self, wire: WireValue) -> Any:
        try:
            if self._depth_max is not None:
                check_nesting(wire, self._depth_max)
            return self._decode(wire)
        except Mismatch as error:
            raise InvalidArgument(str(error)) from None
        except RecursionError:  # the depth limit was set higher than the stack
            raise InvalidArgument("the value nests deeper than this process can read") from None


def compile_decoder(
    annotation: Any, *, limits: Limits, tags: TagOf | None = None, where: str = "", is_stored: bool = False
) -> Decoder:
    """A decoder for values of the annotation; without `tags`, ids are any text.

    `is_stored`: the wire values were made by an encoder of ours, so an int among them was an int in Python.
    SchemaError, beginning with `where`, for an annotation that the wire cannot carry.
    """
    shape = shapes.shape_of(annotation, where=where or str(annotation))
    return compile_shape_decoder(shape, limits=limits, tags=tags, is_stored=is_stored)


def compile_shape_decoder(
    shape: Shape, *, limits: Limits, tags: TagOf | None = None, is_stored: bool = False
) -> Decoder:
    """As `compile_decoder`, of a shape."""
    is_open = shapes.has_no_fixed_depth(shape)
    decode = _Compiler(limits, tags, is_stored).compile(shape)
    return Decoder(shape, decode, limits.value_depth_max if is_open else None)


def decode_value(wire: WireValue) -> Any:
    """The Python value of any wire value; InvalidArgument for what is no value."""
    try:
        check_nesting(wire, UNBOUNDED.value_depth_max)
        return value_of(wire, UNBOUNDED, keeps_ints=False)
    except Mismatch as error:
        raise InvalidArgument(str(error)) from None


class _Compiler:
    def __init__(self, limits: Limits, tags: TagOf | None, is_stored: bool) -> None:
        self._limits, self._tags, self._is_stored = limits, tags, is_stored
        self._decode_by_record: dict[RecordShape, Decode] = {}

    def compile(self, shape: Shape) -> Decode:
        match shape:
            case Null() | Bool():
                return _exactly(type(None) if isinstance(shape, Null) else bool, shape)
            case Int() | Int64Shape():
                return _decode_int if isinstance(shape, Int) else _decode_int64
            case Float():
                return _decode_float
            case Str(id_of):
                return _decode_str if id_of is None or self._tags is None else self._id(shape, id_of, self._tags)
            case Bytes():
                return _decode_bytes
            case LiteralShape():
                return self._literal(shape)
            case Anything():
                limits, is_stored = self._limits, self._is_stored
                return lambda wire: value_of(wire, limits, keeps_ints=is_stored)
            case ListShape():
                return self._list(shape)
            case DictShape():
                return self._dict(shape)
            case RecordShape():
                return self._record(shape)
            case Constrained():
                return self._constrained(shape)
            case UnionShape():
                return self._union(shape)
        raise AssertionError(f"no decoder for {shape!r}")

    def _id(self, shape: Str, class_name: str, tags: TagOf) -> Decode:
        try:
            tag = tags(class_name)
        except KeyError:
            raise SchemaError(f"{shape}: there is no table of the class {class_name}.") from None

        def decode_id(wire: Any) -> str:
            if type(wire) is str and is_id(wire, tag):
                return wire
            raise mismatch(shape, wire)

        return decode_id

    def _literal(self, shape: LiteralShape) -> Decode:
        choices = frozenset(shape.choices)
        decode = _decode_str if isinstance(shape.choices[0], str) else _decode_int

        def decode_literal(wire: Any) -> Any:
            value = decode(wire)
            if value in choices:
                return value
            raise mismatch(shape, wire)

        return decode_literal

    def _list(self, shape: ListShape) -> Decode:
        decode = self.compile(shape.item)
        count_max = self._limits.array_item_count_max

        def decode_list(wire: Any) -> list[Any]:
            if type(wire) is not list:
                raise mismatch(shape, wire)
            check_count(len(wire), count_max, "items")
            items: list[Any] = []
            try:
                for item in wire:
                    items.append(decode(item))  # noqa: PERF401 - its length is the place of a wrong item
            except Mismatch as error:
                raise error.under(len(items)) from None
            return items

        return decode_list

    def _dict(self, shape: DictShape) -> Decode:
        decode_key, decode = self.compile(shape.key), self.compile(shape.item)
        limits = self._limits

        def decode_dict(wire: Any) -> dict[str, Any]:
            if type(wire) is not dict or is_special(wire):
                raise mismatch(shape, wire)
            check_count(len(wire), limits.object_field_count_max, "fields")
            check_keys(wire, limits)
            key, values = "", {}
            try:
                for key, item in wire.items():
                    values[decode_key(key)] = decode(item)
            except Mismatch as error:
                raise error.under(key) from None
            return values

        return decode_dict

    def _record(self, shape: RecordShape) -> Decode:
        known = self._decode_by_record.get(shape)
        if known is not None:
            return known
        # a record inside itself finds this one, whose parts follow below
        self._decode_by_record[shape] = lambda wire: decode_record(wire)
        by_spelling = {
            spelling: (field.name, self.compile(field.shape))
            for spelling, field in shape.field_by_spelling(str(shape)).items()
        }
        required = frozenset(field.name for field in shape.fields if field.is_required)
        make, tag_field, tag = shape.make, shape.tag_field, shape.tag

        def decode_record(wire: Any) -> Any:
            if type(wire) is not dict or (len(wire) == 1 and is_special(wire)):
                raise mismatch(shape, wire)
            values: dict[str, Any] = {}
            key = ""
            try:
                for key, item in wire.items():
                    named = by_spelling.get(key)
                    if named is None:
                        if key == tag_field and item == tag:
                            continue
                        raise Mismatch(f"unknown. {_known_fields(shape)}")
                    name, decode = named
                    if name in values:
                        raise Mismatch(f"spelled in two ways at once ({_both_spellings(shape, wire, name)})")
                    values[name] = decode(item)
            except Mismatch as error:
                raise error.under(key) from None
            if not required <= values.keys():
                raise _missing_field(shape, values)
            try:
                return make(**values)
            except (TypeError, ValueError) as error:  # from the struct's own __post_init__
                raise Mismatch(str(error)) from None

        self._decode_by_record[shape] = decode_record
        return decode_record

    def _constrained(self, shape: Constrained) -> Decode:
        decode, fits = self.compile(shape.inner), shape.fits

        def decode_constrained(wire: Any) -> Any:
            value = decode(wire)
            if not fits(value):
                raise mismatch(shape, wire)
            return value

        return decode_constrained

    def _union(self, shape: UnionShape) -> Decode:
        alternatives = [alternative for alternative in shape.alternatives if not isinstance(alternative, Null)]
        if len(alternatives) == 1:
            decode_other = self.compile(alternatives[0])
            return lambda wire: None if wire is None else decode_other(wire)

        by_type: dict[type, Decode] = {}  # of the wire value
        by_special: dict[str, Decode] = {}  # key of a special object
        by_tag: dict[Any, Decode] = {}
        tag_field: str | None = None
        integer = floating = None
        for alternative in shape.alternatives:
            decode = self.compile(alternative)
            match alternative.inner if isinstance(alternative, Constrained) else alternative:
                case Null():
                    by_type[type(None)] = decode
                case Bool():
                    by_type[bool] = decode
                case Str():
                    by_type[str] = decode
                case LiteralShape(choices) if isinstance(choices[0], str):
                    by_type[str] = decode
                case Float():
                    floating = decode
                case Int() | Int64Shape() | LiteralShape():
                    integer = decode
                case Bytes():
                    by_special["$bytes"] = decode
                case ListShape():
                    by_type[list] = decode
                case RecordShape(tag_field=str(field), tag=tag):
                    tag_field, by_tag[tag] = field, decode
                case DictShape() | RecordShape():
                    by_type[dict] = decode
        if integer is not None:
            by_type[int] = by_type[float] = by_special["$integer"] = by_special["$float"] = integer
        if floating is not None:  # a plain number is a double, but what is stored kept its type
            by_type[float] = by_special["$float"] = floating
            if integer is None or not self._is_stored:
                by_type[int] = floating
        return _by_form(shape, by_type, by_special, by_tag, tag_field)


def _by_form(
    shape: UnionShape,
    by_type: dict[type, Decode],
    by_special: dict[str, Decode],
    by_tag: dict[Any, Decode],
    tag_field: str | None,
) -> Decode:
    def decode_object(wire: dict[str, Any]) -> Any:
        if is_special(wire):
            decode = by_special.get(next(iter(wire)))
        elif tag_field is not None:
            tag = wire.get(tag_field)
            decode = by_tag.get(tag) if isinstance(tag, str | int) else None
            if decode is None:
                raise Mismatch(f"{tag_field} must be one of {', '.join(map(repr, by_tag))}, not {describe(tag)}")
        else:
            decode = untagged
        if decode is None:
            raise mismatch(shape, wire)
        return decode(wire)

    def decode_union(wire: Any) -> Any:
        decode = by_type.get(type(wire))
        if decode is None:
            raise mismatch(shape, wire)
        return decode(wire)

    untagged = by_type.get(dict)
    by_type = {**by_type, dict: decode_object}
    return decode_union


# -- scalars


def _exactly(kind: type, shape: Shape) -> Decode:
    def decode_exactly(wire: Any) -> Any:
        if type(wire) is kind:
            return wire
        raise mismatch(shape, wire)

    return decode_exactly


def _decode_str(wire: Any) -> str:
    if type(wire) is str:
        if not wire.isascii():
            check_text(wire)
        return wire
    raise mismatch("str", wire)


def _decode_int(wire: Any) -> int:
    if type(wire) is int and -EXACT_INT_MAX <= wire <= EXACT_INT_MAX:
        return wire
    return _decode_other_int(wire, "int")


def _decode_int64(wire: Any) -> int:
    return _decode_other_int(wire, "int64")


def _decode_other_int(wire: Any, expected: str) -> int:
    if type(wire) is dict and is_special(wire):
        value = special_value(wire)
        if type(value) is int:
            return value
        if value == 0.0:  # JavaScript's -0
            return 0
    elif type(wire) is int or (type(wire) is float and wire.is_integer()):
        if abs(wire) <= EXACT_INT_MAX:
            return int(wire)
        raise Mismatch(f"{describe(wire)} is not exact as a number of JavaScript: send it as int64 (BigInt)")
    raise mismatch(expected, wire)


def _decode_float(wire: Any) -> float:
    if type(wire) is float and wire - wire == 0.0:
        return wire
    if type(wire) is int:
        return double_of(wire)
    if type(wire) is dict and is_special(wire):
        value = special_value(wire)
        if type(value) is float:
            return value
    raise mismatch("float", wire)


def _decode_bytes(wire: Any) -> bytes:
    if type(wire) is dict and is_special(wire):
        value = special_value(wire)
        if type(value) is bytes:
            return value
    raise mismatch("bytes", wire)


# -- messages about records


def _missing_field(shape: RecordShape, values: dict[str, Any]) -> Mismatch:
    field = next(field for field in shape.fields if field.is_required and field.name not in values)
    return Mismatch(f"missing, expected {field.shape}. {_known_fields(shape)}", field.spellings[0])


def _known_fields(shape: RecordShape) -> str:
    names = [_name_with_presence(field) for field in shape.fields]
    return f"{shape} has {', '.join(names) or 'none'}."


def _name_with_presence(field: RecordField) -> str:
    return field.spellings[0] if field.is_required else f"{field.spellings[0]}?"


def _both_spellings(shape: RecordShape, wire: dict[str, Any], name: str) -> str:
    field = next(field for field in shape.fields if field.name == name)
    return " and ".join(spelling for spelling in field.spellings if spelling in wire)
