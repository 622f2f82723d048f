"""Documents as rows: what is stored comes back, and what SQLite refuses is said in the schema's words."""

from collections.abc import Iterator
from contextlib import closing
from math import copysign, inf
from typing import Any, Literal, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InternalError, UniqueViolation
from engine.ids import Id, creation_time_of, make_id
from engine.limits import Limits
from engine.schema import Table, compile_schema, index, unique
from engine.storage import ddl
from engine.storage.connections import TEMPORARY, Database, WriterConnection
from engine.storage.rows import RowCodec
from engine.values import Int64
from tests.strategies import int64s, texts, values

TICK = 1_790_812_800_000 * 4096


class Address(msgspec.Struct, frozen=True):
    street: str
    number: int | None = None


class Team(Table, name="teams"):
    pass


class Player(Table, name="players"):
    team_id: Id[Team]
    name: str
    nickname: str | None = None
    level: int = 0
    serial: Int64 = 0
    ratio: float = 0.0
    rating: float | None = None
    is_active: bool = True
    is_admin: bool | None = None
    photo: bytes = b""
    rank: Literal["low", "high"] = "low"
    key: str | int | float | bytes | None = None
    tags: list[str] = []
    address: Address | None = None
    extra: Any = None

    by_team_name = unique("team_id", "name")
    by_level = index("level")
    by_nickname = unique("nickname")


class Store(NamedTuple):
    writer: WriterConnection
    codec: RowCodec[Player]

    def insert(self, document: Player, number: int = 1) -> Player:
        table = self.codec.table
        tick = TICK + number
        document = table.with_id(document, make_id(table.id_tag, tick, bytes([number]) * 9), creation_time_of(tick))
        table.check(document)
        self.codec.insert(self.writer, self.codec.encode(document))
        return document

    def get(self, document_id: str) -> Player | None:
        row = self.codec.get(self.writer, document_id)
        return None if row is None else self.codec.decode(row)


SCHEMA = compile_schema([Team, Player], Limits())
TEAM_ID = make_id(SCHEMA.tag_of_class("Team"), TICK, b"team_team")


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with closing(Database.open(TEMPORARY, Limits())) as database:
        ddl.apply_schema(database.writer, SCHEMA)
        yield database


@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    database.writer.begin()
    yield Store(database.writer, RowCodec(SCHEMA.table_of(Player)))
    database.writer.rollback()


floats = st.floats(allow_nan=False)
players = st.builds(
    Player,
    team_id=st.just(TEAM_ID),
    name=texts,
    nickname=st.none() | texts,
    level=int64s,
    serial=int64s,
    ratio=floats | st.integers(-(2**53), 2**53),
    rating=st.none() | floats,
    is_active=st.booleans(),
    is_admin=st.none() | st.booleans(),
    photo=st.binary(max_size=4),
    rank=st.sampled_from(["low", "high"]),
    key=st.none() | texts | int64s | floats | st.binary(max_size=4),
    tags=st.lists(texts, max_size=3),
    address=st.none() | st.builds(Address, texts, st.none() | int64s),
    extra=values,
)


@pytest.mark.slow
@settings(deadline=None)
@given(player=players)
def test_what_is_stored_comes_back(database: Database, player: Player) -> None:
    database.writer.begin()
    try:
        store = Store(database.writer, RowCodec(SCHEMA.table_of(Player)))
        stored = store.insert(player)
        # as text, since NaN nested in a value comes back but equals nothing
        assert repr(store.get(stored.id)) == repr(as_stored(stored))
    finally:
        database.writer.rollback()


def as_stored(player: Player) -> Player:
    """Scalar -0.0 is stored as 0.0, an int in a float field as the float."""
    key = player.key + 0.0 if isinstance(player.key, float) else player.key
    rating = None if player.rating is None else player.rating + 0.0
    return msgspec.structs.replace(player, ratio=player.ratio + 0.0, rating=rating, key=key)


def test_minus_zero_and_infinity(store: Store) -> None:
    stored = store.insert(Player(team_id=TEAM_ID, name="a", ratio=-0.0, rating=-inf, extra=[-0.0]))
    found = store.get(stored.id)
    assert found is not None
    assert copysign(1.0, found.ratio) == 1.0
    assert found.rating == -inf
    assert copysign(1.0, found.extra[0]) == -1.0


def test_a_document_is_found_by_its_whole_id(store: Store) -> None:
    stored = store.insert(Player(team_id=TEAM_ID, name="a"))
    assert store.get(stored.id) == stored
    same_tick = stored.id[:-1] + ("0" if stored.id[-1] != "0" else "1")
    assert store.get(same_tick) is None


def test_an_update_writes_what_differs(store: Store) -> None:
    old = store.insert(Player(team_id=TEAM_ID, name="a", nickname="x"))
    new = msgspec.structs.replace(old, nickname=None, level=7)
    statements: list[str] = []
    store.writer._connection.set_trace_callback(statements.append)
    store.codec.update(store.writer, store.codec.encode(new), store.codec.encode(old))
    store.writer._connection.set_trace_callback(None)
    assert store.get(old.id) == new
    (statement,) = statements
    assert statement.startswith('UPDATE "players" SET "nickname" = NULL, "level" = 7 WHERE')


def test_an_update_that_changes_nothing_runs_no_statement(store: Store) -> None:
    old = store.insert(Player(team_id=TEAM_ID, name="a"))
    statements: list[str] = []
    store.writer._connection.set_trace_callback(statements.append)
    store.codec.update(store.writer, store.codec.encode(old), store.codec.encode(old))
    store.writer._connection.set_trace_callback(None)
    assert statements == []


def test_an_update_without_the_old_row_writes_every_field(store: Store) -> None:
    old = store.insert(Player(team_id=TEAM_ID, name="a"))
    new = msgspec.structs.replace(old, name="b", tags=["x"])
    store.codec.update(store.writer, store.codec.encode(new))
    assert store.get(old.id) == new


def test_a_table_without_fields_holds_documents_too(database: Database) -> None:
    table = SCHEMA.table_of(Team)
    codec: RowCodec[Team] = RowCodec(table)
    team = Team(id=TEAM_ID, creation_time=creation_time_of(TICK))
    row = codec.encode(team)
    database.writer.begin()
    codec.insert(database.writer, row)
    codec.update(database.writer, row)
    assert codec.get(database.writer, TEAM_ID) == row
    assert codec.decode(row) == team
    database.writer.rollback()


def test_a_deleted_row_is_gone(store: Store) -> None:
    stored = store.insert(Player(team_id=TEAM_ID, name="a"))
    store.codec.delete(store.writer, stored.id)
    assert store.get(stored.id) is None


@pytest.mark.parametrize(
    ("name", "nickname", "index_name", "shared"),
    [
        ("a", "other", "by_team_name", {"team_id": TEAM_ID, "name": "a"}),
        ("other", "x", "by_nickname", {"nickname": "x"}),
    ],
)
def test_a_second_document_at_a_unique_place_is_refused_by_name(
    store: Store, name: str, nickname: str, index_name: str, shared: dict[str, Any]
) -> None:
    store.insert(Player(team_id=TEAM_ID, name="a", nickname="x"))
    free = store.insert(Player(team_id=TEAM_ID, name="free"), 2)
    double = Player(team_id=TEAM_ID, name=name, nickname=nickname)
    with pytest.raises(UniqueViolation) as caught:
        store.insert(double, 3)
    assert (caught.value.table, caught.value.index, caught.value.values) == ("players", index_name, shared)
    row = store.codec.encode(SCHEMA.table_of(Player).with_id(double, free.id, free.creation_time))
    with pytest.raises(UniqueViolation) as caught:
        store.codec.update(store.writer, row, store.codec.encode(free))
    assert caught.value.index == index_name
    assert store.get(free.id) == free
    assert store.writer.in_transaction  # the rest of the transaction stands


def test_nulls_are_unlike_each_other_in_a_unique_index(store: Store) -> None:
    store.insert(Player(team_id=TEAM_ID, name="a"), 1)
    store.insert(Player(team_id=TEAM_ID, name="b"), 2)


def test_two_documents_with_one_tick_are_a_bug_of_ours(store: Store) -> None:
    store.insert(Player(team_id=TEAM_ID, name="a"), 1)
    with pytest.raises(InternalError, match=r"UNIQUE constraint failed: players\._creation"):
        store.insert(Player(team_id=TEAM_ID, name="b"), 1)


def test_the_size_of_a_row_grows_with_its_text_in_bytes(store: Store) -> None:
    def size(**fields: Any) -> int:
        player = Player(**{"id": TEAM_ID, "team_id": TEAM_ID, "name": "", **fields})
        return store.codec.size_of_row(store.codec.encode(player))

    assert size(name="x" * 100) - size() == 100
    assert size(name="é" * 100) - size() == 200
    assert size(photo=b"x" * 100) - size() == 100
    assert size(tags=["x" * 100]) - size() >= 100
    assert size(key="é" * 100) - size(key="") == 200
    assert 200 < size() < 600
