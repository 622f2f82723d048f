"""What an app may declare as a foreign key, and what it is told when it may not."""

from typing import Any

import pytest

from engine.errors import SchemaError
from engine.functions.jobs import ScheduledJob
from engine.ids import Id
from engine.limits import Limits
from engine.schema import DeletedAt, Table, compile_schema, foreign_key, index, unique


class Game(Table, name="games"):
    title: str


class Team(Table, name="teams"):
    name: str
    deleted_at: DeletedAt = None


class Player(Table, name="players"):
    game_id: Id["Game"]
    team_id: Id["Team"] | None = None
    captain_id: Id["Player"] | None = None
    name: str
    tags: list[str] = []
    by_game_name = unique("game_id", "name")
    by_team = index("team_id")
    by_captain = index("captain_id")
    game = foreign_key("game_id", on_delete="cascade")
    team = foreign_key("team_id", on_delete="set_null")
    captain = foreign_key("captain_id")


def test_a_table_knows_whom_its_documents_name_and_who_names_them() -> None:
    schema = compile_schema([Game, Team, Player], Limits())
    games, teams, players = (schema.table_of(table) for table in (Game, Team, Player))
    assert [(key.field, key.parent, key.on_delete, key.index.name) for key in players.foreign_keys] == [
        ("game_id", "games", "cascade", "by_game_name"),
        ("team_id", "teams", "set_null", "by_team"),
        ("captain_id", "players", "restrict", "by_captain"),
    ]
    assert [table.child_keys for table in (games, teams, players)] == [(key,) for key in players.foreign_keys]
    assert games.foreign_keys == ()


def test_a_foreign_key_is_inherited_with_its_field() -> None:
    class Goalkeeper(Player, name="goalkeepers"):
        hands: int = 2

    schema = compile_schema([Game, Team, Player, Goalkeeper], Limits())
    assert [key.field for key in schema.table_of(Goalkeeper).foreign_keys] == ["game_id", "team_id", "captain_id"]
    assert [key.table for key in schema.table_of(Game).child_keys] == ["players", "goalkeepers"]


def table(annotation: Any, **body: Any) -> type[Table]:
    annotations = {"game_id": annotation, "other_id": Id["Game"]}
    return type(Table)("Child", (Table,), {"__annotations__": annotations, **body}, name="children")


@pytest.mark.parametrize(
    ("annotation", "body", "told"),
    [
        (Id["Game"], {"game": foreign_key("game")}, "there is no field 'game'. The fields are game_id, other_id"),
        (
            Id["Game"],
            {"game": foreign_key("game_id", on_delete="nothing")},  # type: ignore[arg-type]
            "on_delete is 'restrict', 'cascade', 'set_null', not 'nothing'",
        ),
        (str, {"game": foreign_key("game_id")}, "'game_id' is str. A foreign key is an Id[T] or an Id[T] | None"),
        (
            list[Id["Game"]],
            {"game": foreign_key("game_id")},
            "'game_id' is list[Id[Game]]. A foreign key is an Id[T] or an Id[T] | None",
        ),
        (
            Id["Game"] | int,
            {"game": foreign_key("game_id")},
            "A foreign key is an Id[T] or an Id[T] | None",
        ),
        (
            Id["Game"],
            {"by_game": index("game_id"), "game": foreign_key("game_id", on_delete="set_null")},
            "on_delete=\"set_null\" needs a field that may be None. Declare 'game_id' as Id[Game] | None",
        ),
        (
            Id["Game"],
            {"by_other": index("other_id", "game_id"), "game": foreign_key("game_id")},
            "none begins with 'game_id'. Declare one: by_game_id = index(\"game_id\")",
        ),
        (
            Id["ScheduledJob"],
            {"by_game": index("game_id"), "game": foreign_key("game_id")},
            "_scheduled_jobs is the engine's own table",
        ),
        (
            Id["Game"],
            {"by_game": index("game_id"), "game": foreign_key("game_id"), "again": foreign_key("game_id")},
            "children.again: 'game_id' has a foreign key already",
        ),
    ],
)
def test_a_foreign_key_that_cannot_be_is_refused(annotation: Any, body: dict[str, Any], told: str) -> None:
    with pytest.raises(SchemaError) as refused:
        compile_schema([table(annotation, **body), Game, Team, ScheduledJob], Limits())
    assert told in str(refused.value)
    assert str(refused.value).startswith("children.")


def test_a_foreign_key_has_no_annotation() -> None:
    class Child(Table):
        game_id: Id["Game"]
        game: Any = foreign_key("game_id")

    with pytest.raises(SchemaError, match=r"child.game: write a foreign key without an annotation: game = foreign_key"):
        compile_schema([Child, Game], Limits())
