"""Results on their way out: their bytes, and what is refused."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest

from engine.errors import InvalidResult, LimitExceeded
from engine.ids import Id
from engine.limits import Limits
from engine.schema import Table
from engine.values import Int64, compile_encoder, encode_value, to_wire

LIMITS = Limits()


class Game(Table, name="games"):
    title: str


class ChatMessage(Table, name="live_chat_messages"):
    game_id: Id[Game]
    message: str
    status: Literal["active", "hidden", "deleted"] = "active"
    likes: int = 0
    attachment: bytes | None = None
    labels: list[str] = []
    created_at: float


class Page(msgspec.Struct, rename="camel"):
    page: list[ChatMessage]
    is_done: bool


class Reply(msgspec.Struct):
    text: str
    replies: "list[Reply]" = []


class Circle(msgspec.Struct, tag="circle"):
    radius: float


class ViewerCount(TypedDict):
    viewerCount: int


def message(**fields: Any) -> ChatMessage:
    return ChatMessage(
        **{"id": "m1", "creation_time": 1.5, "game_id": "g1", "message": "hi", "created_at": 2.5, **fields}
    )


def encode(annotation: Any, value: Any, limits: Limits = LIMITS) -> str:
    return compile_encoder(annotation, limits=limits)(value).decode()


@pytest.mark.parametrize(
    ("annotation", "value", "payload"),
    [
        (None, None, "null"),
        (int, 2**53, "9007199254740992"),
        (int, 2**53 + 1, '{"$integer":"AQAAAAAAIAA="}'),
        (Int64, 5, '{"$integer":"BQAAAAAAAAA="}'),
        (Int64, -(2**63), '{"$integer":"AAAAAAAAAIA="}'),
        (float, 0.0, "0.0"),
        (float, -0.0, '{"$float":"AAAAAAAAAIA="}'),
        (float, math.inf, '{"$float":"AAAAAAAA8H8="}'),
        (float, -math.inf, '{"$float":"AAAAAAAA8P8="}'),
        (float, math.nan, '{"$float":"AAAAAAAA+H8="}'),
        (float, 3, "3"),  # typing counts int among the floats
        (float | None, 3, "3"),
        (int | float, 2**60, '{"$integer":"AAAAAAAAABA="}'),
        (bytes, b"hi", '{"$bytes":"aGk="}'),
        (dict[str, Int64], {"a": 1}, '{"a":{"$integer":"AQAAAAAAAAA="}}'),
        (ViewerCount, {"viewerCount": 7}, '{"viewerCount":7}'),
        (Circle, Circle(1.0), '{"type":"circle","radius":1.0}'),
        (Circle, Circle(-0.0), '{"type":"circle","radius":{"$float":"AAAAAAAAAIA="}}'),
        (Reply, Reply("a", [Reply("b")]), '{"text":"a","replies":[{"text":"b","replies":[]}]}'),
        (Any, (1, {"a": Circle(2.0)}), '[1,{"a":{"type":"circle","radius":2.0}}]'),
        (Any, {"": 1}, '{"":1}'),
        (Annotated[int, msgspec.Meta(ge=0)] | str, 1, "1"),
    ],
)
def test_a_value_has_the_wire_form_of_its_annotation(annotation: Any, value: Any, payload: str) -> None:
    assert encode(annotation, value) == payload


def test_documents_go_out_under_their_wire_names() -> None:
    payload = encode(Page, Page(page=[message()], is_done=True))
    assert msgspec.json.decode(payload) == {
        "page": [
            {
                "_id": "m1",
                "_creationTime": 1.5,
                "game_id": "g1",
                "message": "hi",
                "status": "active",
                "likes": 0,
                "attachment": None,
                "labels": [],
                "created_at": 2.5,
            }
        ],
        "isDone": True,
    }


@pytest.mark.parametrize(
    ("fields", "piece"),
    [
        ({"created_at": math.inf}, '"created_at":{"$float":"AAAAAAAA8H8="}'),
        ({"created_at": 0.0}, '"created_at":0.0'),
        ({"likes": 2**60}, '"likes":{"$integer":"AAAAAAAAABA="}'),
        ({"attachment": b"hi"}, '"attachment":{"$bytes":"aGk="}'),
    ],
)
def test_special_values_inside_documents_take_their_special_form(fields: dict[str, Any], piece: str) -> None:
    for annotation, value in ((list[ChatMessage], [message(), message(**fields)]), (Any, {"a": [message(**fields)]})):
        assert piece in encode(annotation, value)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (None, 1, "expected null, got 1"),
        (int, True, "expected int, got true"),
        (int, 1.0, "expected int, got 1.0"),
        (int, 2**63, "expected an integer of 64 bits, got 9223372036854775808"),
        (int, 10**4000, "expected an integer of 64 bits, got an integer of 13288 bits"),
        (float, 2**60, "expected float, got 1152921504606846976"),
        (list[str], ("a",), "expected list[str], got a tuple of 1 items"),
        (list[ChatMessage], [message(), Game(title="x")], "[1]: expected ChatMessage, got a Game"),
        (ChatMessage, None, "expected ChatMessage, got null"),
        (dict[str, ChatMessage], {"a": message(likes="no")}, "a.likes: expected int, got 'no'"),
        (ChatMessage, message(created_at="now"), "created_at: expected float, got 'now'"),
        (ChatMessage, message(message="\ud800"), "message: the text holds a lone surrogate"),
        (Page, Page(page=[], is_done="yes"), "is_done: expected bool, got 'yes'"),
        (
            ViewerCount,
            {"viewer_count": 7},
            "expected ViewerCount with the keys viewerCount, got an object with the keys",
        ),
        (Literal["a", "b"], "c", "expected one of 'a', 'b', got 'c'"),
        (Literal[1], True, "expected one of 1, got true"),
        (Annotated[int, msgspec.Meta(ge=0)], -1, "expected int (>= 0), got -1"),
        (int | str, None, "expected int or str, got null"),
        (dict[str, int], {"$a": 1}, "the key '$a' cannot be sent"),
        (dict[str, int], {"é": 1}, "the key '\\xe9' cannot be sent"),
        (dict[str, int], {1: 1}, "the key 1 cannot be sent"),
        (dict[Literal["a"], int], {"b": 1}, "expected one of 'a', got 'b'"),
        (dict[str, dict[str, int]], {"a": {"b": 1.5}}, "a.b: expected int, got 1.5"),
        (Any, {"a": [{1, 2}]}, "a[0]: expected a value that the wire knows"),
        (Any, [Iterator], "[0]: expected a value that the wire knows"),
        (Any, {"x" * 1025: 1}, "have at most 1,024 characters"),
        (Any, "\udfff", "the text holds a lone surrogate"),
    ],
)
def test_a_wrong_result_is_refused_with_its_path_and_what_was_expected(
    annotation: Any, value: Any, message: str
) -> None:
    with pytest.raises(InvalidResult) as refusal:
        encode(annotation, value)
    assert message in str(refusal.value)


@pytest.mark.parametrize("annotation", [Any, Reply])
def test_a_value_that_holds_itself_is_refused(annotation: Any) -> None:
    reply = Reply("a")
    reply.replies.append(reply)
    with pytest.raises(InvalidResult, match="nests deeper than 64 levels"):
        encode(annotation, reply)


@pytest.mark.parametrize("innermost", [[], [math.nan], Game(title="x")])
def test_a_result_may_nest_as_deep_as_the_limit_and_no_deeper(innermost: Any) -> None:
    value = innermost
    for _ in range(LIMITS.value_depth_max - 1):
        value = [value]
    encode(Any, value)
    with pytest.raises(InvalidResult, match="nests deeper than 64 levels"):
        encode(Any, [value])


@pytest.mark.parametrize("annotation", [list[int], Any])
def test_a_list_in_a_result_may_be_as_long_as_the_limit_and_no_longer(annotation: Any) -> None:
    limits = Limits(array_item_count_max=2)
    assert encode(annotation, [1, 2], limits) == "[1,2]"
    with pytest.raises(InvalidResult, match="3 items, 2 allowed"):
        encode(annotation, [1, 2, 3], limits)


@pytest.mark.parametrize("annotation", [dict[str, int], Any])
def test_an_object_in_a_result_may_have_as_many_fields_as_the_limit_and_no_more(annotation: Any) -> None:
    limits = Limits(object_field_count_max=1)
    assert encode(annotation, {"a": 1}, limits) == '{"a":1}'
    with pytest.raises(InvalidResult, match="2 fields, 1 allowed"):
        encode(annotation, {"a": 1, "b": 2}, limits)


def test_a_result_may_be_as_large_as_the_limit_and_no_larger() -> None:
    limits = Limits(result_size_bytes_max=7)
    assert encode(str, "x" * 5, limits) == '"xxxxx"'
    with pytest.raises(LimitExceeded, match="8 used, 7 allowed"):
        encode(str, "x" * 6, limits)


def test_data_of_an_error_has_wire_form_and_a_clear_refusal() -> None:
    assert encode_value({"code": 5, "at": -0.0}, LIMITS) == b'{"code":5,"at":{"$float":"AAAAAAAAAIA="}}'
    assert to_wire([b"hi"]) == [{"$bytes": "aGk="}]
    for refuse in (encode_value, to_wire):
        with pytest.raises(InvalidResult, match=r"a: expected a value that the wire knows .* got a object"):
            refuse({"a": object()})


def test_a_struct_that_the_wire_cannot_carry_is_refused_in_a_result_too() -> None:
    class Odd(msgspec.Struct):
        choices: set[int]

    with pytest.raises(InvalidResult, match=r"Odd\.choices: set\[int\] has no form on the wire"):
        encode(Any, Odd({1}))
