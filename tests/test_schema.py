"""What an app may declare, what it is told when it may not, and which documents fit."""

import subprocess
import sys
from enum import StrEnum
from math import inf, nan
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidDocument, SchemaError
from engine.ids import Id, creation_time_of, make_id
from engine.limits import Limits
from engine.ranges import BY_CREATION_TIME, NUMBER, full_key
from engine.schema import INDEX_COUNT_MAX, Index, Table, compile_schema, index, unique
from engine.values import Int64
from tests.strategies import int64s, texts

ROOT = Path(__file__).parents[1]
LIMITS = Limits()
TICK = 1_790_812_800_000 * 4096 + 1


class Address(msgspec.Struct):
    street: str
    number: int | None = None


class Color(StrEnum):
    RED = "red"


class Game(Table, name="games"):
    title: str


class Player(Table, name="players"):
    game_id: Id["Game"]
    name: str
    level: int = 0
    serial: Int64 | None = None
    ratio: float = 0.0
    is_active: bool = True
    photo: bytes = b""
    rank: Literal["low", "high"] = "low"
    key: str | int | None = None
    tags: list[str] = []
    address: Address | None = None
    friends: list[Id["Player"]] = []
    percent: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    extra: Any = None

    by_game_name = unique("game_id", "name")
    by_key_serial = index("key", "serial")


SCHEMA = compile_schema([Player, Game], LIMITS)
PLAYERS, GAMES = SCHEMA.table_of(Player), SCHEMA.table_of(Game)
GAME_ID, PLAYER_ID = (make_id(table.id_tag, TICK, b"123456789") for table in (GAMES, PLAYERS))


def player(**fields: Any) -> Player:
    return Player(
        **{"id": PLAYER_ID, "creation_time": creation_time_of(TICK), "game_id": GAME_ID, "name": "a", **fields}
    )


# -- declaring


def test_an_index_knows_its_documents() -> None:
    assert Player.by_game_name == Index(Player, "by_game_name", ("game_id", "name"), True)
    assert Player.by_key_serial == Index(Player, "by_key_serial", ("key", "serial"), False)


def test_a_document_is_immutable_and_made_by_keywords() -> None:
    with pytest.raises(AttributeError):
        player().name = "b"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Game("title")  # type: ignore[call-arg, misc]


def test_the_engines_own_fields_have_their_wire_names() -> None:
    game = Game(id=GAME_ID, creation_time=1.5, title="x")
    assert msgspec.json.decode(msgspec.json.encode(game)) == {"_id": GAME_ID, "_creationTime": 1.5, "title": "x"}


@pytest.mark.parametrize(
    ("class_name", "table_name"),
    [("Game", "game"), ("ChatMessage", "chat_message"), ("HTTPRoute", "http_route"), ("Level2Map", "level2_map")],
)
def test_a_table_is_named_after_its_class_unless_it_says_otherwise(class_name: str, table_name: str) -> None:
    assert type(Table)(class_name, (Table,), {}).__table_name__ == table_name


def test_a_class_can_share_fields_and_indexes_with_others() -> None:
    class Stamped(Table):
        made_at: float
        by_made_at = index("made_at")

    class Note(Stamped):
        text: str

    table = compile_schema([Note], LIMITS).table_of(Note)
    assert [field.name for field in table.fields] == ["made_at", "text"]
    assert list(table.indexes_by_name) == [BY_CREATION_TIME, "by_made_at"]
    assert table.name == "note"
    assert Note.by_made_at.document_type is Note


def test_a_compiled_field_says_how_it_is_stored() -> None:
    field_by_name = {field.name: field for field in PLAYERS.fields}
    assert (field_by_name["game_id"].id_table, field_by_name["name"].id_table) == ("games", None)
    assert field_by_name["level"].make_default() == 0
    assert field_by_name["tags"].make_default() == []
    assert not field_by_name["name"].has_default
    assert [(c.name, c.rank, c.is_nullable) for c in PLAYERS.indexes_by_name["by_key_serial"].columns] == [
        ("key", None, True),
        ("serial", NUMBER, True),
        ("_creation", NUMBER, False),
    ]


def test_a_schema_finds_tables_by_class_and_ids_by_class_name() -> None:
    assert SCHEMA.tables_by_name == {"players": PLAYERS, "games": GAMES}
    assert SCHEMA.tag_of_class("Game") == GAMES.id_tag
    with pytest.raises(KeyError):
        SCHEMA.tag_of_class("Missing")

    class Game(Table, name="games"):  # the same name, after a reload
        title: str

    with pytest.raises(SchemaError, match="Game is not a table of this schema"):
        SCHEMA.table_of(Game)


def test_a_stored_document_carries_the_id_it_was_given() -> None:
    stored = PLAYERS.with_id(player(id="", creation_time=0.0), PLAYER_ID, 5.0)
    assert (stored.id, stored.creation_time, stored.name) == (PLAYER_ID, 5.0, "a")


@pytest.mark.slow
def test_a_type_checker_knows_the_document_of_an_index(tmp_path: Path) -> None:
    module = tmp_path / "app.py"
    module.write_text(
        "from typing import TypeVar\n"
        "from engine.ids import Id\n"
        "from engine.schema import Index, Table, index\n"
        "T = TypeVar('T', bound=Table)\n"
        "class User(Table, name='users'):\n"
        "    name: str\n"
        "    age: int = 0\n"
        "    by_name = index('name')\n"
        "def query(source: type[T] | Index[T]) -> T: ...\n"
        "reveal_type(query(User.by_name))\n"
        "reveal_type(query(User))\n"
        "reveal_type(User(name='a').id)\n"
        "User('a')\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path), str(module)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    notes = [line.partition("app.py:")[2] for line in done.stdout.splitlines() if "app.py" in line]
    assert [note for note in notes if "note: Revealed" in note] == [
        '10: note: Revealed type is "app.User"',
        '11: note: Revealed type is "app.User"',
        '12: note: Revealed type is "engine.ids.Id[app.User]"',
    ]
    assert [note for note in notes if note.startswith("13: error")], notes


# -- what is refused at start


def declare(_name: str = "Thing", _table: str = "", /, **body: Any) -> type[Table]:
    annotations = {name: body.pop(name) for name in list(body) if not name.startswith("by_")}
    cls: type[Table] = type(Table)(_name, (Table,), {"__annotations__": annotations, **body}, name=_table)
    return cls


class Cat(msgspec.Struct):
    name: str


class Dog(msgspec.Struct):
    name: str


class Wrong(Table, name="wrong"):
    level: int = "high"  # type: ignore[assignment]


class WrongFactory(Table, name="wrong"):
    tags: list[str] = msgspec.field(default_factory=lambda: [1])  # type: ignore[list-item]


class Unknown(Table, name="unknown"):
    other: "Missing"  # type: ignore[name-defined]  # noqa: F821


MissingId = Id["Missing"]  # type: ignore[name-defined]


class AnnotatedIndex(Table, name="annotated"):
    name: str
    by_name: Any = index("name")


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ([declare(a=int, by_b=index("b"))], r"^thing\.by_b: there is no field 'b'\. The fields are a\."),
        ([declare(a=list[int], by_a=index("a"))], r"^thing\.by_a: 'a' cannot be indexed: it is list\[int\]\. Index"),
        ([declare(a=bool | int, by_a=index("a"))], r"^thing\.by_a: 'a' cannot be indexed: it is bool or int\."),
        ([declare(a=int, by_a=index())], r"^thing\.by_a: an index has 1 to 16 fields, not 0\."),
        (
            [declare(**{f"f{n}": int for n in range(17)}, by_f=index(*(f"f{n}" for n in range(17))))],
            "an index has 1 to 16 fields, not 17",
        ),
        ([declare(a=int, by_a=index("a", "a"))], r"^thing\.by_a: a field is named twice\."),
        ([declare(a=int, by_a=index("a", "creation_time"))], r"Leave out 'creation_time'\."),
        ([declare(a=int, by_a=index("a"), by_b=unique("a"))], r"^thing\.by_b: thing\.by_a has the same fields\."),
        ([declare(a=int, by_a=index("a"), by_A=index("a"))], r"^thing\.by_A: no name for an index, or taken"),
        ([declare(a=int, by_creation_time=index("a"))], r"^thing\.by_creation_time: no name for an index, or taken"),
        (
            [declare(**{f"f{n}": int for n in range(33)}, **{f"by_{n}": index(f"f{n}") for n in range(33)})],
            f"^thing: 33 indexes, {INDEX_COUNT_MAX} allowed",
        ),
        ([AnnotatedIndex], r"^annotated\.by_name: write an index without an annotation: by_name = index\(…\)\."),
        ([declare(id=str)], r"^thing\.id: every document has this field"),
        ([declare(creation_time=float)], r"^thing\.creation_time: every document has this field"),
        ([declare(_a=int)], r"^thing\._a: no field name\. Names are ASCII letters"),
        ([declare(größe=int)], r"^thing\.größe: no field name"),
        ([declare(**{"a" * 65: int})], "no field name.*at most 64 characters"),
        ([declare(name=str, Name=str)], r"^thing: 'name' and 'Name' are one column"),
        ([declare(Id=str)], r"^thing: 'id' and 'Id' are one column"),
        ([declare("Thing", "my things")], "^Thing: 'my things' is no table name"),
        ([declare("Thing", "_things")], "^Thing: '_things' is no table name.*begin with '_' or 'sqlite_' are taken"),
        ([declare("Thing", "SQLite_things")], "is no table name"),
        ([declare("Thing", "things"), declare("Other", "Things")], "^Thing and Other are both the table 'Things'"),
        ([declare("Thing", "things"), declare("Thing", "others")], "^two tables have the class name Thing"),
        ([declare(a=MissingId), Game], r"^thing\.a: Id\['Missing'\] names no table\..* are Game, Thing\."),
        ([declare(a=dict[str, list[MissingId]])], r"^thing\.a: Id\['Missing'\] names no table"),
        ([Unknown], "^unknown: name 'Missing' is not defined"),
        ([declare(a=set[int])], r"^thing\.a: .* has no form on the wire"),
        ([declare(a=Cat | Dog)], r"^thing\.a: Cat and Dog cannot be told apart on the wire"),
        ([Wrong], r"^wrong\.level: its default does not fit: expected int, got 'high'"),
        ([WrongFactory], r"^wrong\.tags: its default does not fit: \[0\]: expected str, got 1"),
    ],
)
def test_a_wrong_declaration_is_refused_with_its_place(types: list[type[Table]], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        compile_schema(types, LIMITS)


def test_too_many_fields_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"^thing: 3 fields, 2 allowed\."):
        compile_schema([declare(a=int, b=int, c=int)], Limits(object_field_count_max=2))


def test_two_tables_whose_ids_would_look_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.schema.compiler.table_tag", lambda table: "0000")
    with pytest.raises(SchemaError, match="the tables 'games' and 'thing' would have the same id tag"):
        compile_schema([Game, declare()], LIMITS)


def test_tables_of_the_engine_may_have_names_that_apps_may_not() -> None:
    class Job(Table, name="_jobs", system=True):
        path: str

    assert compile_schema([Job], LIMITS).table_of(Job).is_system


# -- which documents fit


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"level": 2**63 - 1, "serial": -(2**63), "ratio": -inf, "is_active": False, "photo": b"\xff", "rank": "high"},
        {"ratio": 5},
        {"ratio": -0.0},
        {"key": "x"},
        {"key": 7},
        {"name": "\U0001f600"},
        {"name": "nul \0"},
        {"tags": ["a"], "address": Address("x", 1), "friends": [PLAYER_ID], "percent": 100},
        {"extra": {"a": [nan, -0.0, 2**60, b"x", None, True]}},
        {"extra": [[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]},
    ],
    ids=repr,
)
def test_a_document_that_fits_is_accepted(fields: dict[str, Any]) -> None:
    PLAYERS.check(player(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": 5}, r"players\.name: expected str, got 5"),
        ({"name": None}, r"players\.name: expected str, got null"),
        ({"name": "\ud800"}, r"players\.name: the text holds a lone surrogate"),
        ({"level": True}, r"players\.level: expected int, got true"),
        ({"level": 1.0}, r"players\.level: expected int, got 1\.0"),
        ({"level": 2**63}, r"players\.level: expected an integer of 64 bits, got 9223372036854775808"),
        ({"serial": -(2**63) - 1}, r"players\.serial: expected "),
        ({"ratio": nan}, r"players\.ratio: NaN has no place in the order of a column"),
        ({"ratio": 2**53 + 1}, r"players\.ratio: expected float, got 9007199254740993"),
        ({"ratio": True}, r"players\.ratio: expected float, got true"),
        ({"is_active": 1}, r"players\.is_active: expected bool, got 1"),
        ({"photo": "x"}, r"players\.photo: expected bytes, got 'x'"),
        ({"rank": "middle"}, r"players\.rank: expected one of 'low', 'high', got 'middle'"),
        ({"name": Color.RED}, r"players\.name: expected str, got a Color\. Give the plain value"),
        ({"key": Color.RED}, r"players\.key: expected str or int or null, got a Color"),
        ({"key": 1.5}, r"players\.key: expected str or int or null, got 1\.5"),
        ({"tags": ("a",)}, r"players\.tags: expected list\[str\], got a tuple of 1 items"),
        ({"tags": ["a", 1]}, r"players\.tags\[1\]: expected str, got 1"),
        ({"tags": ["a"] * 8193}, r"players\.tags: 8,193 items, 8,192 allowed"),
        ({"address": {"street": "x"}}, r"players\.address: expected Address or null, got an object"),
        ({"address": Address(5)}, r"players\.address\.street: expected str, got 5"),  # type: ignore[arg-type]
        ({"percent": 101}, r"players\.percent: expected int .*, got 101"),
        ({"extra": {"$a": 1}}, r"players\.extra: the key '\$a' cannot be sent"),
        ({"extra": object()}, r"players\.extra: expected a value that the wire knows"),
        ({"extra": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}, r"players\.extra: the value nests deeper than 15 levels"),
        ({"game_id": "x"}, r"players\.game_id: expected Id\[Game\], got 'x'"),
        ({"game_id": PLAYER_ID}, r"players\.game_id: expected Id\[Game\], got "),
        ({"friends": [PLAYER_ID, GAME_ID]}, r"players\.friends.*: expected Id\[Player\], got "),
    ],
)
def test_a_document_that_does_not_fit_is_refused_with_its_field_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidDocument, match=f"^{message}"):
        PLAYERS.check(player(**fields))


def test_a_document_of_another_table_does_not_fit() -> None:
    with pytest.raises(InvalidDocument, match=r"players: expected a document of Player, got Game"):
        PLAYERS.check(Game(title="x"))


# -- keys


@given(name=texts, key=st.none() | texts | int64s, serial=st.none() | int64s)
def test_the_key_of_a_document_is_that_of_its_values(name: str, key: str | int | None, serial: int | None) -> None:
    document = player(name=name, key=key, serial=serial)
    indexes = PLAYERS.indexes_by_name
    assert indexes["by_game_name"].key_of(document) == full_key([GAME_ID, name], TICK)
    assert indexes["by_key_serial"].key_of(document) == full_key([key, serial], TICK)
    assert indexes[BY_CREATION_TIME].key_of(document) == full_key([], TICK)
