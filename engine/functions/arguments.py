"""A function's parameters as the validation of its arguments.

Invariants
  1. Equal asks have equal canonical bytes: whatever spelling, order, number form or left-out default was sent, and
     whether it came from a client or from Python.
  2. A wrong, missing or unknown argument is an InvalidArgument that names it.
  3. A run cannot change the arguments of another one: what is mutable is copied for each call.

Knows nothing of paths and kinds (`registry.py`) and runs nothing by itself.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import msgspec

from engine.errors import InvalidArgument, RegistryError, SchemaError
from engine.limits import Limits
from engine.values.decoder import TagOf, compile_shape_decoder
from engine.values.encoder import compile_shape_encoder, compile_to_wire
from engine.values.shapes import (
    Anything,
    DictShape,
    ListShape,
    RecordField,
    RecordShape,
    Shape,
    fields_by_spelling,
    parts_of,
    shape_of,
)
from engine.values.wire import Mismatch, describe

_parse_json = msgspec.json.Decoder().decode
_encode_canonical = msgspec.msgpack.Encoder(order="deterministic").encode
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_REFUSED = {
    inspect.Parameter.VAR_POSITIONAL: "takes any number of values, and arguments on the wire have names",
    inspect.Parameter.VAR_KEYWORD: "takes any name, and every argument must be known",
    inspect.Parameter.POSITIONAL_ONLY: "is positional-only, and arguments on the wire have names",
}


class Arguments:
    """The arguments of one call, validated."""

    __slots__ = ("_canonical", "values")

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values  # one for each parameter after `ctx`; not to be changed
        self._canonical: bytes | None = None

    @property
    def canonical(self) -> bytes:
        """Equal for equal asks (invariant 1)."""
        if self._canonical is None:
            self._canonical = _encode_canonical(self.values)
        return self._canonical


class Signature:
    """What one function takes and gives back."""

    def __init__(
        self,
        record: RecordShape,
        defaults: Mapping[str, Any],
        return_type: Any,
        *,
        limits: Limits,
        tags: TagOf,
        keeps_ints: bool,
    ) -> None:
        self.fields = record.fields  # one for each parameter after `ctx`
        self.return_type = return_type
        self._defaults = dict(defaults)  # as `decode` would give them
        self._decode = compile_shape_decoder(record, limits=limits, tags=tags, is_stored=keeps_ints)
        self._encode = compile_shape_encoder(record, limits=limits)
        self._to_wire_by_spelling = {
            spelling: compile_to_wire(field.shape, limits=limits)
            for field in record.fields
            for spelling in field.spellings
        }
        self._mutable_names = [field.name for field in record.fields if _is_mutable(field.shape)]

    def decode(self, raw: bytes) -> Arguments:
        """The arguments in a JSON object, as a client sends them."""
        wire = decode_json(raw, "The arguments")
        if type(wire) is not dict:
            raise InvalidArgument(f"The arguments are one object of values by name, not {describe(wire)}.")
        return self.from_wire(wire)

    def from_wire(self, wire: dict[str, Any]) -> Arguments:
        """The arguments among wire values by name."""
        return self._complete(self._decode(wire))

    def from_python(self, values: Mapping[str, Any]) -> Arguments:
        """The arguments of a call in Python, taken as a client would have sent them (invariant 1)."""
        wire: dict[str, Any] = {}
        for name, value in values.items():
            to_wire = self._to_wire_by_spelling.get(name)
            try:
                wire[name] = None if to_wire is None else to_wire(value)  # the decoder refuses unknown names
            except Mismatch as error:
                raise InvalidArgument(str(error.under(name))) from None
        return self.from_wire(wire)

    def to_wire_bytes(self, arguments: Arguments) -> bytes:
        """Wire JSON that `decode` reads back as the same arguments."""
        return self._encode(arguments.values)

    def call(self, function: Callable[..., Any], ctx: Any, arguments: Arguments) -> Any:
        """What the function returns: a value, or the coroutine of an `async def`."""
        values = arguments.values
        if self._mutable_names:
            values = {**values, **{name: copy.deepcopy(values[name]) for name in self._mutable_names}}
        try:
            return function(ctx, **values)
        except StopIteration as error:  # of a plain def; whoever drives it would take it for its return value
            raise RuntimeError(f"{function.__qualname__} raised StopIteration") from error

    def _complete(self, given: dict[str, Any]) -> Arguments:
        return Arguments({**self._defaults, **given})


def decode_json(raw: bytes, what: str) -> Any:
    """The wire value in some JSON; InvalidArgument beginning with `what`, a plural, for what is none."""
    try:
        return _parse_json(raw)
    except RecursionError:
        raise InvalidArgument(f"{what} nest too deep.") from None
    except ValueError as error:  # msgspec's own, or a byte that is no UTF-8
        raise InvalidArgument(f"{what} are not valid JSON: {error}") from None


def compile_signature(
    function: Callable[..., Any], *, limits: Limits, tags: TagOf, keeps_ints: bool = False
) -> Signature:
    """The signature of a function `(ctx, …)`; RegistryError naming function and parameter for what cannot be one.

    `keeps_ints`: its callers write `1` for an int and `1.0` for a float; those of JavaScript have doubles only.
    """
    where = f"{function.__module__}.{function.__qualname__}"
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in _POSITIONAL:
        raise RegistryError(f"{where}: the first parameter is the context, as in `def {function.__name__}(ctx, …)`.")
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError, SyntaxError) as error:
        raise RegistryError(f"{where}: an annotation cannot be read: {error}") from error
    try:
        fields = tuple(_field(parameter, hints, where, limits, tags) for parameter in parameters[1:])
        fields_by_spelling(fields, where=where)
        record = RecordShape(function.__name__, dict, None, lambda: fields)
        defaults = {
            field.name: _default(parameter, field, where, limits, tags, keeps_ints=keeps_ints)
            for parameter, field in zip(parameters[1:], fields, strict=True)
            if not field.is_required
        }
        return Signature(record, defaults, hints.get("return", Any), limits=limits, tags=tags, keeps_ints=keeps_ints)
    except SchemaError as error:
        raise RegistryError(str(error)) from error


def _field(
    parameter: inspect.Parameter, hints: Mapping[str, Any], where: str, limits: Limits, tags: TagOf
) -> RecordField:
    where = f"{where}: parameter {parameter.name!r}"
    if parameter.kind in _REFUSED:
        raise RegistryError(f"{where} {_REFUSED[parameter.kind]}.")
    if parameter.name not in hints:
        raise RegistryError(f"{where} has no annotation, which is what its values are checked by.")
    shape = shape_of(hints[parameter.name], where=where)
    try:
        compile_shape_decoder(shape, limits=limits, tags=tags)
    except SchemaError as error:
        raise RegistryError(f"{where}: {error}") from error
    return RecordField(
        name=parameter.name,
        wire_name=parameter.name,
        shape=shape,
        is_required=parameter.default is inspect.Parameter.empty,
    )


def _default(
    parameter: inspect.Parameter, field: RecordField, where: str, limits: Limits, tags: TagOf, *, keeps_ints: bool
) -> Any:
    """The default in the form that `decode` would give it, so that leaving it out and sending it are one ask."""
    try:
        wire = compile_to_wire(field.shape, limits=limits)(parameter.default)
        return compile_shape_decoder(field.shape, limits=limits, tags=tags, is_stored=keeps_ints)(wire)
    except (Mismatch, InvalidArgument) as error:
        raise RegistryError(f"{where}: parameter {parameter.name!r}: its default does not fit: {error}") from None


def _is_mutable(shape: Shape) -> bool:
    """Whether a function could change a value of this shape, or something within it."""
    for part in parts_of(shape):
        match part:
            case Anything() | ListShape() | DictShape():
                return True
            case RecordShape(struct_type=struct_type):
                if struct_type is None or not struct_type.__struct_config__.frozen:
                    return True
    return False
