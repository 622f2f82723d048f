"""The JSON of section 9 of the sync protocol: what is special in it, and values without an annotation.

    int64 {"$integer": base64 of 8 bytes, little-endian} · bytes {"$bytes": base64}
    -0.0, NaN, ±Infinity {"$float": base64 of 8 bytes, little-endian} · everything else as JSON has it

Invariants
  1. Whatever goes out is strict JSON: no NaN or Infinity tokens, no lone surrogates, keys printable ASCII without a
     leading "$".
  2. A special object has exactly one member; an object with any other key led by "$" is no value.
  3. A plain number is a double; an int goes out plain only while it is exact as one (`|n| <= 2**53`).

Knows nothing of annotations: `decoder.py`, `encoder.py`.
"""

import base64
import binascii
import struct
from collections.abc import Callable, Collection, Iterable
from math import copysign
from typing import Any

import msgspec

from engine.limits import Limits

WireValue = None | bool | int | float | str | list[Any] | dict[str, Any]

EXACT_INT_MAX = 2**53  # beyond it a double skips integers
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
UNBOUNDED = Limits(  # for what was checked when it came in: stored values
    value_depth_max=200, array_item_count_max=1 << 40, object_field_count_max=1 << 40, object_key_length_max=1 << 40
)


class Mismatch(Exception):
    """A value is not what was expected; callers turn it into the error of their side.

    `path` is built from the inside out while it rises: `filter.gameIds[3]`.
    """

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = path

    def under(self, key: str | int) -> "Mismatch":
        """The same, seen from the value that holds it."""
        inner = self.path
        step = f"[{key}]" if isinstance(key, int) else key
        self.path = step + (inner if not inner or inner[0] == "[" else f".{inner}")
        return self

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


def mismatch(expected: object, value: object) -> Mismatch:
    return Mismatch(f"expected {expected}, got {describe(value)}")


def describe(value: object) -> str:
    """A value in a few words, for messages: `1.5`, `'text'`, `a list of 3 items`."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() if abs(value) > 2**64:
            return f"an integer of {value.bit_length()} bits"
        case int() | float():
            return repr(value)
        case str():
            return repr(value if len(value) <= 40 else value[:39] + "…")
        case list() | tuple():
            return f"a {type(value).__name__} of {len(value)} items"
        case {"$integer": _}:
            return "an int64"
        case {"$bytes": _} | bytes():
            return "bytes"
        case {"$float": _}:
            return "a special float"
        case dict():
            keys = ", ".join(str(key)[:40] for key in list(value)[:5])
            return f"an object with the keys {keys}{', …' if len(value) > 5 else ''}" if value else "an empty object"
    return f"a {type(value).__name__}"


# -- special objects


def int64_to_wire(value: int) -> dict[str, str]:
    try:
        return {"$integer": base64.b64encode(value.to_bytes(8, "little", signed=True)).decode()}
    except OverflowError:
        raise mismatch("an integer of 64 bits", value) from None


def bytes_to_wire(value: bytes) -> dict[str, str]:
    return {"$bytes": base64.b64encode(value).decode()}


def int_to_wire(value: int) -> int | dict[str, str]:
    """Plain while it is exact as a double, int64 beyond (invariant 3)."""
    return value if -EXACT_INT_MAX <= value <= EXACT_INT_MAX else int64_to_wire(value)


def float_to_wire(value: float) -> float | dict[str, str]:
    if is_plain_float(value):
        return value
    return {"$float": base64.b64encode(struct.pack("<d", value)).decode()}


def is_plain_float(value: float) -> bool:
    """Whether JSON has the float as it is: not NaN, not infinite, not -0.0."""
    return value - value == 0.0 and (value != 0.0 or copysign(1.0, value) > 0.0)


def is_special(wire: dict[str, Any]) -> bool:
    """Whether an object stands for a scalar (invariant 2)."""
    return len(wire) == 1 and next(iter(wire))[:1] == "$"


def special_value(wire: dict[str, Any]) -> int | float | bytes:
    """The scalar that a special object stands for."""
    ((kind, text),) = wire.items()
    decode = _SPECIAL_BY_KEY.get(kind)
    if decode is None:
        raise Mismatch(f"{kind[:40]!a} marks no value: the marks are {', '.join(_SPECIAL_BY_KEY)}")
    if not isinstance(text, str):
        raise mismatch(f"base64 text in {kind}", text)
    try:
        return decode(binascii.a2b_base64(text, strict_mode=True))
    except (binascii.Error, ValueError) as error:
        raise Mismatch(f"{kind}: {error}") from None


def _int64(raw: bytes) -> int:
    if len(raw) != 8:
        raise ValueError(f"{len(raw)} bytes, 8 expected")
    return int.from_bytes(raw, "little", signed=True)


def _special_float(raw: bytes) -> float:
    if len(raw) != 8:
        raise ValueError(f"{len(raw)} bytes, 8 expected")
    value: float = struct.unpack("<d", raw)[0]
    if is_plain_float(value):
        raise ValueError(f"{value!r} must be a plain number")
    return value


_SPECIAL_BY_KEY: dict[str, Callable[[bytes], int | float | bytes]] = {
    "$integer": _int64,
    "$bytes": bytes,
    "$float": _special_float,
}


# -- text, keys, nesting


def check_text(value: str) -> None:
    """Refuse lone surrogates: they have no UTF-8 form, so nothing could store or send them."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Mismatch(f"the text holds a lone surrogate: {value[:40]!a}") from None


def is_key(key: object, limits: Limits) -> bool:
    """Whether an object may have this key (invariant 1); clients refuse a whole message for one that is not."""
    return (
        isinstance(key, str)
        and key.isascii()
        and key.isprintable()
        and key[:1] != "$"
        and len(key) <= limits.object_key_length_max
    )


def check_keys(keys: Iterable[object], limits: Limits) -> None:
    for key in keys:
        if not is_key(key, limits):
            raise Mismatch(
                f"the key {ascii(key)[:48]} cannot be sent: keys are text of printable ASCII, do not begin with '$' "
                f"and have at most {limits.object_key_length_max:,} characters"
            )


def check_count(count: int, allowed: int, noun: str) -> None:
    if count > allowed:
        raise Mismatch(f"{count:,} {noun}, {allowed:,} allowed")


def check_nesting(wire: WireValue, depth_max: int) -> None:
    """Refuse what nests deeper than `depth_max`; a scalar nests 0 deep, a list one more than its items."""
    depth, holders = 0, _holders((wire,))
    while holders:
        depth += 1
        if depth > depth_max:
            raise Mismatch(f"the value nests deeper than {depth_max} levels")
        holders = [inner for holder in holders for inner in _holders(holder)]


def _holders(values: Iterable[Any]) -> list[Collection[Any]]:
    """What each list or object among the values holds."""
    holders: list[Collection[Any]] = []
    for value in values:
        if type(value) is list:
            holders.append(value)
        elif type(value) is dict and not is_special(value):
            holders.append(value.values())
    return holders


# -- values without an annotation


def value_of(wire: WireValue, limits: Limits, *, keeps_ints: bool) -> Any:
    """The Python value of a wire value. A plain number is a float; stored values keep ints as they were."""
    kind = type(wire)
    if kind is str:
        check_text(wire)  # type: ignore[arg-type]  # `kind` says so, here and below
        return wire
    if kind is int:
        return wire if keeps_ints else double_of(wire)  # type: ignore[arg-type]
    if kind is float:
        if wire - wire != 0.0:  # type: ignore[operator]
            raise mismatch("a JSON number", wire)
        return wire
    if wire is None or kind is bool:
        return wire
    if kind is list:
        check_count(len(wire), limits.array_item_count_max, "items")  # type: ignore[arg-type]
        items: list[Any] = []
        try:
            for item in wire:  # type: ignore[union-attr]
                items.append(value_of(item, limits, keeps_ints=keeps_ints))  # noqa: PERF401 - its length is used below
        except Mismatch as error:
            raise error.under(len(items)) from None
        return items
    if kind is dict:
        return _object_of(wire, limits, keeps_ints=keeps_ints)  # type: ignore[arg-type]
    raise mismatch("a value of the wire", wire)


def _object_of(wire: dict[str, Any], limits: Limits, *, keeps_ints: bool) -> Any:
    if is_special(wire):
        return special_value(wire)
    check_count(len(wire), limits.object_field_count_max, "fields")
    check_keys(wire, limits)
    key, fields = "", {}
    try:
        for key, item in wire.items():
            fields[key] = value_of(item, limits, keeps_ints=keeps_ints)
    except Mismatch as error:
        raise error.under(key) from None
    return fields


def double_of(number: int) -> float:
    """A plain integer as the double that it is to every client."""
    try:
        return float(number)
    except OverflowError:
        raise mismatch("a number within the range of a double", number) from None


# -- JSON text in other forms


def json_with_decimal_points(payload: bytes) -> bytes:
    """The same wire JSON with every plain integer as `1.0`: the PyPI HTTP client tells floats by the point."""
    holder = [msgspec.json.decode(payload)]
    _point(holder)
    return msgspec.json.encode(holder[0])


def _point(holder: list[Any] | dict[str, Any]) -> None:
    """In place, as most values stay what they are: 0.2 × the time of building all of it again."""
    for place, item in holder.items() if type(holder) is dict else enumerate(holder):
        kind = type(item)
        if kind is int:
            holder[place] = float(item)  # type: ignore[index]
        elif kind is dict or kind is list:
            _point(item)


def to_lossy_json(payload: bytes) -> bytes:
    """The wire JSON as plain JSON for people: int64 as decimal text, bytes as base64, special floats by name."""
    if b"$" not in payload or b'{"$' not in payload:  # nothing special in it, as the engine's JSON has no spaces
        return payload

    def plain(wire: WireValue) -> WireValue:
        match wire:
            case list():
                return [plain(item) for item in wire]
            case {"$bytes": str(text)}:
                return text
            case dict() if is_special(wire):
                value = special_value(wire)
                if isinstance(value, int) or value == 0.0:
                    return str(value) if isinstance(value, int) else value
                return "NaN" if value != value else "Infinity" if value > 0.0 else "-Infinity"  # type: ignore[operator]
            case dict():
                return {key: plain(item) for key, item in wire.items()}
        return wire

    return msgspec.json.encode(plain(msgspec.json.decode(payload)))
