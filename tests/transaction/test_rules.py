"""Foreign keys and deleted documents: each rule for each operation, then any history against a naive model."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import (
    ConstraintViolation,
    DocumentNotFound,
    ForeignKeyViolation,
    FunctionMisuse,
    InvalidDocument,
    LimitExceeded,
    UniqueViolation,
)
from engine.ids import Id, make_id, table_tag
from engine.limits import Limits
from engine.schema import DeletedAt, Table, TableSchema, UpdatedAt, compile_schema, foreign_key, index, unique
from engine.storage.connections import TEMPORARY, Database
from engine.storage.ddl import apply_schema
from engine.storage.rows import RowCodec
from engine.testing import ManualClock
from engine.transaction.reading import Catalog, Fire
from engine.transaction.rules import Change
from engine.transaction.transaction import TickSource, WriteTransaction
from engine.transaction.write_set import WriteSet


class Game(Table, name="games"):
    title: str = ""


class Player(Table, name="players"):
    game_id: Id["Game"] | None = None
    team_id: Id["Team"] | None = None
    captain_id: Id["Player"] | None = None
    by_game = index("game_id")
    by_team = index("team_id")
    by_captain = index("captain_id")
    game = foreign_key("game_id", on_delete="cascade")
    team = foreign_key("team_id", on_delete="set_null")
    captain = foreign_key("captain_id")


class Team(Table, name="teams"):
    game_id: Id["Game"] | None = None
    by_game = index("game_id")
    game = foreign_key("game_id", on_delete="cascade")


class Note(Table, name="notes"):
    """Of a game; deleted ones stay."""

    game_id: Id["Game"] | None = None
    answers_id: Id["Note"] | None = None
    text: str = ""
    slug: str | None = None
    updated_at: UpdatedAt = 0.0
    deleted_at: DeletedAt = None
    by_game = index("game_id")
    by_answers = index("answers_id")
    by_slug = unique("slug")
    game = foreign_key("game_id", on_delete="cascade")
    answers = foreign_key("answers_id", on_delete="cascade")


MISSING_GAME = make_id(table_tag("games"), 1, b"123456789")
TABLES = (Game, Player, Team, Note)


class Store:
    """A database, and mutations in it one after another; all of it is undone at the end."""

    def __init__(self, database: Database, tables: tuple[type[Table], ...], limits: Limits) -> None:
        self.database, self.limits, self.clock = database, limits, ManualClock()
        self.schema = compile_schema(tables, limits)
        apply_schema(database.writer, self.schema)
        self.codecs: list[RowCodec[Any]] = [RowCodec(table) for table in self.schema.tables_by_name.values()]
        self.ticks = TickSource(self.clock, 0)
        self.fire: Fire | None = None
        database.writer.begin()

    def mutation(self) -> WriteTransaction:
        """A transaction as a mutation has it; its triggers, on all tables, are `fire`."""
        triggered = self.schema.tables_by_name if self.fire is not None else ()
        catalog = Catalog(self.codecs, triggered=triggered, fire=self.fire)
        return WriteTransaction(self.database.writer, catalog, self.limits, self.ticks, self.clock)

    def content(self) -> dict[str, Table]:
        """All documents by their ids, deleted ones too."""
        found: dict[str, Table] = {}
        for codec in self.codecs:
            sql = f'SELECT {codec.columns_sql} FROM "{codec.table.name}" ORDER BY _creation'
            found |= {row[1]: codec.decode(row) for row in self.database.writer.fetch_all(sql)}
        return found

    def reset(self) -> None:
        self.database.writer.rollback()
        self.database.writer.begin()
        self.fire = None


@pytest.fixture(scope="module")
def opened() -> Iterator[Store]:
    with closing(Database.open(TEMPORARY, Limits())) as database:
        yield Store(database, TABLES, Limits())


@pytest.fixture
def store(opened: Store) -> Iterator[Store]:
    yield opened
    opened.reset()


@contextmanager
def changes_nothing(
    store: Store, error: type[Exception], match: str | None = None
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """The block raises, and all documents are as they were."""
    before = store.content()
    with pytest.raises(error, match=match) as raised:
        yield raised
    assert store.content() == before


def written(write_set: WriteSet) -> dict[str, tuple[Table | None, Table | None]]:
    return {write.document_id: (write.old, write.new) for write in write_set}


# -- what is named must be there


@pytest.mark.parametrize("operation", ["insert", "patch", "replace"])
def test_a_document_cannot_name_one_that_is_not_there(store: Store, operation: str) -> None:
    mutation = store.mutation()
    player = mutation.insert(Player())
    writes: dict[str, Callable[[], Any]] = {
        "insert": lambda: mutation.insert(Player(game_id=MISSING_GAME)),
        "patch": lambda: mutation.patch(player, {"game_id": MISSING_GAME}),
        "replace": lambda: mutation.replace(player, Player(game_id=MISSING_GAME)),
    }
    with changes_nothing(store, ForeignKeyViolation) as raised:
        writes[operation]()
    error = raised.value
    assert (error.table, error.field, error.value) == ("players", "game_id", MISSING_GAME)
    assert isinstance(error, ConstraintViolation)
    assert f"there is no document {MISSING_GAME!r} in games" in str(error)


def test_a_document_may_name_one_that_is_there_itself_or_none(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    player = mutation.insert(Player(game_id=game))
    mutation.patch(player, {"captain_id": player})
    mutation.replace(player, Player(game_id=None, captain_id=player))
    assert store.content()[player].captain_id == player  # type: ignore[attr-defined]


def test_a_name_that_stays_is_not_looked_up_again(store: Store) -> None:
    mutation = store.mutation()
    player = mutation.insert(Player(game_id=mutation.insert(Game())))
    statements: list[str] = []
    store.database.writer._connection.set_trace_callback(statements.append)
    mutation.patch(player, {"captain_id": None, "team_id": None})
    mutation.patch(player, {"captain_id": player})
    store.database.writer._connection.set_trace_callback(None)
    assert sum("games" in statement for statement in statements) == 0
    assert sum(statement.startswith("SELECT 1 FROM") for statement in statements) == 0  # itself is there


# -- what is deleted


def test_restrict_refuses_and_names_who_names_it(store: Store) -> None:
    mutation = store.mutation()
    captain = mutation.insert(Player())
    player = mutation.insert(Player(captain_id=captain))
    with changes_nothing(store, ForeignKeyViolation) as raised:
        mutation.delete(captain)
    error = raised.value
    assert (error.table, error.field, error.value) == ("players", "captain_id", captain)
    assert f"players.captain_id of {player!r} names {captain!r}" in str(error)
    mutation.delete(player)
    mutation.delete(captain)
    assert store.content() == {}


def test_set_null_lets_go(store: Store) -> None:
    mutation = store.mutation()
    team = mutation.insert(Team())
    player = mutation.insert(Player(team_id=team))
    before = store.content()
    mutation = store.mutation()
    mutation.delete(team)
    after = store.content()
    assert after == {player: msgspec.structs.replace(before[player], team_id=None)}  # type: ignore[type-var]
    assert written(mutation.write_set) == {team: (before[team], None), player: (before[player], after[player])}


def test_a_cascade_deletes_children_and_theirs_and_all_of_it_is_in_the_write_set(store: Store) -> None:
    mutation = store.mutation()
    game, other = mutation.insert(Game()), mutation.insert(Game())
    team = mutation.insert(Team(game_id=game))
    players = [mutation.insert(Player(game_id=game, team_id=team)), mutation.insert(Player(team_id=team))]
    stays = mutation.insert(Player(game_id=other))
    before = store.content()
    mutation = store.mutation()
    mutation.delete(game)
    after = store.content()
    assert after.keys() == {other, stays, players[1]}
    assert after[players[1]].team_id is None  # type: ignore[attr-defined]
    assert written(mutation.write_set) == {
        document_id: (before[document_id], after.get(document_id)) for document_id in (game, team, *players)
    }


def test_documents_that_name_each_other_go_together(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    first = mutation.insert(Player(game_id=game))
    second = mutation.insert(Player(game_id=game, captain_id=first))
    mutation.patch(first, {"captain_id": second})
    with changes_nothing(store, ForeignKeyViolation):
        mutation.delete(first)
    mutation.patch(second, {"captain_id": second})
    mutation.patch(first, {"captain_id": first})
    mutation.delete(second)  # that it names itself keeps nobody
    mutation.patch(first, {"captain_id": mutation.insert(Player(game_id=game, captain_id=first))})
    mutation.delete(game)  # both go, so neither keeps the other
    assert store.content() == {}


def test_answers_to_answers_go_however_deep(store: Store) -> None:
    mutation = store.mutation()
    root = note = mutation.insert(Note())
    for _ in range(3_000):
        note = mutation.insert(Note(answers_id=note))
    mutation.patch(root, {"answers_id": note})
    mutation.delete(root)
    assert all(found.deleted_at is not None for found in store.content().values())  # type: ignore[attr-defined]


def test_a_refused_delete_leaves_nothing_half_done_though_its_caller_goes_on(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    team = mutation.insert(Team(game_id=game))
    captain = mutation.insert(Player(game_id=game, team_id=team))
    mutation.insert(Player(captain_id=captain, team_id=team))
    before = written(mutation.write_set)
    with changes_nothing(store, ForeignKeyViolation):
        mutation.delete(game)
    assert written(mutation.write_set) == before
    mutation.insert(Game())  # and it can go on
    assert len(written(mutation.write_set)) == len(before) + 1


def test_a_cascade_is_bounded_by_the_writes_of_a_mutation_and_refused_before_it_begins(store: Store) -> None:
    mutation = store.mutation()
    games = [mutation.insert(Game()) for _ in range(2)]
    for game, player_count in zip(games, (4, 5), strict=True):
        for _ in range(player_count):
            mutation.insert(Player(game_id=game))
    limits = Limits(write_document_count_max=5)
    mutation = store.mutation()
    mutation.impose(limits, lambda: None)
    mutation.delete(games[0])
    mutation.impose(limits, lambda: None)
    with changes_nothing(store, LimitExceeded, "documents written by one mutation: 6 used, 5 allowed"):
        mutation.delete(games[1])
    assert mutation.write_count == 0


def test_what_lets_go_is_bounded_too(store: Store) -> None:
    mutation = store.mutation()
    team = mutation.insert(Team())
    for _ in range(5):
        mutation.insert(Player(team_id=team))
    mutation.impose(Limits(write_document_count_max=5), lambda: None)
    with changes_nothing(store, LimitExceeded, "documents written by one mutation: 6 used, 5 allowed"):
        mutation.delete(team)


def test_a_cascade_ends_with_the_time_of_its_run(store: Store) -> None:
    class Late(Exception):
        pass

    mutation = store.mutation()
    game = mutation.insert(Game())
    for _ in range(5):
        mutation.insert(Player(game_id=game))
    calls = iter(range(6))

    def check_deadline() -> None:
        if next(calls) == 5:
            raise Late

    mutation.impose(Limits(), check_deadline)
    with changes_nothing(store, Late):
        mutation.delete(game)


# -- deleted documents that stay


def test_a_deleted_document_is_absent_but_for_who_asks_with_deleted(store: Store) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note(text="a"))
    mutation = store.mutation()
    mutation.delete(note)
    assert mutation.get(note) is None
    found = mutation.get(note, with_deleted=True)
    assert isinstance(found, Note)
    assert (found.text, found.deleted_at) == ("a", mutation.now)
    for write in (
        lambda: mutation.patch(note, {"text": "b"}),
        lambda: mutation.replace(note, Note()),
        lambda: mutation.delete(note),
    ):
        with changes_nothing(store, DocumentNotFound):
            write()


def test_a_deleted_document_may_be_changed_with_deleted_and_stays_deleted(store: Store) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note(text="a"))
    mutation.delete(note)
    deleted_at = mutation.now
    mutation = store.mutation()
    mutation.patch(note, {"text": "b"}, with_deleted=True)
    mutation.replace(note, Note(text="c"), with_deleted=True)
    found = store.content()[note]
    assert (found.text, found.deleted_at, found.updated_at) == ("c", deleted_at, mutation.now)  # type: ignore[attr-defined]


@pytest.mark.parametrize("operation", ["insert", "patch", "replace"])
def test_only_delete_deletes(store: Store, operation: str) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note())
    writes: dict[str, Callable[[], Any]] = {
        "insert": lambda: mutation.insert(Note(deleted_at=5.0)),
        "patch": lambda: mutation.patch(note, {"deleted_at": 5.0}),
        "replace": lambda: mutation.replace(note, Note(deleted_at=5.0)),
    }
    with changes_nothing(store, InvalidDocument) as raised:
        writes[operation]()
    assert (raised.value.table, raised.value.field, raised.value.value) == ("notes", "deleted_at", 5.0)
    assert "Use ctx.db.delete and ctx.db.restore." in str(raised.value)


def test_only_restore_restores(store: Store) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note())
    mutation.delete(note)
    with changes_nothing(store, InvalidDocument, "Use ctx.db.delete and ctx.db.restore"):
        mutation.patch(note, {"deleted_at": None}, with_deleted=True)
    restored = store.mutation()
    restored.restore(note)
    assert restored.get(note) is not None
    count = len(restored.write_set)
    restored.restore(note)  # it is there: nothing to do
    assert len(restored.write_set) == count == 1


def test_a_restored_document_must_name_documents_that_are_there(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    note = mutation.insert(Note(game_id=game))
    mutation.delete(note)
    mutation.delete(game)  # nobody who is there names it
    with changes_nothing(store, ForeignKeyViolation) as raised:
        mutation.restore(note)
    assert (raised.value.table, raised.value.field, raised.value.value) == ("notes", "game_id", game)
    mutation.patch(note, {"game_id": None, "answers_id": note}, with_deleted=True)
    mutation.restore(note)  # it may name itself


def test_a_document_cannot_name_one_that_is_deleted(store: Store) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note())
    mutation.delete(note)
    with changes_nothing(store, ForeignKeyViolation):
        mutation.insert(Note(answers_id=note))


def test_what_is_unique_is_so_among_documents_that_are_there(store: Store) -> None:
    mutation = store.mutation()
    first = mutation.insert(Note(slug="a"))
    mutation.delete(first)
    second = mutation.insert(Note(slug="a"))
    with changes_nothing(store, UniqueViolation) as raised:
        mutation.restore(first)
    assert (raised.value.table, raised.value.field, raised.value.value) == ("notes", "slug", "a")
    assert (raised.value.index, raised.value.values) == ("by_slug", {"slug": "a"})
    mutation.delete(second)
    mutation.restore(first)


def test_purge_removes_for_good_with_all_that_names_it_deleted_or_not(store: Store) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note())
    deleted_answer = mutation.insert(Note(answers_id=note))
    mutation.delete(deleted_answer)
    mutation.insert(Note(answers_id=note))
    stays = mutation.insert(Note())
    mutation.purge(note)
    assert store.content().keys() == {stays}
    mutation.delete(stays)
    mutation.purge(stays)
    assert store.content() == {}
    with pytest.raises(DocumentNotFound):
        mutation.purge(stays)


def test_a_delete_leaves_documents_alone_that_are_deleted_already(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    deleted, there = (mutation.insert(Note(game_id=game)) for _ in range(2))
    mutation.delete(deleted)
    earlier = mutation.now
    mutation = store.mutation()
    mutation.delete(game)
    content = store.content()
    assert content.keys() == {deleted, there}
    assert [content[note].deleted_at for note in (deleted, there)] == [earlier, mutation.now]  # type: ignore[attr-defined]


def test_restore_and_purge_are_of_tables_where_deleted_documents_stay(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    for write in (mutation.restore, mutation.purge):
        with changes_nothing(store, FunctionMisuse, "games: the table has no DeletedAt field"):
            write(game)


# -- the time of the last change


def test_the_time_of_the_last_change_is_kept(store: Store) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note(updated_at=1.0))
    assert store.content()[note].updated_at == mutation.now  # type: ignore[attr-defined]
    writes: list[Callable[[WriteTransaction], None]] = [
        lambda mutation: mutation.patch(note, {"text": "a"}),
        lambda mutation: mutation.patch(note, {"text": "b", "updated_at": 1.0}),
        lambda mutation: mutation.replace(note, Note(text="c", updated_at=2.0)),
    ]
    for write in writes:
        mutation = store.mutation()
        write(mutation)
        assert store.content()[note].updated_at == mutation.now  # type: ignore[attr-defined]
    mutation = store.mutation()
    mutation.delete(note)
    assert store.content()[note].updated_at < mutation.now  # type: ignore[attr-defined]
    mutation.restore(note)
    assert store.content()[note].updated_at == mutation.now  # type: ignore[attr-defined]


def test_a_write_that_changes_nothing_else_is_none(store: Store) -> None:
    note = store.mutation().insert(Note(text="a"))
    before = store.content()
    mutation = store.mutation()
    mutation.patch(note, {"text": "a"})
    mutation.patch(note, {"updated_at": 5.0})
    mutation.replace(note, Note(text="a", updated_at=6.0))
    assert written(mutation.write_set) == {}
    assert store.content() == before


def test_a_cascade_that_lets_go_changes_the_time_too() -> None:
    class Shelf(Table, name="shelves"):
        pass

    class Book(Table, name="books"):
        shelf_id: Id["Shelf"] | None = None
        updated_at: UpdatedAt = 0.0
        by_shelf = index("shelf_id")
        shelf = foreign_key("shelf_id", on_delete="set_null")

    with closing(Database.open(TEMPORARY, Limits())) as database:
        store = Store(database, (Shelf, Book), Limits())
        mutation = store.mutation()
        shelf = mutation.insert(Shelf())
        book = mutation.insert(Book(shelf_id=shelf))
        mutation = store.mutation()
        mutation.delete(shelf)
        assert store.content()[book].updated_at == mutation.now  # type: ignore[attr-defined]


# -- triggers, as far as the transaction knows them


def test_each_change_is_told_after_it_was_written_and_children_before_their_parents(store: Store) -> None:
    told: list[tuple[str, str, bool]] = []

    def fire(transaction: WriteTransaction, table: TableSchema, change: Change[Any]) -> None:
        document = change.new or change.old
        is_there = transaction.get(document.id) is not None
        assert is_there == (change.operation != "delete")
        if change.operation == "delete" and table.name != "games":
            assert transaction.get(document.game_id) is not None, "its parent is still there"
        told.append((table.name, change.operation, change.old is not None))

    store.fire = fire
    mutation = store.mutation()
    game = mutation.insert(Game())
    team = mutation.insert(Team(game_id=game))
    note = mutation.insert(Note(game_id=game))
    mutation.insert(Player(game_id=game, team_id=team))
    mutation.patch(note, {"text": "a"})
    mutation.patch(note, {"text": "a"})  # changes nothing
    mutation.replace(note, Note(game_id=game))
    mutation.delete(note)
    mutation.restore(note)
    mutation.delete(game)
    assert told == [
        ("games", "insert", False),
        ("teams", "insert", False),
        ("notes", "insert", False),
        ("players", "insert", False),
        ("notes", "patch", True),
        ("notes", "replace", True),
        ("notes", "delete", True),
        ("notes", "insert", False),
        *[(table, "delete", True) for table in ("notes", "teams", "players", "games")],
    ] or sorted(told[8:]) == sorted([(table, "delete", True) for table in ("notes", "teams", "players", "games")])
    assert told[-1] == ("games", "delete", True)


def test_a_change_of_a_deleted_document_is_told_to_nobody(store: Store) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note())
    mutation.delete(note)
    told: list[str] = []
    store.fire = lambda transaction, table, change: told.append(change.operation)
    mutation = store.mutation()
    mutation.patch(note, {"text": "a"}, with_deleted=True)
    mutation.purge(note)
    assert told == []


@pytest.mark.parametrize("fails_at", ["insert", "patch", "replace", "delete", "restore", "cascade"])
def test_what_a_trigger_refuses_is_undone_with_all_that_the_write_did(store: Store, fails_at: str) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    note, deleted = mutation.insert(Note(game_id=game)), mutation.insert(Note())
    mutation.delete(deleted)

    class Refused(Exception):
        pass

    def fire(transaction: WriteTransaction, table: TableSchema, change: Change[Any]) -> None:
        if table.name == "teams":
            return
        transaction.insert(Team())
        raise Refused

    store.fire = fire
    mutation = store.mutation()
    writes: dict[str, Callable[[], Any]] = {
        "insert": lambda: mutation.insert(Game()),
        "patch": lambda: mutation.patch(note, {"text": "a"}),
        "replace": lambda: mutation.replace(note, Note(text="a")),
        "delete": lambda: mutation.delete(note),
        "restore": lambda: mutation.restore(deleted),
        "cascade": lambda: mutation.delete(game),
    }
    with changes_nothing(store, Refused):
        writes[fails_at]()
    assert written(mutation.write_set) == {}


def test_what_a_trigger_adds_to_a_document_that_is_being_deleted_goes_too(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    team = mutation.insert(Team(game_id=game))
    mutation.insert(Player(game_id=game))
    added: list[str] = []

    def fire(transaction: WriteTransaction, table: TableSchema, change: Change[Any]) -> None:
        if change.operation != "delete":
            return
        added.append(transaction.insert(Player()))
        if transaction.get(game) is not None:
            transaction.insert(Player(game_id=game))
        if transaction.get(team) is not None:
            added.append(transaction.insert(Player(team_id=team)))

    store.fire = fire
    mutation = store.mutation()
    mutation.delete(game)
    content = store.content()
    assert len(added) > 4
    assert content.keys() == set(added)
    assert all(player.game_id is player.team_id is None for player in content.values())  # type: ignore[attr-defined]


def test_a_trigger_that_names_a_doomed_document_by_restrict_refuses_the_whole(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    first, second = (mutation.insert(Player(game_id=game)) for _ in range(2))
    outsider = mutation.insert(Player())

    def fire(transaction: WriteTransaction, table: TableSchema, change: Change[Any]) -> None:
        if change.operation == "delete" and transaction.get(outsider).captain_id is None:  # type: ignore[union-attr]
            (left,) = [player for player in (first, second) if transaction.get(player) is not None]
            transaction.patch(outsider, {"captain_id": left})

    store.fire = fire
    with changes_nothing(store, ForeignKeyViolation, "captain_id"):
        store.mutation().delete(game)


def test_a_document_that_a_trigger_restores_before_its_parent_is_gone_goes_all_the_same(store: Store) -> None:
    mutation = store.mutation()
    note = mutation.insert(Note())
    answer = mutation.insert(Note(answers_id=note))
    restored: list[str] = []

    def fire(transaction: WriteTransaction, table: TableSchema, change: Change[Any]) -> None:
        if change.operation == "delete" and change.old.id == answer and transaction.get(note) is not None:
            transaction.restore(answer)
            restored.append(answer)

    store.fire = fire
    mutation = store.mutation()
    mutation.delete(note)
    assert restored == [answer]
    assert (mutation.get(note), mutation.get(answer)) == (None, None)


def test_a_trigger_may_delete_what_is_about_to_be_deleted(store: Store) -> None:
    mutation = store.mutation()
    game = mutation.insert(Game())
    players = [mutation.insert(Player(game_id=game)) for _ in range(3)]
    told: list[str] = []

    def fire(transaction: WriteTransaction, table: TableSchema, change: Change[Any]) -> None:
        told.append(change.old.id)
        for document_id in (*players, game):
            if transaction.get(document_id) is not None:
                transaction.delete(document_id)

    store.fire = fire
    store.mutation().delete(game)
    assert store.content() == {}
    assert sorted(told) == sorted([*players, game])


# -- any history, against a model that looks at every document for everything


class Left(Table, name="lefts"):
    """Documents of two tables, which name each other and themselves by keys of each kind."""

    restrict_left: Id["Left"] | None = None
    restrict_right: Id["Right"] | None = None
    cascade_left: Id["Left"] | None = None
    cascade_right: Id["Right"] | None = None
    null_left: Id["Left"] | None = None
    null_right: Id["Right"] | None = None
    slug: str | None = None
    i1 = index("restrict_left")
    i2 = index("restrict_right")
    i3 = index("cascade_left")
    i4 = index("cascade_right", "slug")
    i5 = index("null_left")
    i6 = index("null_right")
    by_slug = unique("slug")
    k1 = foreign_key("restrict_left")
    k2 = foreign_key("restrict_right", on_delete="restrict")
    k3 = foreign_key("cascade_left", on_delete="cascade")
    k4 = foreign_key("cascade_right", on_delete="cascade")
    k5 = foreign_key("null_left", on_delete="set_null")
    k6 = foreign_key("null_right", on_delete="set_null")


class Right(Left, name="rights"):
    """Those that stay when they are deleted."""

    deleted_at: DeletedAt = None


KEYS = tuple(name for name in Left.__struct_fields__ if "_" in name and name != "creation_time")
slugs = st.sampled_from([None, None, None, "a", "b"])


class Refused(Exception):
    """The model's word for every violation."""


class Model:
    """What the documents should be: by id, their fields, and whether they are deleted."""

    def __init__(self) -> None:
        self.fields: dict[str, dict[str, str | None]] = {}
        self.deleted: set[str] = set()

    def copy(self) -> "Model":
        made = Model()
        made.fields, made.deleted = {i: dict(fields) for i, fields in self.fields.items()}, set(self.deleted)
        return made

    def is_there(self, document_id: str | None) -> bool:
        return document_id in self.fields and document_id not in self.deleted

    def write(self, document_id: str, fields: dict[str, str | None], *, checks_all: bool = False) -> None:
        old = {} if checks_all else self.fields.get(document_id, {})
        if document_id not in self.deleted:
            for key in KEYS:
                if fields[key] is not None and fields[key] != old.get(key) and not self.is_there(fields[key]):
                    raise Refused
            if fields["slug"] is not None and any(
                self.is_there(other) and other != document_id and self.kind(other) == self.kind(document_id)
                and self.fields[other]["slug"] == fields["slug"]
                for other in self.fields
            ):  # fmt: skip
                raise Refused
        self.fields[document_id] = fields

    def restore(self, document_id: str) -> None:
        self.deleted.discard(document_id)
        self.write(document_id, self.fields[document_id], checks_all=True)

    def delete(self, document_id: str, *, is_for_good: bool) -> None:
        counts = [i for i in self.fields if is_for_good or i not in self.deleted]
        doomed = {document_id}
        while True:
            more = {
                i for i in counts
                if any(self.fields[i][key] in doomed for key in KEYS if key.startswith("cascade"))
            } - doomed  # fmt: skip
            if not more:
                break
            doomed |= more
        for i in counts:
            for key in KEYS:
                if i not in doomed and self.fields[i][key] in doomed:
                    if key.startswith("restrict"):
                        raise Refused
                    assert key.startswith("null")
                    self.fields[i][key] = None
        for i in doomed:
            if is_for_good or self.kind(i) == "lefts":
                del self.fields[i]
                self.deleted.discard(i)
            else:
                self.deleted.add(i)

    @staticmethod
    def kind(document_id: str) -> str:
        return "lefts" if document_id.startswith(table_tag("lefts")) else "rights"


class DocumentsNameDocumentsThatAreThere(RuleBasedStateMachine):
    """Each operation has the outcome that the model says: these documents and this write set, or nothing changed."""

    def __init__(self) -> None:
        super().__init__()
        self.database = Database.open(TEMPORARY, Limits())
        self.store = Store(self.database, (Left, Right), Limits())
        self.model = Model()
        self.ids: list[str] = []  # ever made

    def teardown(self) -> None:
        self.database.close()

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        for table in (Left, Right, Left, Right, Left, Left):
            self.insert(table, data)

    def some_id(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.ids))

    def some_fields(self, data: st.DataObject) -> dict[str, Any]:
        """For all keys; some name the oldest documents, so that many name the same ones."""
        fields: dict[str, Any] = dict.fromkeys(KEYS)
        for key in data.draw(st.sets(st.sampled_from([*KEYS, "cascade_left", "cascade_left"]), max_size=3)):
            kind = "lefts" if key.endswith("left") else "rights"
            there = [i for i in self.model.fields if self.model.is_there(i) and self.model.kind(i) == kind][:2]
            gone = [i for i in self.ids if not self.model.is_there(i) and self.model.kind(i) == kind][:1]
            fields[key] = data.draw(st.sampled_from([*there, *there, *gone, None]))
        return {**fields, "slug": data.draw(slugs)}

    def attempt(
        self, real: Callable[[WriteTransaction], str | None], model: Callable[[Model, str | None], None]
    ) -> None:
        before, expected = self.store.content(), self.model.copy()
        mutation = self.store.mutation()
        made: str | None = None
        try:
            made = real(mutation)
            error: Exception | None = None
        except (ConstraintViolation, DocumentNotFound) as raised:
            error = raised
        try:
            model(expected, made)
        except Refused:
            assert error is not None
            assert self.store.content() == before
            assert written(mutation.write_set) == {}
            return
        if error is not None:
            raise error
        self.model = expected
        after = self.store.content()
        assert written(mutation.write_set) == {
            i: (before.get(i), after.get(i)) for i in before.keys() | after.keys() if before.get(i) != after.get(i)
        }

    @rule(table=st.sampled_from([Left, Right]), data=st.data())
    def insert(self, table: type[Left], data: st.DataObject) -> None:
        fields = self.some_fields(data) if self.ids else {**dict.fromkeys(KEYS), "slug": None}

        def insert(mutation: WriteTransaction) -> str:
            self.ids.append(mutation.insert(table(**fields)))
            return self.ids[-1]

        made_id = make_id(table_tag(table.__table_name__), 1, b"123456789")
        self.attempt(insert, lambda model, made: model.write(made or made_id, fields))

    @rule(data=st.data(), is_replace=st.booleans(), with_deleted=st.booleans())
    def change(self, data: st.DataObject, is_replace: bool, with_deleted: bool) -> None:
        document_id, fields = self.some_id(data), self.some_fields(data)
        if not is_replace:
            fields = {name: fields[name] for name in data.draw(st.sets(st.sampled_from([*KEYS, "slug"])))}

        def change(mutation: WriteTransaction) -> None:
            if is_replace:
                table = Left if self.model.kind(document_id) == "lefts" else Right
                mutation.replace(document_id, table(**fields), with_deleted=with_deleted)
            else:
                mutation.patch(document_id, fields, with_deleted=with_deleted)

        def expect(model: Model, _: str | None) -> None:
            if not (model.is_there(document_id) or (with_deleted and document_id in model.fields)):
                raise Refused
            model.write(document_id, {**model.fields[document_id], **fields})

        self.attempt(change, expect)

    @rule(data=st.data(), is_old=st.booleans())
    def delete(self, data: st.DataObject, is_old: bool) -> None:
        document_id = self.some_id(data)
        if is_old and self.model.fields:
            document_id = next(iter(self.model.fields))  # which many name

        def expect(model: Model, _: str | None) -> None:
            if not model.is_there(document_id):
                raise Refused
            model.delete(document_id, is_for_good=False)

        self.attempt(lambda mutation: mutation.delete(document_id), expect)

    @precondition(lambda self: any(self.model.kind(i) == "rights" for i in self.model.fields))
    @rule(data=st.data(), is_purge=st.booleans())
    def restore_or_purge(self, data: st.DataObject, is_purge: bool) -> None:
        document_id = data.draw(st.sampled_from([i for i in self.model.fields if self.model.kind(i) == "rights"]))

        def do(mutation: WriteTransaction) -> None:
            (mutation.purge if is_purge else mutation.restore)(document_id)

        def expect(model: Model, _: str | None) -> None:
            if is_purge:
                model.delete(document_id, is_for_good=True)
            elif document_id in model.deleted:
                model.restore(document_id)

        self.attempt(do, expect)

    @invariant()
    def the_documents_are_those_of_the_model(self) -> None:
        content = self.store.content()
        assert {i: {name: getattr(found, name) for name in (*KEYS, "slug")} for i, found in content.items()} == (
            self.model.fields
        )
        assert {i for i, found in content.items() if getattr(found, "deleted_at", None) is not None} == (
            self.model.deleted
        )

    @invariant()
    def every_document_names_documents_that_are_there(self) -> None:
        there = {i: found for i, found in self.store.content().items() if getattr(found, "deleted_at", None) is None}
        for found in there.values():
            assert all(getattr(found, key) is None or getattr(found, key) in there for key in KEYS)


@pytest.mark.slow
class TestDocumentsNameDocumentsThatAreThere(DocumentsNameDocumentsThatAreThere.TestCase):  # type: ignore[misc]
    settings = settings(stateful_step_count=20, max_examples=max(25, settings().max_examples // 2))
