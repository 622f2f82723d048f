"""`aggregate(...)` and `index(..., ranked=True)`: what is compiled of them, and which declarations are refused."""

from typing import Annotated, Any, Literal

import msgspec
import pytest

from engine.errors import SchemaError
from engine.limits import Limits
from engine.ranges import key_prefix
from engine.schema import Aggregate, DeletedAt, Table, TableSchema, aggregate, compile_schema, index


class Session(Table, name="sessions"):
    game: str
    active: bool | None = None
    label: str | int = ""
    seconds: int = 0
    bonus: int | None = None
    level: Literal[1, 2] = 1
    capped: Annotated[int, msgspec.Meta(ge=0)] = 0
    tags: list[str] = []
    watching = aggregate("game", "active", sum=("seconds", "bonus"))
    shown = aggregate("label", sum=["level", "capped"], public=True)
    everything = aggregate()
    by_seconds = index("game", "seconds", ranked=True)
    by_game = index("game")


def compiled(document_type: type[Table]) -> TableSchema:
    return compile_schema([document_type], Limits()).table_of(document_type)


SESSIONS = compiled(Session)


def test_an_aggregate_knows_its_documents() -> None:
    assert Session.watching == Aggregate(Session, "watching", ("game", "active"), ("seconds", "bonus"))


def test_a_document_is_in_one_cell_of_each_aggregate() -> None:
    watching, shown, everything = SESSIONS.aggregates
    session = Session(game="a", active=True, label=5, seconds=7, level=2, capped=3)
    assert (watching.key_of(session), watching.amounts_of(session)) == (key_prefix(["a", True]), (7, 0))
    assert (shown.key_of(session), shown.amounts_of(session)) == (key_prefix([5]), (2, 3))
    assert (everything.key_of(session), everything.amounts_of(session)) == ((), ())
    assert watching.key_of(Session(game="a")) == key_prefix(["a", None])
    assert [aggregate.is_public for aggregate in SESSIONS.aggregates] == [False, True, False]


def test_only_an_index_that_says_so_is_ranked_and_never_with_deleted_documents() -> None:
    class Note(Table):
        rank: int
        deleted_at: DeletedAt = None
        by_rank = index("rank", ranked=True)

    assert SESSIONS.ranked_indexes == (SESSIONS.indexes_by_name["by_seconds"],)
    table = compiled(Note)
    assert table.indexes_by_name["by_rank"].is_ranked
    assert not table.indexes_with_deleted["by_rank"].is_ranked


def test_a_class_can_share_its_aggregates_with_others() -> None:
    class Counted(Table):
        kind: str
        kinds = aggregate("kind")

    class Song(Counted):
        title: str

    assert Song.kinds.document_type is Song
    assert [aggregate.name for aggregate in compiled(Song).aggregates] == ["kinds"]


FIELDS = {"game": str, "seconds": int, "ratio": float, "active": bool, "tags": list[str], "mixed": str | int}


@pytest.mark.parametrize(
    ("declarations", "message"),
    [
        ({"a": aggregate("nothing")}, "sessions.a: there is no field 'nothing'. The fields are active, game"),
        ({"a": aggregate("id")}, "sessions.a: there is no field 'id'"),
        ({"a": aggregate("tags")}, "sessions.a: 'tags' cannot be indexed: it is list"),
        ({"a": aggregate("game", "game")}, "sessions.a: a field is named twice"),
        ({"a": aggregate(sum=("seconds", "seconds"))}, "sessions.a: a field is named twice"),
        ({"a": aggregate(sum=("nothing",))}, "sessions.a: there is no field 'nothing'"),
        ({"a": aggregate(sum=("ratio",))}, "sessions.a: 'ratio' cannot be summed: it is float"),
        ({"a": aggregate(sum=("active",))}, "sessions.a: 'active' cannot be summed: it is bool"),
        ({"a": aggregate(sum=("mixed",))}, "sessions.a: 'mixed' cannot be summed"),
        ({"a": aggregate("game", "active"), "b": aggregate("active", "game", sum=("seconds",))},
         "sessions.b: sessions.a has the same fields. Make one of them, with all sums"),
        ({"a": index("game"), "A": aggregate("game")}, "sessions.A: no name for an aggregate, or taken"),
        ({"by_creation_time": aggregate("game")}, "sessions.by_creation_time: no name for an aggregate, or taken"),
        ({"_a": aggregate("game")}, "sessions._a: no name for an aggregate"),
        ({f"a{number}": aggregate() for number in range(33)}, "sessions: 33 aggregates, 32 allowed"),
        ({"a": aggregate(*(f"f{number}" for number in range(17)))}, "sessions.a: 17 fields, 16 allowed"),
        ({"a": aggregate(sum=[f"f{number}" for number in range(17)])}, "sessions.a: 17 fields, 16 allowed"),
    ],
)  # fmt: skip
def test_a_declaration_that_cannot_be_kept_is_refused_in_clear_words(
    declarations: dict[str, Any], message: str
) -> None:
    document_type = type(Table)("Session", (Table,), {"__annotations__": FIELDS, **declarations}, name="sessions")
    with pytest.raises(SchemaError) as refusal:
        compiled(document_type)
    assert str(refusal.value).startswith(message)


def test_a_sum_of_one_field_is_not_a_text() -> None:
    with pytest.raises(SchemaError, match=r"sum='seconds' is a text. Give the names of fields: sum=\('seconds',\)"):
        aggregate("game", sum="seconds")


def test_an_aggregate_has_no_annotation() -> None:
    class Session(Table, name="sessions"):
        watching: int = aggregate("game")  # type: ignore[assignment]

    with pytest.raises(SchemaError, match=r"sessions\.watching: write an aggregate without an annotation"):
        compiled(Session)
