"""Parameters as validation: what a function is called with, and which asks are one ask."""

import asyncio
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgument, RegistryError
from engine.functions.arguments import Signature, compile_signature
from engine.ids import Id, make_id, table_tag
from engine.limits import Limits
from engine.schema import Table
from engine.values import Int64
from tests import strategies
from tests.strategies import Typed, are_same

LIMITS = Limits()
GAME_ID = make_id(table_tag("games"), 7 << 40, b"by chance")


class Game(Table, name="games"):
    title: str


class Options(msgspec.Struct, frozen=True):
    num_items: int
    end_cursor: str | None = None


class Draft(msgspec.Struct):
    words: list[str]


def signature_of(function: Any) -> Signature:
    return compile_signature(function, limits=LIMITS, tags={"Game": table_tag("games")}.__getitem__)


async def get_messages(ctx: object, game_id: Id[Game], limit: int = 50, *, options: Options | None = None) -> list[str]:
    return [game_id, str(limit), str(options)]


def test_arguments_are_decoded_by_their_annotations_and_defaults_filled_in() -> None:
    arguments = signature_of(get_messages).decode(b'{"gameId":"%b","options":{"numItems":3.0}}' % GAME_ID.encode())
    assert arguments.values == {"game_id": GAME_ID, "limit": 50, "options": Options(3)}


def test_the_function_is_called_with_its_arguments_after_the_context() -> None:
    signature = signature_of(get_messages)
    arguments = signature.from_python({"game_id": GAME_ID, "limit": 3})
    assert asyncio.run(signature.call(get_messages, None, arguments)) == [GAME_ID, "3", "None"]
    assert signature.return_type == list[str]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{}", "game_id: missing, expected Id[Game]. get_messages has game_id, limit?, options?."),
        (b'{"gameId":5}', "gameId: expected Id[Game], got 5"),
        (b'{"game_id":"GAME","limit":1.5}', "limit: expected int, got 1.5"),
        (b'{"game_id":"GAME","limti":1}', "limti: unknown. get_messages has game_id, limit?, options?."),
        (b'{"game_id":"GAME","gameId":"GAME"}', "gameId: spelled in two ways at once (game_id and gameId)"),
        (b'{"game_id":"GAME","options":{"num_items":1,"numItems":1}}', "options.numItems: spelled in two ways at once"),
        (b"[]", "The arguments are one object of values by name, not a list of 0 items."),
        (b"null", "The arguments are one object of values by name, not null."),
        (b"{", "The arguments are not valid JSON"),
        (b'{"game_id":"\\ud800"}', "The arguments are not valid JSON"),
        (b'{"game_id":"\xed\xa0\x80"}', "The arguments are not valid JSON"),
        (b'{"limit":1e999}', "The arguments are not valid JSON"),
        (b'{"limit":' + b"9" * 5000 + b"}", "The arguments are not valid JSON"),
        (b'{"limit":' + b"9" * 4000 + b"}", "limit: an integer of 13288 bits is not exact"),
        (b'{"limit":' + b"[" * 100_000, "The arguments nest too deep."),
    ],
)
def test_wrong_arguments_are_refused_with_the_name_of_the_argument(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        signature_of(get_messages).decode(raw.replace(b"GAME", GAME_ID.encode()))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "game_id: missing, expected Id[Game]"),
        ({"game_id": "g1"}, "game_id: expected Id[Game], got 'g1'"),
        ({"game_id": GAME_ID, "limit": "1"}, "limit: expected int, got '1'"),
        ({"game_id": GAME_ID, "limti": 1}, "limti: unknown. get_messages has"),
        ({"game_id": GAME_ID, "options": Options("x")}, "options.num_items: expected int, got 'x'"),
        ({"game_id": GAME_ID, "options": object()}, "options: expected Options or null, got a object"),
    ],
)
def test_wrong_arguments_in_python_are_refused_alike(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        signature_of(get_messages).from_python(values)
    assert message in str(refusal.value)


def sample(ctx: object, at: float = 0, count: int | float = 1, mark: Int64 = 5, tags: list[str] = []) -> None: ...  # noqa: B006


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b'{"at":0.0,"tags":[]}',
        b'{"count":1.0,"at":0}',
        b'{"mark":{"$integer":"BQAAAAAAAAA="}}',
        b'{"tags":[],"mark":5,"count":1,"at":0}',
    ],
)
def test_equal_asks_are_equal_bytes(raw: bytes) -> None:
    signature = signature_of(sample)
    canonical = signature.decode(b"{}").canonical
    assert signature.decode(raw).canonical == canonical
    assert signature.from_python({"at": 0, "count": 1, "mark": 5}).canonical == canonical
    assert signature.decode(b'{"count":2}').canonical != canonical


@pytest.mark.slow
@given(st.data(), strategies.typed)
def test_arguments_survive_the_way_through_wire_json_and_python(data: st.DataObject, typed: Typed) -> None:
    def function(ctx: object, value: Any) -> None: ...

    function.__annotations__["value"] = typed.annotation
    signature = compile_signature(function, limits=LIMITS, tags=lambda _: "")
    arguments = signature.from_python({"value": data.draw(typed.values)})
    for again in (signature.decode(signature.to_wire_bytes(arguments)), signature.from_python(arguments.values)):
        assert again.canonical == arguments.canonical
        assert are_same(again.values, arguments.values)


def test_a_run_cannot_change_the_arguments_of_the_next_one() -> None:
    def grow(ctx: object, draft: Draft, notes: dict[str, list[int]], anything: Any) -> list[int]:
        draft.words.append("x")
        notes["a"].append(1)
        anything.append(1)
        return [len(draft.words), len(notes["a"]), len(anything)]

    signature = signature_of(grow)
    arguments = signature.decode(b'{"draft":{"words":[]},"notes":{"a":[]},"anything":[]}')
    assert [signature.call(grow, None, arguments) for _ in range(2)] == [[1, 1, 1], [1, 1, 1]]


def no_context() -> None: ...
def keyword_context(*, ctx: object) -> None: ...
def no_annotation(ctx, limit) -> None: ...
def many(ctx: object, *values: int) -> None: ...
def any_names(ctx: object, **values: int) -> None: ...
def by_position(ctx: object, limit: int, /) -> None: ...
def odd_type(ctx: object, limit: set[int]) -> None: ...
def two_spellings(ctx: object, game_id: int, gameId: int) -> None: ...  # noqa: N803 - the collision is the point
def bad_default(ctx: object, limit: int = None) -> None: ...  # noqa: RUF013
def no_table(ctx: object, player_id: Id["Player"]) -> None: ...  # noqa: F821
def no_class(ctx: object, player: "Player") -> None: ...  # noqa: F821
def ambiguous(ctx: object, of: str | Literal["a"]) -> None: ...  # noqa: PYI051, RUF100


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_context, "no_context: the first parameter is the context"),
        (keyword_context, "keyword_context: the first parameter is the context"),
        (no_annotation, "no_annotation: parameter 'limit' has no annotation"),
        (many, "many: parameter 'values' takes any number of values"),
        (any_names, "any_names: parameter 'values' takes any name"),
        (by_position, "by_position: parameter 'limit' is positional-only"),
        (odd_type, "odd_type: parameter 'limit': set[int] has no form on the wire"),
        (two_spellings, "two_spellings: 'game_id' and 'gameId' are both 'gameId' on the wire"),
        (bad_default, "bad_default: parameter 'limit': its default does not fit: expected int, got null"),
        (no_table, "no_table: parameter 'player_id': Id[Player]: there is no table of the class Player"),
        (no_class, "no_class: an annotation cannot be read: name 'Player' is not defined"),
        (ambiguous, "ambiguous: parameter 'of': str and one of 'a' cannot be told apart"),
    ],
)
def test_a_function_that_cannot_be_called_from_the_wire_is_refused_at_start(function: Any, message: str) -> None:
    with pytest.raises(RegistryError) as refusal:
        signature_of(function)
    assert str(refusal.value).startswith(__name__ + "." + message)


def test_a_positional_only_context_and_no_further_parameters_are_fine() -> None:
    def ping(ctx: object, /) -> str:
        return "pong"

    signature = signature_of(ping)
    assert signature.call(ping, None, signature.decode(b"{}")) == "pong"
