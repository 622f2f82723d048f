"""Whether a value is JSON as it is: the test that lets nearly every result go out by msgspec alone.

A value is *plain* when it fits its annotation and msgspec's own JSON of it is its wire JSON: nothing in it is NaN,
infinite, -0.0, a large int or bytes, no text is where a number belongs, all keys may be sent.

Invariants
  1. When in doubt the answer is no: `encoder.py` then converts the value piece by piece, which is slow and exact.
  2. Lone surrogates are not looked for: msgspec refuses them while it encodes.

Instances of a table's class are trusted to hold what the table says: the schema checks them when they are written.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec

from engine.errors import SchemaError
from engine.limits import Limits
from engine.values import shapes
from engine.values.shapes import (
    Anything,
    Bool,
    Constrained,
    DictShape,
    Float,
    Int,
    ListShape,
    LiteralShape,
    Null,
    RecordShape,
    Shape,
    Str,
    UnionShape,
    python_type_of,
)
from engine.values.wire import EXACT_INT_MAX, is_key, is_plain_float


def compile_is_plain(shape: Shape, limits: Limits) -> Callable[[Any], bool]:
    """A function that says whether msgspec's own JSON of a value is its wire JSON; when in doubt, False.

    It may raise TypeError for a document that holds what its table does not allow.
    """
    writer = _PlainTestWriter(limits)
    tests = writer.tests(shape, "value", depth=0)
    source = "\n".join(["def is_plain(value):", *_indented(tests), "    return True"])
    exec(source, writer.names)  # noqa: S102 - only field names and numbers of the schema get into it
    is_plain: Callable[[Any], bool] = writer.names["is_plain"]
    return is_plain


_NESTED_LOOPS_MAX = 15  # CPython compiles no more than 20 loops in each other


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
        if depth > _NESTED_LOOPS_MAX:
            return ["return False"]
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
                return lines if is_trusted else lines + _unless(f"{self._name(shape.fits)}({place})")
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
            python_type = python_type_of(alternative)
            tests = self.tests(alternative, place, depth=depth, is_trusted=is_trusted, is_typed=True)
            if tests or not is_trusted:
                is_type = f"type({place}) is {self._name(python_type)}"
                lines += [f"{'elif' if lines else 'if'} {is_type}:", *_indented(tests or ["pass"])]
        return lines if is_trusted else [*lines, "else: return False"]

    def _unless_type(self, place: str, shape: Shape) -> list[str]:
        return _unless(f"type({place}) is {self._name(python_type_of(shape))}")

    def _name(self, value: Any) -> str:
        name = f"given{len(self.names)}"
        self.names[name] = value
        return name


def _unless(test: str) -> list[str]:
    return [f"if not ({test}): return False"]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


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
    return (lambda value: False) if shapes.has_no_fixed_depth(shape) else compile_is_plain(shape, limits)
