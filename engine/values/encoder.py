"""Python values to wire JSON, compiled from an annotation.

Invariants
  1. What goes out fits its annotation; a wrong value is refused with its path, what was expected and what came.
  2. What goes out is strict JSON in wire form (`wire.py`), and the same bytes whichever of the two ways made it.

Two ways, because nearly all values are JSON as they are: a value that `plain.py` finds plain is left to msgspec, any
other is converted piece by piece, which also finds what is wrong with it. Of 50 chat messages, which take msgspec 8 µs,
the test takes 3 µs more: bench/test_values.py.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec

from engine.errors import InvalidResult, LimitExceeded, SchemaError
from engine.limits import Limits
from engine.values import shapes
from engine.values.plain import compile_is_plain
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
    RecordShape,
    Shape,
    Str,
    UnionShape,
    python_type_of,
)
from engine.values.wire import (
    EXACT_INT_MAX,
    UNBOUNDED,
    Mismatch,
    WireValue,
    bytes_to_wire,
    check_count,
    check_keys,
    check_nesting,
    check_text,
    float_to_wire,
    int64_to_wire,
    int_to_wire,
    mismatch,
)

ToWire = Callable[[Any], Any]  # value -> wire value, or Mismatch
Encode = Callable[[Any], bytes]


def compile_encoder(annotation: Any, *, limits: Limits, where: str = "") -> Encode:
    """A function from values of the annotation to wire JSON.

    It raises InvalidResult for a value that does not fit, LimitExceeded past `result_size_bytes_max`.
    """
    shape = shapes.shape_of(annotation, where=where or str(annotation))
    encode = compile_shape_encoder(shape, limits=limits)
    size_bytes_max = limits.result_size_bytes_max

    def encode_result(value: Any) -> bytes:
        try:
            payload = encode(value)
        except Mismatch as error:
            raise InvalidResult(str(error)) from None
        if len(payload) > size_bytes_max:
            raise LimitExceeded(
                "Size of the result in bytes",
                used=len(payload),
                allowed=size_bytes_max,
                remedy="Return less (paginate), or raise limits.result_size_bytes_max.",
            )
        return payload

    return encode_result


def compile_shape_encoder(shape: Shape, *, limits: Limits) -> Encode:
    """As `compile_encoder`, but raises Mismatch and has no bound on the size."""
    is_plain = compile_is_plain(shape, limits)
    convert = compile_to_wire(shape, limits=limits)
    encode_json = msgspec.json.Encoder().encode

    def encode(value: Any) -> bytes:
        try:
            if is_plain(value):
                return encode_json(value)
        except (UnicodeEncodeError, TypeError):
            pass  # a lone surrogate, or a document with a wrong field: the conversion below says where
        return encode_json(convert(value))

    return encode


def compile_to_wire(shape: Shape, *, limits: Limits) -> ToWire:
    """A function from values of the shape to wire values; Mismatch for a value that does not fit."""
    convert = _Converter(limits).compile(shape)
    depth_max = limits.value_depth_max
    is_open = shapes.has_no_fixed_depth(shape)

    def to_wire_checked(value: Any) -> WireValue:
        try:
            wire: WireValue = convert(value)
        except RecursionError:
            raise Mismatch(f"the value nests deeper than {depth_max} levels") from None
        if is_open:
            check_nesting(wire, depth_max)
        return wire

    return to_wire_checked


_ANYTHING = Anything()


def encode_value(value: Any, limits: Limits = UNBOUNDED) -> bytes:
    """Wire JSON of any value that the wire knows: AppError data, `Any` results; InvalidResult for others."""
    try:
        return _untyped_encoder(limits)(value)
    except Mismatch as error:
        raise InvalidResult(str(error)) from None


def to_wire(value: Any, limits: Limits = UNBOUNDED) -> WireValue:
    """The wire value of any value that the wire knows; InvalidResult for others."""
    try:
        wire: WireValue = compile_to_wire(_ANYTHING, limits=limits)(value)
    except Mismatch as error:
        raise InvalidResult(str(error)) from None
    return wire


@lru_cache(maxsize=8)  # engines of one process with different limits
def _untyped_encoder(limits: Limits) -> Encode:
    return compile_shape_encoder(_ANYTHING, limits=limits)


# -- any value, piece by piece


class _Converter:
    """Compiles shapes to functions that check a value and give its wire value."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._convert_by_record: dict[RecordShape, ToWire] = {}

    def compile(self, shape: Shape) -> ToWire:
        match shape:
            case Null():
                return _null_to_wire
            case Bool():
                return _bool_to_wire
            case Int():
                return _int_to_wire
            case Int64Shape():
                return _int64_to_wire
            case Float():
                return _float_to_wire
            case Str():
                return _str_to_wire
            case Bytes():
                return _bytes_to_wire
            case LiteralShape():
                return _literal(shape)
            case Anything():
                limits = self._limits
                return lambda value: _untyped_to_wire(value, limits)
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
        raise AssertionError(f"no encoder for {shape!r}")

    def _list(self, shape: ListShape) -> ToWire:
        convert, count_max = self.compile(shape.item), self._limits.array_item_count_max

        def list_to_wire(value: Any) -> Any:
            if not isinstance(value, list):
                raise mismatch(shape, value)
            return _items_to_wire(value, convert, count_max)

        return list_to_wire

    def _dict(self, shape: DictShape) -> ToWire:
        convert, convert_key, limits = self.compile(shape.item), self.compile(shape.key), self._limits

        def dict_to_wire(value: Any) -> Any:
            if not isinstance(value, dict):
                raise mismatch(shape, value)
            wire = _entries_to_wire(value, convert, limits)
            for key in value:
                convert_key(key)
            return wire

        return dict_to_wire

    def _record(self, shape: RecordShape) -> ToWire:
        known = self._convert_by_record.get(shape)
        if known is not None:
            return known
        # a record inside itself finds this one, whose parts follow below
        self._convert_by_record[shape] = lambda value: record_to_wire(value)
        field_by_name = {field.name: (field.wire_name, self.compile(field.shape)) for field in shape.fields}
        tagged = {} if shape.tag_field is None else {shape.tag_field: shape.tag}
        required = {field.name for field in shape.fields if field.is_required}
        struct_type = shape.struct_type

        def record_to_wire(value: Any) -> Any:
            if struct_type is None:
                if not isinstance(value, dict) or not required <= value.keys() <= field_by_name.keys():
                    raise mismatch(f"{shape} with the keys {', '.join(field_by_name)}", value)
                given = value
            elif type(value) is struct_type:
                given = {name: getattr(value, name) for name in field_by_name}
            else:
                raise mismatch(shape, value)
            wire: dict[str, Any] = dict(tagged)
            name = ""
            try:
                for name, held in given.items():
                    wire_name, convert = field_by_name[name]
                    wire[wire_name] = convert(held)
            except Mismatch as error:
                raise error.under(name) from None
            return wire

        self._convert_by_record[shape] = record_to_wire
        return record_to_wire

    def _constrained(self, shape: Constrained) -> ToWire:
        convert, fits = self.compile(shape.inner), shape.fits

        def constrained_to_wire(value: Any) -> Any:
            wire = convert(value)
            if not fits(value):
                raise mismatch(shape, value)
            return wire

        return constrained_to_wire

    def _union(self, shape: UnionShape) -> ToWire:
        convert_by_type = {python_type_of(alternative): self.compile(alternative) for alternative in shape.alternatives}
        if float in convert_by_type:
            convert_by_type.setdefault(int, convert_by_type[float])

        def union_to_wire(value: Any) -> Any:
            convert = convert_by_type.get(type(value))
            if convert is not None:
                return convert(value)
            for python_type, convert in convert_by_type.items():
                if isinstance(value, python_type) and not isinstance(value, bool):
                    return convert(value)
            raise mismatch(shape, value)

        return union_to_wire


def _untyped_to_wire(value: Any, limits: Limits) -> WireValue:
    match value:
        case None | bool():
            return value
        case str():
            return _str_to_wire(value)
        case int():
            return int_to_wire(int(value))
        case float():
            return float_to_wire(float(value))
        case bytes():
            return bytes_to_wire(value)
        case list() | tuple():
            return _items_to_wire(value, lambda item: _untyped_to_wire(item, limits), limits.array_item_count_max)
        case dict():
            return _entries_to_wire(value, lambda item: _untyped_to_wire(item, limits), limits)
        case msgspec.Struct():
            struct_wire: WireValue = _struct_to_wire(type(value), limits)(value)
            return struct_wire
    raise mismatch("a value that the wire knows (None, bool, int, float, str, bytes, list, dict, struct)", value)


@lru_cache(maxsize=1024)  # bounded: a reload brings classes of the same names anew
def _struct_to_wire(struct_type: type[msgspec.Struct], limits: Limits) -> ToWire:
    try:
        return _Converter(limits).compile(shapes.shape_of(struct_type, where=struct_type.__name__))
    except SchemaError as error:
        raise Mismatch(str(error)) from None


def _items_to_wire(items: list[Any] | tuple[Any, ...], convert: ToWire, count_max: int) -> list[Any]:
    check_count(len(items), count_max, "items")
    wire: list[Any] = []
    try:
        for item in items:
            wire.append(convert(item))  # noqa: PERF401 - its length is the place of a wrong item
    except Mismatch as error:
        raise error.under(len(wire)) from None
    return wire


def _entries_to_wire(entries: dict[Any, Any], convert: ToWire, limits: Limits) -> dict[str, Any]:
    check_count(len(entries), limits.object_field_count_max, "fields")
    check_keys(entries, limits)
    key, wire = "", {}
    try:
        for key, item in entries.items():
            wire[key] = convert(item)
    except Mismatch as error:
        raise error.under(key) from None
    return wire


def _null_to_wire(value: Any) -> None:
    if value is not None:
        raise mismatch("null", value)


def _bool_to_wire(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise mismatch("bool", value)


def _int_to_wire(value: Any) -> WireValue:
    if isinstance(value, int) and not isinstance(value, bool):
        return int_to_wire(int(value))
    raise mismatch("int", value)


def _int64_to_wire(value: Any) -> WireValue:
    if isinstance(value, int) and not isinstance(value, bool):
        return int64_to_wire(value)
    raise mismatch("int64", value)


def _float_to_wire(value: Any) -> WireValue:
    if isinstance(value, float):
        return float_to_wire(float(value))
    if isinstance(value, int) and not isinstance(value, bool) and -EXACT_INT_MAX <= value <= EXACT_INT_MAX:
        return int(value)  # typing counts an int among the floats, and so does every client
    raise mismatch("float", value)


def _str_to_wire(value: Any) -> str:
    if isinstance(value, str):
        check_text(value)
        return str.__str__(value)
    raise mismatch("str", value)


def _bytes_to_wire(value: Any) -> WireValue:
    if isinstance(value, bytes):
        return bytes_to_wire(value)
    raise mismatch("bytes", value)


def _literal(shape: LiteralShape) -> ToWire:
    kind = type(shape.choices[0])

    def literal_to_wire(value: Any) -> Any:
        if type(value) is kind and value in shape.choices:
            return value
        raise mismatch(shape, value)

    return literal_to_wire
