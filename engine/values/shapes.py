"""What an annotation says about a value: the one place that reads Python types.

    Null · Bool · Int · Int64 · Float · Str (may be an id) · Bytes · Literal · Anything
    List · Dict · Record (struct or TypedDict) · Constrained (`msgspec.Meta` bounds) · Union

Invariants
  1. The alternatives of a union can be told apart by their wire form alone; a union that breaks this is a SchemaError.
  2. Each wire spelling of a record's field names exactly one field.
  3. A shape may contain itself only through a Record, whose fields are read on first use.

Decoders, encoders, columns and generated types are all compiled from shapes, so they agree on what an annotation means.
"""

import enum
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import msgspec

from engine.errors import SchemaError
from engine.ids import IdOf

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1, extra={"int64": True})]

_TEXT_BY_BOUND = {  # the attributes of `msgspec.Meta` that bound a value, and how messages put them
    "gt": "> {}",
    "ge": ">= {}",
    "lt": "< {}",
    "le": "<= {}",
    "multiple_of": "a multiple of {}",
    "pattern": "matching {!r}",
    "min_length": "length >= {}",
    "max_length": "length <= {}",
}


class Shape(msgspec.Struct, frozen=True):
    """The base of all shapes; `str(shape)` is how messages name it."""


class Null(Shape, frozen=True):
    def __str__(self) -> str:
        return "null"


class Bool(Shape, frozen=True):
    def __str__(self) -> str:
        return "bool"


class Int(Shape, frozen=True):
    def __str__(self) -> str:
        return "int"


class Int64Shape(Shape, frozen=True):
    def __str__(self) -> str:
        return "int64"


class Float(Shape, frozen=True):
    def __str__(self) -> str:
        return "float"


class Str(Shape, frozen=True):
    id_of: str | None = None  # the document class whose ids these are

    def __str__(self) -> str:
        return "str" if self.id_of is None else f"Id[{self.id_of}]"


class Bytes(Shape, frozen=True):
    def __str__(self) -> str:
        return "bytes"


class LiteralShape(Shape, frozen=True):
    choices: tuple[str | int, ...]  # of one type, not empty

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self.choices))


class Anything(Shape, frozen=True):
    def __str__(self) -> str:
        return "any value"


class ListShape(Shape, frozen=True):
    item: Shape

    def __str__(self) -> str:
        return f"list[{self.item}]"


class DictShape(Shape, frozen=True):
    key: Str | LiteralShape
    item: Shape

    def __str__(self) -> str:
        return f"dict[{self.key}, {self.item}]"


class Constrained(Shape, frozen=True):
    inner: Shape
    annotation: Any  # the builtin type with its `Meta` bounds: what `msgspec.convert` checks

    def __str__(self) -> str:
        bounds = [
            text.format(getattr(meta, name))
            for meta in get_args(self.annotation)[1:]
            for name, text in _TEXT_BY_BOUND.items()
            if getattr(meta, name) is not None
        ]
        return f"{self.inner} ({', '.join(bounds)})"

    def fits(self, value: Any) -> bool:
        """Whether a value of the inner shape is within the bounds."""
        try:
            msgspec.convert(value, self.annotation)
        except msgspec.ValidationError:
            return False
        return True


class UnionShape(Shape, frozen=True):
    alternatives: tuple[Shape, ...]  # two or more, none of them a union

    def __str__(self) -> str:
        return " or ".join(map(str, self.alternatives))


class RecordField(msgspec.Struct, frozen=True):
    name: str  # in Python
    wire_name: str  # in results and in storage
    shape: Shape
    is_required: bool

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names that arguments may use for it; the first is the one to name in messages."""
        names = [self.wire_name, camel_case(self.wire_name)]
        if camel_case(self.name) in names:
            names.insert(0, self.name)
        return tuple(dict.fromkeys(names))


class RecordShape(Shape, frozen=True, dict=True, eq=False):
    """A struct or a TypedDict: known fields, each with a shape of its own."""

    name: str
    make: Callable[..., Any]  # takes the fields by their Python names
    struct_type: type[msgspec.Struct] | None  # None for a TypedDict
    read_fields: Callable[[], tuple[RecordField, ...]]
    tag_field: str | None = None
    tag: str | int | None = None

    def __str__(self) -> str:
        return self.name

    @cached_property
    def fields(self) -> tuple[RecordField, ...]:
        return self.read_fields()

    @property
    def is_document(self) -> bool:
        """Whether it is a table's class: the engine makes or checks its instances itself."""
        return self.struct_type is not None and "_id" in self.struct_type.__struct_encode_fields__

    def field_by_spelling(self, where: str) -> dict[str, RecordField]:
        return fields_by_spelling(self.fields, where=where)


def shape_of(annotation: Any, *, where: str) -> Shape:
    """The shape of an annotation; SchemaError beginning with `where` for what no wire value can hold."""
    reader = _Reader()
    shape = reader.read(annotation, where, owner=None)
    reader.finish()
    return shape


def camel_case(name: str) -> str:
    """`game_id` as JavaScript writes it: `gameId`; leading underscores stay."""
    bare = name.lstrip("_")
    first, *rest = bare.split("_")
    return name[: len(name) - len(bare)] + first + "".join(part[:1].upper() + part[1:] for part in rest)


def fields_by_spelling(fields: Iterable[RecordField], *, where: str) -> dict[str, RecordField]:
    """Every name that arguments may use, and the field it names (invariant 2)."""
    named: dict[str, RecordField] = {}
    for field in fields:
        for spelling in field.spellings:
            if spelling in named:
                raise SchemaError(
                    f"{where}: {named[spelling].name!r} and {field.name!r} are both {spelling!r} on the wire. "
                    "Rename one."
                )
            named[spelling] = field
    return named


def parts_of(shape: Shape) -> Iterator[Shape]:
    """The shape and all shapes within it, each record once."""
    seen: set[RecordShape] = set()
    waiting = [shape]
    while waiting:
        shape = waiting.pop()
        yield shape
        match shape:
            case ListShape(item):
                waiting.append(item)
            case DictShape(key, item):
                waiting += (key, item)
            case Constrained(inner):
                waiting.append(inner)
            case UnionShape(alternatives):
                waiting += alternatives
            case RecordShape() if shape not in seen:
                seen.add(shape)
                waiting += [field.shape for field in shape.fields]


def has_no_fixed_depth(shape: Shape) -> bool:
    """Whether its values may nest deeper than the annotation shows: it holds `Any` or contains itself."""

    def is_open(shape: Shape, within: tuple[RecordShape, ...]) -> bool:
        match shape:
            case Anything():
                return True
            case ListShape(item) | DictShape(_, item):
                return is_open(item, within)
            case Constrained(inner):
                return is_open(inner, within)
            case UnionShape(alternatives):
                return any(is_open(alternative, within) for alternative in alternatives)
            case RecordShape():
                return shape in within or any(is_open(field.shape, (*within, shape)) for field in shape.fields)
        return False

    return is_open(shape, ())


def python_type_of(shape: Shape) -> type:
    """The one Python type of the values of a shape that is neither a union nor anything."""
    match shape:
        case Constrained(inner):
            return python_type_of(inner)
        case LiteralShape(choices):
            return type(choices[0])
        case RecordShape(struct_type=struct_type):
            return dict if struct_type is None else struct_type
    return _TYPE_BY_SHAPE[type(shape)]


class _Reader:
    """Reads one annotation; a record met again inside itself is the same shape."""

    def __init__(self) -> None:
        self._record_by_type: dict[Any, RecordShape] = {}
        self._unread: list[tuple[RecordShape, str]] = []  # records whose fields were not looked at yet, and where

    def finish(self) -> None:
        """Read all records, so that what is wrong in them is found now."""
        while self._unread:
            record, where = self._unread.pop()
            record.field_by_spelling(where)

    def read(self, annotation: Any, where: str, owner: type | None) -> Shape:
        simple = _SIMPLE.get(annotation) if isinstance(annotation, type) or annotation in (None, Any) else None
        if simple is not None:
            return simple
        origin = get_origin(annotation)
        if origin is Annotated:
            return self._annotated(annotation, where, owner)
        if origin in (Union, types.UnionType):
            return self._union([self.read(part, where, owner) for part in get_args(annotation)], where)
        if origin is Literal:
            return self._literal(get_args(annotation), where)
        if origin in (NotRequired, Required):
            return self.read(get_args(annotation)[0], where, owner)
        if annotation is list or origin is list:
            (item,) = get_args(annotation) or (Any,)
            return ListShape(self.read(item, f"{where}[]", owner))
        if annotation is dict or origin is dict:
            return self._dict(get_args(annotation) or (str, Any), where, owner)
        struct_type = origin or annotation
        if isinstance(struct_type, type) and issubclass(struct_type, msgspec.Struct):
            return self._struct(annotation, struct_type, where)
        if is_typeddict(annotation):
            return self._typed_dict(annotation, where)
        if isinstance(annotation, TypeVar):
            return self.read(annotation.__bound__ or Any, where, owner)
        if hasattr(annotation, "__supertype__"):  # NewType
            return self.read(annotation.__supertype__, where, owner)
        if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
            raise SchemaError(f"{where}: {annotation.__name__} is an Enum. Use Literal[...] with its values.")
        raise SchemaError(
            f"{where}: {_text(annotation)} has no form on the wire. Use None, bool, int, Int64, float, str, bytes, Id, "
            "Literal, list, dict, a msgspec.Struct, a TypedDict, unions of these, or Any."
        )

    def _annotated(self, annotation: Any, where: str, owner: type | None) -> Shape:
        base, *marks = get_args(annotation)
        for mark in marks:
            if isinstance(mark, IdOf):
                return Str(id_of=owner.__name__ if mark.target is Self and owner else mark.target_name)
        metas = [mark for mark in marks if isinstance(mark, msgspec.Meta)]
        is_int64 = [meta for meta in metas if (meta.extra or {}).get("int64")]
        inner = Int64Shape() if is_int64 else self.read(base, where, owner)
        bounds = [
            meta
            for meta in metas
            if meta not in is_int64 and any(getattr(meta, name) is not None for name in _TEXT_BY_BOUND)
        ]
        if not bounds:
            return inner
        if not isinstance(inner, _BOUNDED):
            raise SchemaError(f"{where}: bounds can be set on a number, str, bytes, list or dict, not on {inner}.")
        constrained: Any = python_type_of(inner)
        for bound in bounds:
            constrained = Annotated[constrained, bound]
        try:
            msgspec.json.Decoder(constrained)
        except TypeError as error:
            raise SchemaError(f"{where}: {error}") from error
        return Constrained(inner, constrained)

    def _literal(self, choices: tuple[Any, ...], where: str) -> Shape:
        shapes: list[Shape] = []
        for kind in (str, int):
            of_kind = tuple(choice for choice in choices if type(choice) is kind)
            if of_kind:
                shapes.append(LiteralShape(of_kind))
        if None in choices:
            shapes.append(Null())
        if any(type(choice) not in (str, int, type(None)) for choice in choices):
            raise SchemaError(f"{where}: a Literal holds str, int and None only.")
        return self._union(shapes, where)

    def _dict(self, parts: tuple[Any, ...], where: str, owner: type | None) -> Shape:
        key = self.read(parts[0], f"{where} keys", owner)
        if isinstance(key, Str) or (isinstance(key, LiteralShape) and isinstance(key.choices[0], str)):
            return DictShape(key, self.read(parts[1], f"{where}[…]", owner))
        raise SchemaError(f"{where}: keys of a dict are str on the wire, not {key}.")

    def _union(self, shapes: list[Shape], where: str) -> Shape:
        flat: list[Shape] = []
        for shape in shapes:
            flat += shape.alternatives if isinstance(shape, UnionShape) else (shape,)
        if any(isinstance(shape, Anything) for shape in flat):
            return Anything()
        unique = [shape for place, shape in enumerate(flat) if shape not in flat[:place]]
        literals = [shape for shape in unique if isinstance(shape, LiteralShape)]
        for kind in (str, int):
            same = [shape for shape in literals if type(shape.choices[0]) is kind]
            if len(same) > 1:
                merged = LiteralShape(tuple(dict.fromkeys(choice for shape in same for choice in shape.choices)))
                unique = [merged if shape is same[0] else shape for shape in unique if shape not in same[1:]]
        shape_by_form: dict[tuple[object, ...], Shape] = {}
        for shape in unique:
            other = shape_by_form.setdefault(_wire_form(shape), shape)
            if other is not shape:
                raise SchemaError(
                    f"{where}: {other} and {shape} cannot be told apart on the wire. "
                    "Keep one of them, or make both tagged structs (msgspec: `tag=True`)."
                )
        if ("object",) in shape_by_form and any(form[0] == "object" for form in shape_by_form if len(form) > 1):
            raise SchemaError(f"{where}: of {UnionShape(tuple(unique))}, an untagged object looks like a tagged one.")
        tag_fields = {shape.tag_field for shape in unique if isinstance(shape, RecordShape)}
        if len(tag_fields) > 1:
            raise SchemaError(f"{where}: the structs of a union must share one tag field, not {tag_fields}.")
        return unique[0] if len(unique) == 1 else UnionShape(tuple(unique))

    def _struct(self, annotation: Any, struct_type: type[msgspec.Struct], where: str) -> RecordShape:
        known = self._record_by_type.get(annotation)
        if known is not None:
            return known
        config = struct_type.__struct_config__
        if config.array_like or config.omit_defaults:
            raise SchemaError(
                f"{where}: {struct_type.__name__} must not be array_like or omit_defaults: on the wire it is an object "
                "with all its fields."
            )

        def read_fields() -> tuple[RecordField, ...]:
            try:
                infos = msgspec.structs.fields(annotation)
            except NameError as error:
                raise SchemaError(f"{where}: {struct_type.__name__}: {error}") from error
            return tuple(
                RecordField(
                    name=info.name,
                    wire_name=_checked_name(info.encode_name, f"{where}: {struct_type.__name__}.{info.name}"),
                    shape=self.read(info.type, f"{where}.{info.name}", owner=struct_type),
                    is_required=info.required,
                )
                for info in infos
            )

        record = RecordShape(
            struct_type.__name__, struct_type, struct_type, read_fields, tag_field=config.tag_field, tag=config.tag
        )
        return self._remember(annotation, record, where)

    def _typed_dict(self, annotation: Any, where: str) -> RecordShape:
        known = self._record_by_type.get(annotation)
        if known is not None:
            return known

        def read_fields() -> tuple[RecordField, ...]:
            try:
                hints = get_type_hints(annotation, include_extras=True)
            except NameError as error:
                raise SchemaError(f"{where}: {annotation.__name__}: {error}") from error
            return tuple(
                RecordField(
                    name=name,
                    wire_name=_checked_name(name, f"{where}: {annotation.__name__}"),
                    shape=self.read(hint, f"{where}.{name}", owner=None),
                    is_required=name in annotation.__required_keys__,
                )
                for name, hint in hints.items()
            )

        return self._remember(annotation, RecordShape(annotation.__name__, dict, None, read_fields), where)

    def _remember(self, annotation: Any, record: RecordShape, where: str) -> RecordShape:
        self._record_by_type[annotation] = record
        self._unread.append((record, where))
        return record


_SIMPLE: Mapping[Any, Shape] = {
    None: Null(),
    type(None): Null(),
    bool: Bool(),
    int: Int(),
    float: Float(),
    str: Str(),
    bytes: Bytes(),
    Any: Anything(),
    object: Anything(),
}
_BOUNDED = (Int, Int64Shape, Float, Str, Bytes, ListShape, DictShape)
_TYPE_BY_SHAPE: Mapping[type[Shape], type] = {
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


def _wire_form(shape: Shape) -> tuple[object, ...]:
    """What a decoder can see of a value of this shape before it decodes it."""
    match shape:
        case Constrained(inner):
            return _wire_form(inner)
        case Int() | Int64Shape():
            return ("int",)
        case LiteralShape(choices):
            return ("str" if isinstance(choices[0], str) else "int",)
        case Str():
            return ("str",)
        case ListShape():
            return ("array",)
        case RecordShape(tag=tag) if tag is not None:
            return ("object", tag)
        case DictShape() | RecordShape():
            return ("object",)
    return (type(shape),)


def _checked_name(wire_name: str, where: str) -> str:
    if not wire_name.isascii() or not wire_name.isprintable() or wire_name.startswith("$"):
        raise SchemaError(f"{where}: names on the wire are printable ASCII and do not begin with '$'.")
    return wire_name


def _text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
