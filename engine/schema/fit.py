"""Compiling the question whether a document fits its table."""

from collections.abc import Callable
from typing import Any

from engine.errors import InvalidArgument, InvalidDocument
from engine.ids import is_id
from engine.limits import Limits
from engine.schema.compiled import Field
from engine.schema.declarations import Table
from engine.values import shapes
from engine.values.columns import Column
from engine.values.decoder import compile_shape_decoder
from engine.values.encoder import compile_to_wire
from engine.values.shapes import Bool, Bytes, Float, Int, Int64Shape, LiteralShape, Null, Shape, Str, UnionShape
from engine.values.wire import INT64_MAX, INT64_MIN, Mismatch, check_nesting, check_text

_SCALAR_TYPES = frozenset({type(None), bool, int, float, str, bytes})


def compile_check(
    document_type: type[Table], fields: tuple[Field, ...], tag_of_class: dict[str, str], *, is_over: bool = False
) -> Callable[..., None]:
    """Quick tests in a row, one a field; where one fails, the field's `fit` looks closer and finds the words.

    `is_over`: it is given what is there already, too, and tests only what differs.
    """
    names: dict[str, Any] = {"document_type": document_type, "is_id": is_id, "is_text": _is_text}
    table = document_type.__table_name__

    def refuse(document: object) -> None:
        kind = type(document).__name__
        raise InvalidDocument(f"{table}: expected a document of {document_type.__name__}, got {kind}.", table=table)

    def look_closer(name: str, fit: Callable[[Any], None], value: Any) -> None:
        try:
            fit(value)
        except Mismatch as error:
            raise InvalidDocument(f"{table}.{error.under(name)}", table=table, field=name, value=value) from None

    names |= {"refuse": refuse, "look_closer": look_closer}
    parameters = "document, old" if is_over else "document"
    lines = [f"def check({parameters}):", "    if document.__class__ is not document_type: refuse(document)"]
    for number, field in enumerate(fields):
        names[f"fit_{number}"] = field.fit
        quick = _quick_test(field.shape, names, tag_of_class)
        lines.append(f"    v = document.{field.name}")
        if is_over:  # a text that is the same is quicker than a test of ids; an equal number may be of another kind
            quick = f"v is old.{field.name} or (v.__class__ is str and v == old.{field.name}) or ({quick})"
        lines.append(f"    if not ({quick}): look_closer({field.name!r}, fit_{number}, v)")
    exec(compile("\n".join(lines), f"<check {table}>", "exec"), names)  # noqa: S102 - field names were checked
    check: Callable[[Table], None] = names["check"]
    return check


def compile_fits(shape: Shape, tag_of_class: dict[str, str]) -> Callable[[Any], bool]:
    """The quick test of one field: True only if the value fits."""
    names: dict[str, Any] = {"is_id": is_id, "is_text": _is_text}
    quick = _quick_test(shape, names, tag_of_class)
    fits: Callable[[Any], bool] = eval(f"lambda v: {quick}", names)  # noqa: S307 - names were checked
    return fits


def _quick_test(shape: Shape, names: dict[str, Any], tag_of_class: dict[str, str]) -> str:
    """An expression that holds only if the value `v` fits; it may miss some that do."""
    match shape:
        case Null():
            return "v is None"
        case Bool():
            return "v is True or v is False"
        case Int() | Int64Shape():
            return f"v.__class__ is int and {INT64_MIN} <= v <= {INT64_MAX}"
        case Float():
            return "v.__class__ is float and v == v"
        case Bytes():
            return "v.__class__ is bytes"
        case Str(id_of=None):
            return "v.__class__ is str and (v.isascii() or is_text(v))"
        case Str(id_of=str(class_name)):
            return f"v.__class__ is str and is_id(v, {tag_of_class[class_name]!r})"
        case LiteralShape(choices):
            name = f"choices_{len(names)}"
            names[name] = frozenset(choices)
            return f"v.__class__ is {type(choices[0]).__name__} and v in {name}"
        case UnionShape(alternatives):
            return " or ".join(f"({_quick_test(part, names, tag_of_class)})" for part in alternatives)
    return "False"


def compile_fit(shape: Shape, column: Column, tag_of_class: dict[str, str], limits: Limits) -> Callable[[Any], None]:
    """A function that raises Mismatch for a value that the field cannot hold."""
    to_wire = compile_to_wire(shape, limits=limits)
    depth_max = limits.document_depth_max - 1  # the document is the first level
    holds_ids = any(isinstance(part, Str) and part.id_of is not None for part in shapes.parts_of(shape))
    decode = compile_shape_decoder(shape, limits=limits, tags=tag_of_class.__getitem__, is_stored=True)

    def fit(value: Any) -> None:
        wire = to_wire(value)
        if column.is_scalar:
            if type(value) not in _SCALAR_TYPES:  # an enum's member, a float of NumPy
                raise Mismatch(f"expected {shape}, got a {type(value).__name__}. Give the plain value")
            if value != value:
                raise Mismatch("NaN has no place in the order of a column; store None, or nest it in a list")
        else:
            check_nesting(wire, depth_max)
        if holds_ids:
            try:
                decode(wire)
            except InvalidArgument as error:
                raise Mismatch(str(error)) from None

    return fit


def _is_text(value: str) -> bool:
    try:
        check_text(value)
    except Mismatch:
        return False
    return True
