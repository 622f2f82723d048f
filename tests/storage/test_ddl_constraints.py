"""Foreign keys, deleted documents and default factories meet a database that has rows already."""

from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import Any

import msgspec
import pytest

from engine.errors import SchemaError
from engine.ids import Id, creation_time_of, make_id, table_tag
from engine.limits import Limits
from engine.schema import DeletedAt, Table, compile_schema, foreign_key, index, unique
from engine.storage import ddl
from engine.storage.connections import TEMPORARY, Database, WriterConnection
from engine.storage.rows import RowCodec

TICK = 1_790_812_800_000 * 4096
GAME_IDS = [make_id(table_tag("games"), TICK + number, b"123456789") for number in range(3)]


@pytest.fixture
def writer() -> Iterator[WriterConnection]:
    with closing(Database.open(TEMPORARY, Limits())) as database:
        yield database.writer


def _table(class_name: str, name: str, annotations: dict[str, Any], body: dict[str, Any]) -> type[Table]:
    made: type[Table] = type(Table)(class_name, (Table,), {"__annotations__": annotations, **body}, name=name)
    return made


def players(*, has_key: bool = True, keeps_deleted: bool = False, is_unique: bool = False, **body: Any) -> type[Table]:
    """Players of games; with a foreign key, with a field `deleted_at`, and each in one game only, if wanted."""
    annotations: dict[str, Any] = {"game_id": Id["Game"] | None}
    body = {"by_game": unique("game_id") if is_unique else index("game_id"), **body}
    if has_key:
        body["game"] = foreign_key("game_id", on_delete="set_null")
    if keeps_deleted:
        annotations["deleted_at"], body["deleted_at"] = DeletedAt, None
    return _table("Player", "players", annotations, body)


GAME = _table("Game", "games", {}, {})
KEPT_GAME = _table("Game", "games", {"deleted_at": DeletedAt}, {"deleted_at": None})


def apply(writer: WriterConnection, *types: type[Table]) -> list[str]:
    return ddl.apply_schema(writer, compile_schema(types, Limits()))


def insert(writer: WriterConnection, *types: type[Table], **documents: Any) -> str:
    """Store one document of the first of these tables as the number-th ever; its id."""
    codec: RowCodec[Any] = RowCodec(compile_schema(types, Limits()).table_of(types[0]))
    number = documents.pop("number")
    document_id = make_id(codec.table.id_tag, TICK + number, b"123456789")
    document = types[0](id=document_id, creation_time=creation_time_of(TICK + number), **documents)
    codec.insert(writer, codec.encode(document))
    return document_id


def index_statements(writer: WriterConnection) -> list[str]:
    sql = "SELECT sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'players' ORDER BY name"
    return [statement.replace('"', "") for (statement,) in writer.fetch_all(sql)]


# -- foreign keys


def test_a_foreign_key_is_added_where_every_row_names_a_document_that_is_there(writer: WriterConnection) -> None:
    apply(writer, players(has_key=False), GAME)
    insert(writer, GAME, number=0)
    insert(writer, players(has_key=False), GAME, number=1, game_id=GAME_IDS[0])
    insert(writer, players(has_key=False), GAME, number=2, game_id=None)
    assert apply(writer, players(), GAME) == ["players.game_id: foreign key added"]
    assert apply(writer, players(), GAME) == []
    assert apply(writer, players(has_key=False), GAME) == ["players.game_id: foreign key dropped"]


def test_a_foreign_key_is_refused_with_a_row_that_names_a_missing_document(writer: WriterConnection) -> None:
    without, added = players(has_key=False), _table("Team", "teams", {}, {})
    apply(writer, without, GAME)
    insert(writer, GAME, number=1)
    for number, game_id in ((1, GAME_IDS[1]), (2, GAME_IDS[2])):
        player_id = insert(writer, without, GAME, number=number, game_id=game_id)
    with pytest.raises(SchemaError) as refused:
        apply(writer, players(), GAME, added)
    assert str(refused.value) == (
        f"players.game_id: cannot be a foreign key, the row {player_id!r} names {GAME_IDS[2]!r}, which is not in "
        "games. Change or delete such rows first."
    )
    assert apply(writer, without, GAME) == []


def test_every_row_is_looked_at_however_many_there_are(
    writer: WriterConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddl, "_PAGE_ROW_COUNT", 2)
    without = players(has_key=False)
    apply(writer, without, GAME)
    ids = [make_id(table_tag("games"), TICK + number, b"123456789") for number in range(5)]
    for number, game_id in enumerate(ids):
        insert(writer, without, GAME, number=number, game_id=game_id)
        if number != 4:
            insert(writer, GAME, number=number)
    with pytest.raises(SchemaError, match=ids[4]):
        apply(writer, players(), GAME)


def test_a_table_that_comes_back_is_looked_at_again(writer: WriterConnection) -> None:
    apply(writer, players(), GAME)
    insert(writer, GAME, number=0)
    insert(writer, players(), GAME, number=1, game_id=GAME_IDS[0])
    assert apply(writer, GAME) == []
    writer.execute("DELETE FROM games")  # nobody keeps the foreign key of a table that is not declared
    with pytest.raises(SchemaError, match=r"players\.game_id: cannot be a foreign key"):
        apply(writer, players(), GAME)


@pytest.mark.parametrize(
    ("keeps_deleted", "parents", "is_refused"),
    [(False, KEPT_GAME, True), (True, KEPT_GAME, False), (True, GAME, False)],
)
def test_a_deleted_document_is_not_there_and_names_nobody(
    writer: WriterConnection, keeps_deleted: bool, parents: type[Table], is_refused: bool
) -> None:
    without = players(has_key=False, keeps_deleted=keeps_deleted)
    apply(writer, without, parents)
    if parents is KEPT_GAME:
        insert(writer, parents, number=0, deleted_at=5.0)
    deleted = {"deleted_at": 5.0} if keeps_deleted else {}
    insert(writer, without, parents, number=1, game_id=GAME_IDS[0], **deleted)
    wanted = players(keeps_deleted=keeps_deleted)
    if is_refused:
        with pytest.raises(SchemaError, match=r"players\.game_id: cannot be a foreign key"):
            apply(writer, wanted, parents)
    else:
        assert apply(writer, wanted, parents) == ["players.game_id: foreign key added"]


def test_rows_are_looked_at_again_when_deleted_documents_begin_to_count(writer: WriterConnection) -> None:
    kept = players(keeps_deleted=True)
    apply(writer, kept, GAME)
    insert(writer, kept, GAME, number=1, game_id=GAME_IDS[0], deleted_at=5.0)
    counting = _table(
        "Player",
        "players",
        {"game_id": Id["Game"] | None, "deleted_at": float | None},
        {"deleted_at": None, "by_game": index("game_id"), "game": foreign_key("game_id", on_delete="set_null")},
    )
    with pytest.raises(SchemaError, match=r"players\.game_id: cannot be a foreign key"):
        apply(writer, counting, GAME)


# -- tables where deleted documents stay


def test_deleted_documents_have_indexes_of_their_own(writer: WriterConnection) -> None:
    apply(writer, players(keeps_deleted=True, is_unique=True), GAME)
    assert index_statements(writer) == [
        "CREATE INDEX players.by_creation_time ON players (_creation) WHERE deleted_at IS NULL",
        "CREATE UNIQUE INDEX players.by_game ON players (game_id) WHERE deleted_at IS NULL",
        "CREATE INDEX players.by_game+deleted ON players (game_id) WHERE deleted_at IS NOT NULL",
    ]


def test_a_table_begins_and_ceases_to_keep_deleted_documents(writer: WriterConnection) -> None:
    apply(writer, players(), GAME)
    insert(writer, players(), GAME, number=1, game_id=None)
    plain = index_statements(writer)
    apply(writer, players(keeps_deleted=True), GAME)
    assert len(index_statements(writer)) == 3
    assert apply(writer, players(keeps_deleted=True), GAME) == []
    apply(writer, players(), GAME)
    assert index_statements(writer) == plain == ["CREATE INDEX players.by_game ON players (game_id)"]


def test_a_table_with_deleted_documents_does_not_cease_to_keep_them(writer: WriterConnection) -> None:
    kept = players(keeps_deleted=True)
    apply(writer, kept, GAME)
    player_id = insert(writer, kept, GAME, number=1, game_id=None, deleted_at=5.0)
    with pytest.raises(SchemaError, match=rf"players\.deleted_at: the field is gone, but the row '{player_id}' has 5"):
        apply(writer, players(), GAME)


def test_only_documents_that_are_there_need_to_be_unlike_each_other(writer: WriterConnection) -> None:
    kept, wanted = players(keeps_deleted=True), players(keeps_deleted=True, is_unique=True)
    apply(writer, kept, GAME)
    insert(writer, GAME, number=0)
    for number, deleted_at in ((1, 5.0), (2, None), (3, 6.0)):
        insert(writer, kept, GAME, number=number, game_id=GAME_IDS[0], deleted_at=deleted_at)
    assert apply(writer, wanted, GAME) == ["players.by_game: index changed"]
    apply(writer, kept, GAME)
    insert(writer, kept, GAME, number=4, game_id=GAME_IDS[0], deleted_at=None)
    with pytest.raises(SchemaError, match=r"players\.by_game: cannot be unique"):
        apply(writer, wanted, GAME)


# -- default factories


def grown(factory: Any) -> type[Table]:
    annotations = {"game_id": Id["Game"] | None, "number": int | list[int]}
    body = {"by_game": index("game_id"), "number": msgspec.field(default_factory=factory)}
    return _table("Player", "players", annotations, body)


def numbers_of(writer: WriterConnection) -> list[Any]:
    return [
        msgspec.json.decode(text) for (text,) in writer.fetch_all('SELECT "number" FROM players ORDER BY _creation')
    ]


def test_a_default_factory_gives_each_row_its_own_value(writer: WriterConnection) -> None:
    without = players(has_key=False)
    apply(writer, without, GAME)
    for number in (1, 2, 3):
        insert(writer, without, GAME, number=number, game_id=None)
    numbers = count()
    assert apply(writer, grown(lambda: next(numbers)), GAME) == ["players.number: field added"]
    assert sorted(set(numbers_of(writer))) == sorted(numbers_of(writer))
    assert len(numbers_of(writer)) == 3
    assert index_statements(writer) == ["CREATE INDEX players.by_game ON players (game_id)"]


def test_an_empty_list_for_every_row_writes_none(writer: WriterConnection) -> None:
    without = players(has_key=False)
    apply(writer, without, GAME)
    insert(writer, without, GAME, number=1, game_id=None)
    change_count = writer._connection.total_changes
    apply(writer, grown(list), GAME)
    assert numbers_of(writer) == [[]]
    assert writer._connection.total_changes == change_count + 1  # the description


def test_a_factory_that_gives_a_row_what_does_not_fit_is_refused(writer: WriterConnection) -> None:
    without = players(has_key=False)
    apply(writer, without, GAME)
    for number in (1, 2, 3):
        insert(writer, without, GAME, number=number, game_id=None)
    values = iter([1, 2, "three"])  # one for the check of the schema
    with pytest.raises(SchemaError, match=r"players\.number: its default does not fit: expected int or list\[int\]"):
        apply(writer, grown(lambda: next(values)), GAME)
    assert apply(writer, without, GAME) == []
