"""Python values to wire JSON, compiled from an annotation.

Invariants
  1. What goes out fits its annotation; a wrong value is refused with its path, what was expected and what came.
  2. What goes out is strict JSON in wire form (`wire.py`), and the same bytes whichever of the two ways made it.

Two ways, because nearly all values are JSON as they are. A *plain* value fits its annotation and holds nothing special:
no NaN, no large int, no bytes. One generated function says whether a value is plain, and msgspec then encodes it;
any other value is converted piece by piece, which also finds what is wrong with it. 50 chat messages take 7 µs more
than msgspec alone: bench/test_values.py.

Instances of a table's class are trusted to hold what the table says: the schema checks them when they are written.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec

from engine.errors import InvalidResult, LimitExceeded, SchemaError
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
    bytes_to_wire,
    check_count,
    check_keys,
    check_nesting,
    check_text,
    float_to_wire,
    int64_to_wire,
    int_to_wire,
    is_key,
    is_plain_float,
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
                remedy="Return less, or paginate.",
            )
        return payload

    return encode_result


def compile_shape_encoder(shape: Shape, *, limits: Limits) -> Encode:
    """As `compile_encoder`, but raises Mismatch and has no bound on the size."""
    is_plain = _compile_is_plain(shape, limits)
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
        convert, fits = self.compile(shape.inner), _fits(shape)

        def constrained_to_wire(value: Any) -> Any:
            wire = convert(value)
            if not fits(value):
                raise mismatch(shape, value)
            return wire

        return constrained_to_wire

    def _union(self, shape: UnionShape) -> ToWire:
        convert_by_type = {_python_type(alternative): self.compile(alternative) for alternative in shape.alternatives}
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


def _python_type(shape: Shape) -> type:
    """The type of the values that can only be meant for this alternative of a union."""
    match shape:
        case Constrained(inner):
            return _python_type(inner)
        case LiteralShape(choices):
            return type(choices[0])
        case RecordShape(struct_type=struct_type):
            return dict if struct_type is None else struct_type
    return _TYPE_BY_SHAPE[type(shape)]


_TYPE_BY_SHAPE: dict[type[Shape], type] = {
    Null: type(None),
    Bool: bool,
    Int: int,
    Int64Shape: int,
    Float: float,
    Str: str,
    Bytes: bytes,
    ListShape: list,
    DictShape: dict,
}


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


# -- is a value plain?


def _compile_is_plain(shape: Shape, limits: Limits) -> Callable[[Any], bool]:
    """A function that says whether msgspec's own JSON of a value is its wire JSON; when in doubt, False.

    It may raise TypeError for a document that holds what its table does not allow.
    """
    writer = _PlainTestWriter(limits)
    tests = writer.tests(shape, "value", depth=0)
    source = "\n".join(["def is_plain(value):", *_indented(tests), "    return True"])
    exec(source, writer.names)  # noqa: S102 - only field names and numbers of the schema get into it
    is_plain: Callable[[Any], bool] = writer.names["is_plain"]
    return is_plain


class _PlainTestWriter:
    """Writes the tests of `is_plain` as one flat run: a call for each value would cost as much as msgspec itself."""

    def __init__(self, limits: Limits) -> None:
        self.names: dict[str, Any] = {  # what the source refers to
            "is_plain_float": is_plain_float,
            "is_key": lambda key: is_key(key, limits),
            "is_plain_value": lambda value, depth_left: _is_plain_value(value, depth_left, limits),
        }
        self._limits = limits
        self._within: list[RecordShape] = []

    def tests(
        self, shape: Shape, place: str, *, depth: int, is_trusted: bool = False, is_typed: bool = False
    ) -> list[str]:
        """Statements that return False unless the local variable `place` holds a plain value of the shape.

        `depth`: how many lists and objects hold it. `is_trusted`: a document holds it. `is_typed`: the outermost type
        is known to be right.
        """
        is_typed = is_typed or is_trusted
        match shape:
            case Null():
                return [] if is_typed else _unless(f"{place} is None")
            case Bool() | Str():
                return [] if is_typed else self._unless_type(place, shape)
            case Int():
                lines = [] if is_typed else self._unless_type(place, shape)
                return lines + _unless(f"{-EXACT_INT_MAX} <= {place} <= {EXACT_INT_MAX}")
            case Float():
                lines = [] if is_typed else self._unless_type(place, shape)
                # the first half is false for every float but 0.0, -0.0, nan and the infinities
                return [*lines, f"if ({place} - {place} or not {place}) and not is_plain_float({place}): return False"]
            case LiteralShape(choices):
                if is_trusted and isinstance(choices[0], str):
                    return []
                exact = frozenset(c for c in choices if isinstance(c, str) or abs(c) <= EXACT_INT_MAX)
                return self._unless_type(place, shape) + _unless(f"{place} in {self._name(exact)}")
            case Anything():
                return _unless(f"is_plain_value({place}, {self._limits.value_depth_max - depth})")
            case ListShape(item):
                return self._list(shape, item, place, depth, is_trusted, is_typed)
            case DictShape():
                return self._dict(shape, place, depth, is_trusted, is_typed)
            case RecordShape() if shape not in self._within:
                return self._record(shape, place, depth, is_trusted, is_typed)
            case Constrained(inner):
                lines = self.tests(inner, place, depth=depth, is_trusted=is_trusted, is_typed=is_typed)
                return lines if is_trusted else lines + _unless(f"{self._name(_fits(shape))}({place})")
            case UnionShape():
                return self._union(shape, place, depth, is_trusted)
        return ["return False"]  # int64, bytes, and a record inside itself

    def _list(self, shape: Shape, item: Shape, place: str, depth: int, is_trusted: bool, is_typed: bool) -> list[str]:
        lines = [] if is_typed else self._unless_type(place, shape)
        lines += _unless(f"len({place}) <= {self._limits.array_item_count_max}")
        tests = self.tests(item, f"item{depth}", depth=depth + 1, is_trusted=is_trusted)
        return lines + ([f"for item{depth} in {place}:", *_indented(tests)] if tests else [])

    def _dict(self, shape: DictShape, place: str, depth: int, is_trusted: bool, is_typed: bool) -> list[str]:
        lines = [] if is_typed else self._unless_type(place, shape)
        lines += _unless(f"len({place}) <= {self._limits.object_field_count_max}")
        tests = _unless(f"is_key(key{depth})")
        tests += self.tests(shape.key, f"key{depth}", depth=depth + 1, is_typed=True)
        tests += self.tests(shape.item, f"item{depth}", depth=depth + 1, is_trusted=is_trusted)
        return [*lines, f"for key{depth}, item{depth} in {place}.items():", *_indented(tests)]

    def _record(self, shape: RecordShape, place: str, depth: int, is_trusted: bool, is_typed: bool) -> list[str]:
        self._within.append(shape)
        lines = [] if is_typed else self._unless_type(place, shape)
        is_trusted = is_trusted or shape.is_document
        if shape.struct_type is None:
            required = self._name(frozenset(field.name for field in shape.fields if field.is_required))
            names = self._name(frozenset(field.name for field in shape.fields))
            lines += _unless(f"{required} <= {place}.keys() <= {names}")
        for field in shape.fields:
            held = f"field{depth}"
            tests = self.tests(field.shape, held, depth=depth + 1, is_trusted=is_trusted)
            if tests and shape.struct_type is not None:
                lines += [f"{held} = {place}.{field.name}", *tests]
            elif tests:
                lines += [f"if {field.name!r} in {place}:", *_indented([f"{held} = {place}[{field.name!r}]", *tests])]
        self._within.pop()
        return lines

    def _union(self, shape: UnionShape, place: str, depth: int, is_trusted: bool) -> list[str]:
        lines: list[str] = []
        for alternative in shape.alternatives:
            python_type = _python_type(alternative)
            tests = self.tests(alternative, place, depth=depth, is_trusted=is_trusted, is_typed=True)
            if tests or not is_trusted:
                is_type = f"type({place}) is {self._name(python_type)}"
                lines += [f"{'elif' if lines else 'if'} {is_type}:", *_indented(tests or ["pass"])]
        return lines if is_trusted else [*lines, "else: return False"]

    def _unless_type(self, place: str, shape: Shape) -> list[str]:
        return _unless(f"type({place}) is {self._name(_python_type(shape))}")

    def _name(self, value: Any) -> str:
        name = f"given{len(self.names)}"
        self.names[name] = value
        return name


def _unless(test: str) -> list[str]:
    return [f"if not ({test}): return False"]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _fits(shape: Constrained) -> Callable[[Any], bool]:
    annotation, convert, invalid = shape.annotation, msgspec.convert, msgspec.ValidationError

    def fits(value: Any) -> bool:
        try:
            convert(value, annotation)
        except invalid:
            return False
        return True

    return fits


_STRUCT_DEPTH_MAX = 16  # nearer to the depth limit than this, the conversion counts exactly


def _is_plain_value(value: Any, depth_left: int, limits: Limits) -> bool:
    """`is_plain` for a value without an annotation."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return True
    if kind is int:
        return bool(-EXACT_INT_MAX <= value <= EXACT_INT_MAX)
    if kind is float:
        return is_plain_float(value)
    if depth_left <= 0:
        return False
    if kind is list:
        if len(value) > limits.array_item_count_max:
            return False
        return all(_is_plain_value(item, depth_left - 1, limits) for item in value)
    if kind is dict:
        if len(value) > limits.object_field_count_max:
            return False
        return all(is_key(key, limits) and _is_plain_value(item, depth_left - 1, limits) for key, item in value.items())
    if issubclass(kind, msgspec.Struct) and depth_left > _STRUCT_DEPTH_MAX:
        return _struct_is_plain(kind, limits)(value)
    return False


@lru_cache(maxsize=1024)  # bounded: a reload brings classes of the same names anew
def _struct_is_plain(struct_type: type[msgspec.Struct], limits: Limits) -> Callable[[Any], bool]:
    try:
        shape = shapes.shape_of(struct_type, where=struct_type.__name__)
    except SchemaError:
        return lambda value: False
    return (lambda value: False) if shapes.has_no_fixed_depth(shape) else _compile_is_plain(shape, limits)
