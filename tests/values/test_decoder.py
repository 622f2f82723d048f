"""Wire values as arguments: what is taken, what is refused, and how a refusal reads."""

import math
from typing import Annotated, Any, Generic, Literal, NotRequired, TypedDict, TypeVar

import msgspec
import pytest

from engine.errors import InvalidArgument, SchemaError
from engine.ids import Id, make_id, table_tag
from engine.limits import Limits
from engine.schema import Table
from engine.values import Int64, compile_decoder, decode_value
from engine.values.wire import EXACT_INT_MAX

LIMITS = Limits()
FIVE, MINUS_ONE = {"$integer": "BQAAAAAAAAA="}, {"$integer": "//////////8="}
MINUS_ZERO, NAN, INFINITY = {"$float": "AAAAAAAAAIA="}, {"$float": "AAAAAAAA+H8="}, {"$float": "AAAAAAAA8H8="}
GAME_ID = make_id(table_tag("games"), 7 << 40, b"by chance")

T = TypeVar("T")


class Game(Table, name="games"):
    title: str


class Filter(msgspec.Struct, frozen=True):
    game_id: str
    labels: dict[str, int] = {}
    within: "Filter | None" = None


class Renamed(msgspec.Struct, rename="camel"):
    is_done: bool


class Circle(msgspec.Struct, tag="circle"):
    radius: float


class Square(msgspec.Struct, tag="square"):
    side: float


class Boxed(msgspec.Struct, Generic[T]):
    content: T


class Window(TypedDict):
    start_ms: float
    end_ms: NotRequired[float]


class Span(msgspec.Struct):
    start: int
    end: int

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ValueError(f"start {self.start} is past end {self.end}")


def decode(annotation: Any, wire: Any, limits: Limits = LIMITS) -> Any:
    return compile_decoder(annotation, limits=limits, tags={"Game": table_tag("games")}.__getitem__)(wire)


@pytest.mark.parametrize(
    ("annotation", "wire", "value"),
    [
        (Game, {"title": "a"}, Game(title="a")),
        (Game, {"_id": GAME_ID, "_creationTime": 7, "title": "a"}, Game(id=GAME_ID, creation_time=7.0, title="a")),
        (int, 1.0, 1),
        (int, -0.0, 0),
        (int, MINUS_ZERO, 0),  # Math.round(-0.2) in JavaScript
        (int, FIVE, 5),
        (int, EXACT_INT_MAX, EXACT_INT_MAX),
        (int, -float(EXACT_INT_MAX), -EXACT_INT_MAX),
        (Int64, MINUS_ONE, -1),
        (Int64, 3.0, 3),
        (float, 1, 1.0),
        (float, INFINITY, math.inf),
        (float, 10**300, 1e300),
        (int | float, 1, 1.0),
        (int | float, FIVE, 5),
        (int | float, MINUS_ZERO, -0.0),
        (int | str | None, None, None),
        (Literal[1, 2, "a"], 2.0, 2),
        (Literal[1, 2, "a"], "a", "a"),
        (bytes, {"$bytes": "aGk="}, b"hi"),
        (str | bytes, {"$bytes": ""}, b""),
        (Any, [1, FIVE, {"a": {"$bytes": "aGk="}}], [1.0, 5, {"a": b"hi"}]),
        (list, [1], [1.0]),
        (dict, {"snake_key": 1}, {"snake_key": 1.0}),
        (dict[str, Filter], {"a_b": {"gameId": "x"}}, {"a_b": Filter("x")}),
        (dict[Id[Game], bool], {GAME_ID: True}, {GAME_ID: True}),
        (Circle | Square | None, {"type": "square", "side": 2}, Square(2.0)),
        (Circle, {"radius": 1}, Circle(1.0)),
        (Boxed[int], {"content": 1.0}, Boxed(1)),
        (Window, {"startMs": 1}, {"start_ms": 1.0}),
        (Renamed, {"is_done": True}, Renamed(True)),
        (Renamed, {"isDone": True}, Renamed(True)),
    ],
)
def test_a_wire_value_becomes_the_value_that_the_annotation_says(annotation: Any, wire: Any, value: Any) -> None:
    decoded = decode(annotation, wire)
    assert decoded == value
    assert type(decoded) is type(value)


@pytest.mark.parametrize(
    ("annotation", "wire", "message"),
    [
        (Game, {"_id": "x", "title": "a"}, "_id: expected Id[Game], got 'x'"),
        (Game, {"id": GAME_ID, "title": "a"}, "id: unknown. Game has"),
        (int, 1.5, "expected int, got 1.5"),
        (int, True, "expected int, got true"),
        (int, math.inf, "expected int, got inf"),
        (int, NAN, "expected int, got a special float"),
        (int, "1", "expected int, got '1'"),
        (int, EXACT_INT_MAX + 1, "9007199254740993 is not exact as a number of JavaScript: send it as int64 (BigInt)"),
        (int, 10**4000, "an integer of 13288 bits is not exact"),
        (float, 10**4000, "expected a number within the range of a double, got an integer of 13288 bits"),
        (float, math.nan, "expected float, got nan"),
        (float, FIVE, "expected float, got an int64"),
        (float, {"$float": "AAAAAAAA8D8="}, "$float: 1.0 must be a plain number"),
        (Any, 10**4000, "expected a number within the range of a double"),
        (Any, math.inf, "expected a JSON number, got inf"),
        (Any, {"$commitTs": None}, "'$commitTs' marks no value"),
        (Any, {"$integer": "BQ=="}, "$integer: 1 bytes, 8 expected"),
        (Any, {"$integer": "BQAAAAAAAAA"}, "$integer: Incorrect padding"),
        (Any, {"$integer": 5}, "expected base64 text in $integer, got 5"),
        (Any, {"$integer": "BQAAAAAAAAA=", "x": 1}, "the key '$integer' cannot be sent"),
        (Any, {"a": {"é": 1}}, "a: the key '\\xe9' cannot be sent"),
        (Any, {"x" * 1025: 1}, "have at most 1,024 characters"),
        (str, "\ud800", "the text holds a lone surrogate: '\\ud800'"),
        (dict[str, Any], {"\udfff": 1}, "the key '\\udfff' cannot be sent"),
        (list[str], ["a", "b\udc00"], "[1]: the text holds a lone surrogate"),
        (list[int], {"0": 1}, "expected list[int], got an object with the keys 0"),
        (dict[str, int], {"$bytes": ""}, "expected dict[str, int], got bytes"),
        (Literal["a", "b"], "c", "expected one of 'a', 'b', got 'c'"),
        (Literal[1], True, "expected int, got true"),
        (int | None, "x" * 50, f"expected int, got '{'x' * 39}…'"),
        (int | str, [1, 2], "expected int or str, got a list of 2 items"),
        (Id[Game], "hello", "expected Id[Game], got 'hello'"),
        (Id[Game], make_id(table_tag("users"), 7, b"by chance"), "expected Id[Game], got"),
        (Id[Game], GAME_ID[:-1] + "x", "expected Id[Game], got"),
        (dict[Id[Game], bool], {"x": True}, "x: expected Id[Game], got 'x'"),
        (Annotated[int, msgspec.Meta(ge=1, le=100)] | None, 200, "expected int (>= 1, <= 100), got 200"),
        (Annotated[list[int], msgspec.Meta(max_length=1)], [1, 2], "expected list[int] (length <= 1), got a list of 2"),
        (Filter, {"gameId": "a", "game_id": "b"}, "game_id: spelled in two ways at once (game_id and gameId)"),
        (Filter, {"gameid": "a"}, "gameid: unknown. Filter has game_id, labels?, within?."),
        (Filter, {}, "game_id: missing, expected str. Filter has game_id, labels?, within?."),
        (Filter, {"$bytes": ""}, "expected Filter, got bytes"),
        (list[Filter], [{"gameId": "a", "within": {"gameId": 1}}], "[0].within.gameId: expected str, got 1"),
        (Circle | Square, {"type": "triangle"}, "type must be one of 'circle', 'square', not 'triangle'"),
        (Circle | Square, {}, "type must be one of 'circle', 'square', not null"),
        (Circle | Square, {"type": []}, "type must be one of 'circle', 'square', not a list of 0 items"),
        (Circle, {"type": "square", "radius": 1}, "type: unknown. Circle has radius."),
        (Span, {"start": 2, "end": 1}, "start 2 is past end 1"),
        (Window, {"endMs": 1}, "start_ms: missing, expected float"),
    ],
)
def test_a_wrong_wire_value_is_refused_with_its_path_and_what_was_expected(
    annotation: Any, wire: Any, message: str
) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        decode(annotation, wire)
    assert message in str(refusal.value)


@pytest.mark.parametrize("annotation", [list[int], Any])
def test_a_list_may_be_as_long_as_the_limit_and_no_longer(annotation: Any) -> None:
    limits = Limits(array_item_count_max=3)
    assert decode(annotation, [1, 2, 3], limits) == [1, 2, 3]
    with pytest.raises(InvalidArgument, match=r"^4 items, 3 allowed$"):
        decode(annotation, [1, 2, 3, 4], limits)


@pytest.mark.parametrize("annotation", [dict[str, int], Any])
def test_an_object_may_have_as_many_fields_as_the_limit_and_no_more(annotation: Any) -> None:
    limits = Limits(object_field_count_max=1)
    assert decode(annotation, {"a": 1}, limits) == {"a": 1}
    with pytest.raises(InvalidArgument, match=r"^2 fields, 1 allowed$"):
        decode(annotation, {"a": 1, "b": 2}, limits)


@pytest.mark.parametrize("annotation", [Any, list[Any], dict[str, Any] | list[Any]])
def test_a_value_may_nest_as_deep_as_the_limit_and_no_deeper(annotation: Any) -> None:
    wire: Any = FIVE  # a special object is a scalar, not a level
    for _ in range(LIMITS.value_depth_max):
        wire = [wire]
    decode(annotation, wire)
    with pytest.raises(InvalidArgument, match="nests deeper than 64 levels"):
        decode(annotation, [wire])


def test_a_struct_inside_itself_is_bounded_by_the_depth_limit_too() -> None:
    wire: Any = {"gameId": "x"}
    for _ in range(LIMITS.value_depth_max - 1):
        wire = {"gameId": "x", "within": wire}
    assert decode(Filter, wire).within.within.game_id == "x"
    with pytest.raises(InvalidArgument, match="nests deeper than 64 levels"):
        decode(Filter, {"gameId": "x", "within": wire})


def test_an_endless_nesting_is_refused_without_overflowing_the_stack() -> None:
    wire: Any = None
    for _ in range(100_000):
        wire = [wire]
    for annotation in (Any, list[Any], Filter, int):
        with pytest.raises(InvalidArgument):
            decode(annotation, wire)
    with pytest.raises(InvalidArgument):
        decode_value(wire)
    while wire:  # taken apart from the outside: its own end would overflow the stack
        wire = wire.pop()


def test_stored_ints_stay_ints_where_an_annotation_leaves_it_open() -> None:
    decode_stored = compile_decoder(int | float, limits=LIMITS, is_stored=True)
    assert [type(decode_stored(wire)) for wire in (1, 1.0, FIVE)] == [int, float, int]


def test_an_id_of_a_class_that_is_no_table_is_a_schema_error() -> None:
    with pytest.raises(SchemaError, match=r"Id\[Player\]: there is no table of the class Player"):
        decode(Id["Player"], "")
