"""What annotations mean, and which are refused at start."""

import enum
from typing import Annotated, Any, Literal, NewType, Self

import msgspec
import pytest

from engine.errors import SchemaError
from engine.ids import Id
from engine.schema import Table
from engine.values import Int64, camel_case
from engine.values.shapes import (
    Anything,
    Float,
    Int,
    Int64Shape,
    ListShape,
    LiteralShape,
    Null,
    RecordShape,
    Str,
    UnionShape,
    has_no_fixed_depth,
    parts_of,
    shape_of,
)

UserName = NewType("UserName", str)


class Colour(enum.Enum):
    RED = "red"


class Comment(Table, name="comments"):
    parent_id: Id[Self] | None = None
    text: str


class Tree(msgspec.Struct):
    children: "list[Tree]"


class Meeting(msgspec.Struct):
    game_id: str
    gameId: str  # noqa: N815 - the collision is the point


class Untagged(msgspec.Struct):
    x: int


class TaggedA(msgspec.Struct, tag="a"):
    x: int


class TaggedB(msgspec.Struct, tag="b", tag_field="kind"):
    x: int


class AsArray(msgspec.Struct, array_like=True):
    x: int


class Dangling(msgspec.Struct):
    x: "Nowhere"  # noqa: F821


class Hidden(msgspec.Struct, rename={"x": "$x"}):
    x: int


@pytest.mark.parametrize(
    ("annotation", "shape"),
    [
        (None, Null()),
        (object, Anything()),
        (int | Any, Anything()),
        (UserName, Str()),
        (Id["Game"], Str(id_of="Game")),
        (Int64, Int64Shape()),
        (Annotated[int, msgspec.Meta(description="how many")], Int()),
        (list, ListShape(Anything())),
        (float | None, UnionShape((Float(), Null()))),
        (Literal["a", 1, None], UnionShape((LiteralShape(("a",)), LiteralShape((1,)), Null()))),
        (Literal["a"] | Literal["b"], LiteralShape(("a", "b"))),
        (int | (None | int), UnionShape((Int(), Null()))),
    ],
)
def test_an_annotation_has_a_shape(annotation: Any, shape: Any) -> None:
    assert shape_of(annotation, where="here") == shape


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (set[int], "chat:list limit: set[int] has no form on the wire. Use None, bool, int"),
        (tuple[int, int], "has no form on the wire"),
        (complex, "complex has no form on the wire"),
        (list[complex], "chat:list limit[]: complex has no form"),
        (Colour, "Colour is an Enum. Use Literal"),
        (Literal[True], "a Literal holds str, int and None only"),
        (dict[int, str], "keys of a dict are str on the wire, not int"),
        (int | Int64, "int and int64 cannot be told apart"),
        (str | Id["Game"], "str and Id[Game] cannot be told apart"),
        (str | Literal["a"], "str and one of 'a' cannot be told apart"),
        (dict[str, int] | Untagged, "dict[str, int] and Untagged cannot be told apart"),
        (Untagged | Comment, "Untagged and Comment cannot be told apart"),
        (TaggedA | TaggedB, "must share one tag field"),
        (TaggedA | Untagged, "an untagged object looks like a tagged one"),
        (TaggedA | dict[str, int], "an untagged object looks like a tagged one"),
        (AsArray, "AsArray must not be array_like or omit_defaults"),
        (Meeting, "'game_id' and 'gameId' are both 'gameId' on the wire"),
        (list[Meeting], "chat:list limit[]: 'game_id' and 'gameId'"),
        (Dangling, "Dangling: name 'Nowhere' is not defined"),
        (Hidden, "Hidden.x: names on the wire are printable ASCII and do not begin with '$'"),
        (Annotated[bool, msgspec.Meta(ge=1)], "bounds can be set on a number, str, bytes, list or dict, not on bool"),
        (Annotated[str, msgspec.Meta(ge=1)], "chat:list limit: Can only set `ge` on a numeric type"),
    ],
)
def test_an_annotation_that_cannot_be_sent_is_a_schema_error_that_says_where(annotation: Any, message: str) -> None:
    with pytest.raises(SchemaError) as refusal:
        shape_of(annotation, where="chat:list limit")
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("chat:list limit")


def test_an_id_of_the_class_itself_names_that_class() -> None:
    shape = shape_of(Comment, where="here")
    assert {part.id_of for part in parts_of(shape) if isinstance(part, Str)} == {None, "Comment"}


def test_a_struct_inside_itself_is_one_shape_of_no_fixed_depth() -> None:
    tree = shape_of(Tree, where="here")
    assert [part for part in parts_of(tree) if isinstance(part, RecordShape)] == [tree, tree]
    assert has_no_fixed_depth(tree)
    assert has_no_fixed_depth(shape_of(list[Any], where="here"))
    assert not has_no_fixed_depth(shape_of(dict[str, list[Comment | None]], where="here"))


@pytest.mark.parametrize(
    ("name", "camel"),
    [
        ("game_id", "gameId"),
        ("get_messages", "getMessages"),
        ("gameId", "gameId"),
        ("_private_name", "_privateName"),
        ("position_2", "position2"),
        ("trailing_", "trailing"),
        ("_", "_"),
    ],
)
def test_a_name_is_written_as_javascript_writes_it(name: str, camel: str) -> None:
    assert camel_case(name) == camel
