"""Shadow tables follow the schema: made of the rows that are there, made anew when they change, kept by a copy."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from engine.errors import SchemaError
from engine.ids import creation_time_of, make_id
from engine.limits import Limits
from engine.schema import AggregateDeclaration, DeletedAt, IndexDeclaration, Table, aggregate, compile_schema, index
from engine.storage import ddl, shadows
from engine.storage.connections import TEMPORARY, Database, WriterConnection
from engine.storage.rows import RowCodec
from engine.values.wire import INT64_MAX

ROW_COUNT = 2_500  # more than two pages
INDEX = {"by_score": index("game", "score", ranked=True)}
TOTALS = {"games": aggregate("game", sum=("score",)), "all_games": aggregate()}
FIELDS = {"game": (str, ""), "score": (int, 0), "note": (str | None, None)}


@pytest.fixture
def writer() -> Iterator[WriterConnection]:
    with closing(Database.open(TEMPORARY, Limits())) as database:
        yield database.writer


def plays(**body: Any) -> type[Table]:
    """The class of the table: a type and a default for each field, and the declarations."""
    annotations = {
        name: declared[0]
        for name, declared in body.items()
        if not isinstance(declared, IndexDeclaration | AggregateDeclaration)
    }
    values = {name: declared[1] if name in annotations else declared for name, declared in body.items()}
    cls: type[Table] = type(Table)("Play", (Table,), {"__annotations__": annotations, **values}, name="plays")
    return cls


def apply(writer: WriterConnection, document_type: type[Table]) -> list[str]:
    """Migrate, and check that the shadow tables say what the rows do."""
    schema = compile_schema([document_type], Limits())
    done = ddl.apply_schema(writer, schema)
    shadows.verify(writer, schema.table_of(document_type))
    return done


def fill(writer: WriterConnection, document_type: type[Table], **fields: Any) -> None:
    """Store documents without a thought for the shadow tables, as before there were any."""
    table = compile_schema([document_type], Limits()).table_of(document_type)
    codec: RowCodec[Any] = RowCodec(table)
    writer.begin()
    for tick in range(1, ROW_COUNT + 1):
        document_id = make_id(table.id_tag, tick, b"123456789")
        values = {"game": f"game {tick % 3}", "score": tick % 100, **fields}
        document = document_type(id=document_id, creation_time=creation_time_of(tick), **values)
        codec.insert(writer, codec.encode(document))
    writer.commit()


def shadow_tables(writer: WriterConnection) -> list[str]:
    return [name for (name,) in writer.fetch_all("SELECT name FROM sqlite_master WHERE name GLOB 'plays.*' ORDER BY 1")]


def games(writer: WriterConnection) -> list[Any]:
    return writer.fetch_all('SELECT key, count, sum_score FROM "plays.games.totals" ORDER BY key')


def test_they_are_made_with_the_table_and_not_told_of(writer: WriterConnection) -> None:
    assert apply(writer, plays(**FIELDS, **INDEX, **TOTALS)) == ["plays: table added"]
    assert shadow_tables(writer) == [
        "plays.all_games.totals",
        "plays.by_score",
        "plays.by_score.ranks",
        "plays.games.totals",
    ]
    assert apply(writer, plays(**FIELDS, **INDEX, **TOTALS)) == []


def test_they_are_made_of_the_rows_that_are_there(writer: WriterConnection) -> None:
    apply(writer, plays(**FIELDS, by_score=index("game", "score")))
    fill(writer, plays(**FIELDS))
    assert apply(writer, plays(**FIELDS, **INDEX, **TOTALS)) == [
        "plays.games: aggregate added",
        "plays.all_games: aggregate added",
        "plays.by_score: ranks added",
    ]
    assert writer.fetch_all('SELECT * FROM "plays.all_games.totals"') == [("[]", ROW_COUNT)]
    assert games(writer) == writer.fetch_all(
        "SELECT json_array(game), count(*), sum(score) FROM plays GROUP BY game ORDER BY 1"
    )
    nodes = writer.fetch_all('SELECT level, sum(count) FROM "plays.by_score.ranks" GROUP BY level')
    assert nodes
    assert {count for _, count in nodes} == {ROW_COUNT}


def test_they_are_made_anew_when_their_declaration_changes(writer: WriterConnection) -> None:
    apply(writer, plays(**FIELDS, **INDEX, **TOTALS))
    fill(writer, plays(**FIELDS))
    changed = plays(
        **FIELDS,
        by_score=index("score", ranked=True),
        games=aggregate("game", "note", sum=("score",)),
        all_games=aggregate(sum=("score",)),
    )
    assert apply(writer, changed) == [
        "plays.by_score: index changed",
        "plays.games: aggregate changed",
        "plays.all_games: aggregate changed",
        "plays.by_score: ranks changed",
    ]


def test_a_name_can_go_from_an_aggregate_to_an_index(writer: WriterConnection) -> None:
    apply(writer, plays(**FIELDS, games=aggregate("game", sum=("score",))))
    fill(writer, plays(**FIELDS))
    assert apply(writer, plays(**FIELDS, games=index("game", "score", ranked=True))) == [
        "plays.games: index added",
        "plays.games: aggregate dropped",
        "plays.games: ranks added",
    ]
    assert apply(writer, plays(**FIELDS, games=aggregate("game", sum=("score",)))) == [
        "plays.games: index dropped",
        "plays.games: ranks dropped",
        "plays.games: aggregate added",
    ]


def test_they_go_with_their_declaration(writer: WriterConnection) -> None:
    apply(writer, plays(**FIELDS, **INDEX, **TOTALS))
    assert apply(writer, plays(**FIELDS, by_score=index("game", "score"))) == [
        "plays.games: aggregate dropped",
        "plays.all_games: aggregate dropped",
        "plays.by_score: ranks dropped",
    ]
    assert shadow_tables(writer) == ["plays.by_score"]


def test_a_copy_of_the_table_keeps_them_right(writer: WriterConnection) -> None:
    apply(writer, plays(**FIELDS, **INDEX, **TOTALS))
    fill(writer, plays(**FIELDS), note="n")
    apply(writer, plays(**FIELDS))
    apply(writer, plays(**FIELDS, **INDEX, **TOTALS))
    before = games(writer)
    # the table is copied: for a field that they do not look at, then for the one that they are about
    changed = FIELDS | {"note": (str | int, "")}
    assert apply(writer, plays(**changed, **INDEX, **TOTALS)) == ["plays.note: type changed to str or int"]
    assert games(writer) == before
    changed |= {"score": (int | None, None), "game": (str | int, "")}
    assert apply(writer, plays(**changed, **INDEX, **TOTALS)) == [
        "plays.game: type changed to str or int",
        "plays.score: type changed to int or null",
        "plays.games: aggregate changed",
        "plays.by_score: ranks changed",
    ]
    assert games(writer) == before


def test_rows_that_are_deleted_from_now_on_no_longer_count(writer: WriterConnection) -> None:
    fields = FIELDS | {"deleted_at": (float | None, None)}
    apply(writer, plays(**fields, **INDEX, **TOTALS))
    fill(writer, plays(**fields))
    apply(writer, plays(**fields))
    writer.execute("UPDATE plays SET deleted_at = 1 WHERE game = 'game 1'")
    apply(writer, plays(**fields, **INDEX, **TOTALS))
    assert len(games(writer)) == 3
    apply(writer, plays(**FIELDS, deleted_at=(DeletedAt, None), **INDEX, **TOTALS))
    assert [key for key, _, _ in games(writer)] == ['["game 0"]', '["game 2"]']
    apply(writer, plays(**fields, **INDEX, **TOTALS))
    assert len(games(writer)) == 3


def test_a_sum_that_does_not_fit_is_a_schema_error_and_changes_nothing(writer: WriterConnection) -> None:
    apply(writer, plays(**FIELDS))
    fill(writer, plays(**FIELDS), score=INT64_MAX)
    with pytest.raises(SchemaError, match=r"plays\.games: the sum of 'score' would not fit 64 bits"):
        apply(writer, plays(**FIELDS, **INDEX, **TOTALS))
    assert shadow_tables(writer) == []
    assert apply(writer, plays(**FIELDS)) == []
