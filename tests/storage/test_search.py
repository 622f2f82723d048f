"""Search indexes against looking at every document."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.ids import creation_time_of, make_id, table_tag, tick_of
from engine.limits import Limits
from engine.ranges import Scalar
from engine.schema import DeletedAt, Table, compile_schema, index, search_index
from engine.storage import search
from engine.storage.connections import Connection, Database
from engine.storage.ddl import apply_schema
from engine.storage.rows import RowCodec
from engine.values.words import Terms, relevance, terms_of, words_of
from tests.strategies import texts


class Note(Table, name="notes"):
    body: str | None
    tokens: str = ""  # named as the column of the FTS5 table
    rank: float | None = None  # named as one that every FTS5 table has
    is_open: bool = True
    kind: str | int = ""
    deleted_at: DeletedAt = None
    search = search_index("body", filter=("rank", "is_open", "kind"))
    search_data = index("rank")  # FTS5 gives names that end so to its own tables


NOTES = compile_schema([Note], Limits()).table_of(Note)
INDEX = NOTES.search_indexes_by_name["search"]
CODEC: RowCodec[Note] = RowCodec(NOTES)
TICK = 1_790_812_800_000 * 4096

bodies = st.lists(st.sampled_from("goal goals go oka okay Гол гол é e 東京 京都 👍 AND NOT".split()), max_size=4).map(
    " ".join
) | st.sampled_from(["goal" * 30, "goal" * 30 + "s", "東京都", "", "...", "\ue000", "a\0b", *"0123456789"])
asked = bodies | st.sampled_from(['"goal" OR oka', "goal* NEAR(oka)", "-goal", "body:goal", "g", "goal" * 16, "^'\"("])
ranks = st.sampled_from([None, 0.0, 1.0, 0.5, 1e300, -0.0, 1, 0])  # an int may be given where a float is stored
kinds = st.sampled_from(["", "1", 1, 0])
filters = st.fixed_dictionaries({}, optional={"rank": ranks, "is_open": st.booleans(), "kind": kinds}).map(
    lambda fixed: tuple((name, fixed[name]) for name in INDEX.filters if name in fixed)
)
contents = st.fixed_dictionaries(
    {"body": st.none() | bodies, "rank": ranks, "is_open": st.booleans(), "kind": kinds},
    optional={"deleted_at": st.none() | st.just(1.0)},
)


def note(number: int, **fields: Any) -> Note:
    tick = TICK + number
    return Note(id=make_id(table_tag("notes"), tick, b"123456789"), creation_time=creation_time_of(tick), **fields)


def found(
    connection: Connection,
    terms: Terms,
    fixed: tuple[tuple[str, Scalar], ...] = (),
    *,
    before_tick: int | None = None,
    limit: int = 100,
) -> list[int]:
    """The numbers of the notes that the index gives."""
    rows = search.fetch(connection, CODEC, INDEX, fixed, terms, before_tick=before_tick, limit=limit)
    return [tick_of(CODEC.decode(row).id) - TICK for row in rows]


def expected(notes: dict[int, Note], terms: Terms, fixed: tuple[tuple[str, Scalar], ...] = ()) -> list[int]:
    """The same by looking at every note."""
    return [
        number
        for number, document in sorted(notes.items(), reverse=True)
        if document.body is not None
        and document.deleted_at is None
        and all(getattr(document, name) == value for name, value in fixed)
        and relevance(terms, words_of(document.body)) is not None
    ]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database.open(tmp_path / "engine.db", Limits())) as database:
        apply_schema(database.writer, compile_schema([Note], Limits()))
        yield database


def write(database: Database, old: Note | None, new: Note | None) -> None:
    if old is None and new is not None:
        CODEC.insert(database.writer, CODEC.encode(new))
    elif new is None and old is not None:
        CODEC.delete(database.writer, old.id)
    elif new is not None:
        CODEC.update(database.writer, CODEC.encode(new))
    search.update(database.writer, NOTES, INDEX, old, new)


class HoldsWhatTheTableHolds(RuleBasedStateMachine):
    """Invariants 1 and 2, through savepoints that are undone and in the snapshots of readers."""

    def __init__(self) -> None:
        super().__init__()
        self.database = Database.open(":memory:", Limits())
        apply_schema(self.database.writer, compile_schema([Note], Limits()))
        self.reader = self.database.open_reader()
        self.reader.pin()
        self.database.writer.begin()
        self.notes: dict[int, Note] = {}
        self.committed: dict[int, Note] = {}
        self.savepoints: list[dict[int, Note]] = []
        self.next_number = 0

    def teardown(self) -> None:
        self.database.close()

    @rule(fields=contents)
    def insert(self, fields: dict[str, Any]) -> None:
        self._write(self.next_number, note(self.next_number, **fields))
        self.next_number += 1

    @precondition(lambda self: self.notes)
    @rule(data=st.data(), fields=contents)
    def change(self, data: st.DataObject, fields: dict[str, Any]) -> None:
        number = data.draw(st.sampled_from(sorted(self.notes)))
        chosen = data.draw(st.sets(st.sampled_from(sorted(fields))))
        changed = {name: fields[name] for name in chosen}
        self._write(number, msgspec.structs.replace(self.notes[number], **changed))

    @precondition(lambda self: self.notes)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self._write(data.draw(st.sampled_from(sorted(self.notes))), None)

    @rule()
    def savepoint(self) -> None:
        self.savepoints.append(dict(self.notes))
        self.database.writer.savepoint(len(self.savepoints))

    @precondition(lambda self: self.savepoints)
    @rule(is_kept=st.booleans())
    def end_savepoint(self, is_kept: bool) -> None:
        if not is_kept:
            self.database.writer.rollback_to(len(self.savepoints))
            self.notes = self.savepoints[-1]
        self.database.writer.release(len(self.savepoints))
        self.savepoints.pop()

    @precondition(lambda self: not self.savepoints)
    @rule(is_kept=st.booleans())
    def commit(self, is_kept: bool) -> None:
        if is_kept:
            self.database.writer.commit()
            self.reader.unpin()
            self.reader.pin()
            self.committed = dict(self.notes)
        else:
            self.database.writer.rollback()
            self.notes = dict(self.committed)
        self.database.writer.begin()

    @rule(text=asked, fixed=filters, limit=st.integers(1, 3), before=st.none() | st.integers(0, 6))
    def search(self, text: str, fixed: tuple[tuple[str, Scalar], ...], limit: int, before: int | None) -> None:
        terms = terms_of(text)
        if not terms:
            return
        for connection, notes in ((self.database.writer, self.notes), (self.reader, self.committed)):
            every = expected(notes, terms, fixed)
            assert found(connection, terms, fixed) == every
            before_tick = None if before is None else TICK + before
            older = [number for number in every if before is None or number < before]
            assert found(connection, terms, fixed, before_tick=before_tick, limit=limit) == older[:limit]

    @invariant()
    def every_word_finds_its_notes(self) -> None:
        for document in self.notes.values():
            fixed = tuple((name, getattr(document, name)) for name in INDEX.filters)
            for word in set(words_of(document.body or "")):
                for terms in (Terms((word,), None), Terms((), word[:3])):
                    assert found(self.database.writer, terms) == expected(self.notes, terms), ascii(terms)
                    assert found(self.database.writer, terms, fixed) == expected(self.notes, terms, fixed), ascii(terms)

    def _write(self, number: int, new: Note | None) -> None:
        write(self.database, self.notes.get(number), new)
        if new is None:
            del self.notes[number]
        else:
            self.notes[number] = new


@pytest.mark.slow
class TestHoldsWhatTheTableHolds(HoldsWhatTheTableHolds.TestCase):  # type: ignore[misc]  # made at run time
    settings = settings(stateful_step_count=30)


@pytest.mark.slow
@given(st.lists(texts, max_size=4), texts)
def test_any_text_is_found_by_any_other_as_its_words_say(in_notes: list[str], text: str) -> None:
    terms = terms_of(text)
    with closing(Database.open(":memory:", Limits())) as database:
        apply_schema(database.writer, compile_schema([Note], Limits()))
        database.writer.begin()
        notes = {number: note(number, body=body) for number, body in enumerate([*in_notes, text])}
        for document in notes.values():
            write(database, None, document)
        if terms:
            assert found(database.writer, terms) == expected(notes, terms)
        for number, document in notes.items():
            write(database, document, None)
            for word in words_of(document.body or ""):
                assert number not in found(database.writer, Terms((word,), None))


def test_an_index_holds_no_texts(database: Database) -> None:
    database.writer.begin()
    write(database, None, note(1, body="what a remarkable goal"))
    database.writer.commit()
    tables = database.writer.fetch_all("SELECT name FROM sqlite_master WHERE name LIKE 'notes.search.words_%'")
    assert [name for (name,) in tables] == [f"notes.search.words_{part}" for part in ("data", "idx", "config")]


def test_a_write_that_leaves_text_and_filters_as_they_are_does_not_touch_the_index(database: Database) -> None:
    database.writer.begin()
    old = note(1, body="what a goal")
    write(database, None, old)
    before = database.writer.fetch_all('SELECT * FROM "notes.search.words_data"')
    write(database, old, msgspec.structs.replace(old, tokens="other"))
    assert database.writer.fetch_all('SELECT * FROM "notes.search.words_data"') == before


def test_other_programs_can_read_the_table_while_it_has_a_search_index(database: Database) -> None:
    database.writer.begin()
    write(database, None, note(1, body="what a goal"))
    database.writer.commit()
    with closing(sqlite3.connect(f"file:{database.path}?mode=ro", uri=True)) as other:
        assert other.execute("SELECT body FROM notes").fetchall() == [("what a goal",)]
        assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_search_looks_up_the_rows_and_walks_no_table(database: Database) -> None:
    """Invariant 2."""
    seen: list[str] = []
    database.writer._connection.set_trace_callback(seen.append)
    found(database.writer, Terms(("goal",), "o"), (("is_open", True),), limit=20)
    database.writer._connection.set_trace_callback(None)
    (statement,) = [sql for sql in seen if not sql.startswith("--")]
    plan = [str(row[3]) for row in database.writer.fetch_all(f"EXPLAIN QUERY PLAN {statement}")]
    assert plan[0].startswith("SEARCH notes USING INTEGER PRIMARY KEY")
    assert not [step for step in plan if step.startswith("SCAN") and "VIRTUAL TABLE" not in step]


def test_a_checkpoint_and_a_new_process_find_the_same(tmp_path: Path) -> None:
    with closing(Database.open(tmp_path / "engine.db", Limits())) as database:
        apply_schema(database.writer, compile_schema([Note], Limits()))
        database.writer.begin()
        for number in range(200):
            write(database, None, note(number, body=f"goal {number % 7}"))
        database.writer.commit()
        database.writer.checkpoint("TRUNCATE")
    with closing(Database.open(tmp_path / "engine.db", Limits())) as database:
        assert apply_schema(database.writer, compile_schema([Note], Limits())) == []
        assert found(database.writer, terms_of("goal 3")) == [n for n in range(199, -1, -1) if n % 7 == 3][:100]
        with closing(sqlite3.connect(tmp_path / "backup.db")) as backup:
            database.writer._connection.backup(backup)
            assert backup.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# -- schemas that change


def notes_table(body: Any = str, rank: Any = float, *, deleted: bool = False, **indexes: Any) -> type[Table]:
    """The class of a table whose rows fit all of its versions."""
    annotations = {"body": body, "rank": rank, "at": DeletedAt if deleted else float | None}
    namespace = {"__annotations__": annotations, "rank": 1.0 if rank is float else None, "at": None, **indexes}
    cls: type[Table] = type(Table)("Changing", (Table,), namespace, name="changing")
    return cls


VERSIONS = [
    notes_table(),
    notes_table(search=search_index("body")),
    notes_table(search=search_index("body", filter=["rank"])),
    notes_table(body=str | None, search=search_index("body", filter=["rank"])),  # copies the table
    notes_table(rank=float | None, search=search_index("body", filter=["rank"])),
    notes_table(rank=float | str | None, search=search_index("body", filter=["rank"])),  # 1.0 is stored as another type
    notes_table(deleted=True, search=search_index("body")),
    notes_table(search=search_index("body"), second=search_index("body", filter=["rank"])),
]


def check_indexes(database: Database, document_type: type[Table]) -> None:
    """Every index of the newest schema finds what its rows say, and no other index is left."""
    table = compile_schema([document_type], Limits()).table_of(document_type)
    codec: RowCodec[Any] = RowCodec(table)
    rows = database.writer.fetch_all(f"SELECT {codec.columns_sql} FROM changing ORDER BY _creation DESC")
    every = [codec.decode(row) for row in rows]
    for declared in table.search_indexes_by_name.values():
        for text in ("goal", "oka", "o"):
            for rank in (1.0, 2.0):
                fixed = [(name, rank) for name in declared.filters]
                rows = search.fetch(
                    database.writer, codec, declared, fixed, terms_of(text), before_tick=None, limit=99_999
                )
                assert [codec.decode(row).id for row in rows] == [
                    document.id
                    for document in every
                    if all(getattr(document, name) == value for name, value in fixed)
                    and (body := declared.text_of(document)) is not None
                    and relevance(terms_of(text), words_of(body)) is not None
                ]
    sql = "SELECT name FROM sqlite_master WHERE name LIKE 'changing.%.words' ORDER BY name"
    names = [name for (name,) in database.writer.fetch_all(sql)]
    assert names == [f"changing.{name}.words" for name in sorted(table.search_indexes_by_name)]


@pytest.mark.slow
@settings(max_examples=max(25, settings().max_examples // 4))
@given(st.lists(st.sampled_from(range(len(VERSIONS))), min_size=2, max_size=5))
def test_an_index_follows_every_change_of_its_table(versions: list[int]) -> None:
    with closing(Database.open(":memory:", Limits())) as database:
        for step, version in enumerate(versions):
            document_type = VERSIONS[version]
            schema = compile_schema([document_type], Limits())
            apply_schema(database.writer, schema)
            assert apply_schema(database.writer, schema) == []
            table = schema.table_of(document_type)
            codec: RowCodec[Any] = RowCodec(table)
            database.writer.begin()
            for number, body in enumerate(["goal oka", "goal", "ok"]):
                made = note(10 * step + number, body="")
                tag = table_tag("changing")
                new: Any = document_type(
                    id=tag + made.id[len(tag) :], creation_time=made.creation_time, body=body, rank=1.0 + number
                )
                codec.insert(database.writer, codec.encode(new))
                for declared in table.search_indexes_by_name.values():
                    search.update(database.writer, table, declared, None, new)
            database.writer.commit()
            check_indexes(database, document_type)


def test_what_was_done_is_said(database: Database) -> None:
    def change(version: int) -> list[str]:
        return apply_schema(database.writer, compile_schema([VERSIONS[version]], Limits()))

    assert change(1) == ["changing: table added"]
    assert change(2) == ["changing.search: search index changed"]
    assert change(7) == ["changing.search: search index changed", "changing.second: search index added"]
    assert change(0) == ["changing.search: search index dropped", "changing.second: search index dropped"]


def test_rows_of_many_pages_are_indexed_and_deleted_ones_are_not(database: Database) -> None:
    plain, searched = notes_table(deleted=True), VERSIONS[6]
    apply_schema(database.writer, compile_schema([plain], Limits()))
    tag = table_tag("changing")
    database.writer.begin()
    database.writer.execute(
        "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 2499) "
        f"INSERT INTO changing (_creation, id, body, rank, at) "
        f"SELECT {TICK} + i, '{tag}' || i, 'goal ' || i, 1.0, CASE WHEN i % 2 THEN 5.0 END FROM n"
    )
    database.writer.commit()
    apply_schema(database.writer, compile_schema([searched], Limits()))
    check_indexes(database, searched)


def test_texts_that_another_version_split_into_words_are_split_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.writer.begin()
    write(database, None, note(1, body="goal"))
    database.writer.commit()
    monkeypatch.setattr(search, "WORDS_VERSION", "of another Unicode")
    monkeypatch.setattr(search, "words_of", lambda text: [word + "x" for word in words_of(text)])
    assert apply_schema(database.writer, compile_schema([Note], Limits())) == ["notes.search: search index changed"]
    assert found(database.writer, Terms(("goalx",), None)) == [1]
    assert found(database.writer, Terms(("goal",), None)) == []


def test_an_index_of_a_table_that_comes_back_is_still_right(database: Database) -> None:
    database.writer.begin()
    write(database, None, note(1, body="goal"))
    database.writer.commit()
    apply_schema(database.writer, compile_schema([VERSIONS[0]], Limits()))
    assert apply_schema(database.writer, compile_schema([Note, VERSIONS[0]], Limits())) == []
    assert found(database.writer, terms_of("goal")) == [1]
