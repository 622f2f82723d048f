"""A schema meets a database: every change that is applied, and every one that is refused and leaves all as it was."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from copy import copy
from functools import partial
from math import inf
from typing import Annotated, Any, Literal

import msgspec
import pytest

from engine.errors import SchemaError
from engine.ids import Id, creation_time_of, make_id, table_tag
from engine.limits import Limits
from engine.schema import IndexDeclaration, Table, compile_schema, index, unique
from engine.storage import ddl
from engine.storage.connections import FORMAT_VERSION, Database, WriterConnection
from engine.storage.rows import RowCodec

TICK = 1_790_812_800_000 * 4096
FIRST_ID, SECOND_ID = (make_id(table_tag("things"), TICK + number, b"123456789") for number in (1, 2))
USER_ID = make_id(table_tag("users"), TICK, b"123456789")


@pytest.fixture
def database(tmp_path: Any) -> Iterator[Database]:
    with closing(Database.open(tmp_path / "engine.db", Limits())) as database:
        yield database


@pytest.fixture
def writer(database: Database) -> WriterConnection:
    return database.writer


def table(_name: str = "things", /, **body: Any) -> type[Table]:
    """The class of a table; `body` has a type for each field, or a type and its default, and the indexes."""
    namespace: dict[str, Any] = {"__annotations__": {}}
    for name, declared in body.items():
        if isinstance(declared, IndexDeclaration):
            namespace[name] = declared
            continue
        annotation, *defaults = declared if isinstance(declared, tuple) else (declared,)
        namespace["__annotations__"][name] = annotation
        for default in defaults:
            is_mutable = isinstance(default, list | dict | msgspec.Struct)
            namespace[name] = msgspec.field(default_factory=partial(copy, default)) if is_mutable else default
    class_name = _name.title().removesuffix("s")
    cls: type[Table] = type(Table)(class_name, (Table,), namespace, name=_name)
    return cls


def apply(writer: WriterConnection, *types: type[Table]) -> list[str]:
    return ddl.apply_schema(writer, compile_schema(types, Limits()))


def insert(writer: WriterConnection, document_type: type[Table], *documents: dict[str, Any]) -> None:
    """Store these documents as the first, the second … of the table."""
    schema_table = compile_schema(_with_users(document_type), Limits()).table_of(document_type)
    codec: RowCodec[Any] = RowCodec(schema_table)
    for document_id, number, fields in zip((FIRST_ID, SECOND_ID), (1, 2), documents, strict=False):
        document = document_type(id=document_id, creation_time=creation_time_of(TICK + number), **fields)
        schema_table.check(document)
        codec.insert(writer, codec.encode(document))


def documents(writer: WriterConnection, document_type: type[Table]) -> list[dict[str, Any]]:
    """The fields of all documents, oldest first."""
    codec: RowCodec[Any] = RowCodec(compile_schema(_with_users(document_type), Limits()).table_of(document_type))
    rows = writer.fetch_all(f"SELECT {codec.columns_sql} FROM {document_type.__table_name__} ORDER BY _creation")
    built_in = ("id", "creation_time")
    return [
        {name: value for name, value in msgspec.structs.asdict(codec.decode(row)).items() if name not in built_in}
        for row in rows
    ]


def _with_users(document_type: type[Table]) -> list[type[Table]]:
    return [document_type] if document_type.__name__ == "User" else [document_type, table("users")]


def content(writer: WriterConnection) -> dict[str, Any]:
    """Everything that the file holds."""
    schema = writer.fetch_all("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name")
    return {
        "sqlite_master": schema,
        **{name: writer.fetch_all(f'SELECT * FROM "{name}"') for kind, name, _, _ in schema if kind == "table"},
    }


def indexes(writer: WriterConnection) -> list[str]:
    return [
        sql for (sql,) in writer.fetch_all("SELECT sql FROM sqlite_master WHERE type = 'index' ORDER BY name") if sql
    ]


# -- what a table looks like


def test_other_programs_see_typed_tables_and_indexes(database: Database, writer: WriterConnection) -> None:
    things = table(
        name=str, level=(int | None, None), ratio=(float, 0.5), key=(str | int, 1), tags=(list[str], []),
        by_name=unique("name"), by_level_ratio=index("level", "ratio"),
    )  # fmt: skip
    assert apply(writer, things) == ["things: table added"]
    insert(writer, things, {"name": "a", "tags": ["x"]})
    with closing(sqlite3.connect(f"file:{database.path}?mode=ro", uri=True)) as other:
        assert other.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND name = 'things'"
        ).fetchall() == [("things", 1)]
        assert other.execute("SELECT name, type, [notnull] FROM pragma_table_xinfo('things')").fetchall() == [
            ("_creation", "INTEGER", 0),
            ("id", "TEXT", 1),
            ("creation_time", "REAL", 0),
            ("name", "TEXT", 1),
            ("level", "INTEGER", 0),
            ("ratio", "REAL", 1),
            ("key", "ANY", 1),
            ("tags", "TEXT", 1),
        ]
        assert other.execute("SELECT creation_time, name, level, tags FROM things").fetchall() == [
            (creation_time_of(TICK + 1), "a", None, '["x"]')
        ]
    assert indexes(writer) == [
        'CREATE INDEX "things.by_level_ratio" ON "things" ("level", "ratio")',
        'CREATE UNIQUE INDEX "things.by_name" ON "things" ("name")',
    ]


def test_the_same_schema_again_changes_nothing(writer: WriterConnection) -> None:
    things = table(name=str, tags=(list[str], []), by_name=index("name"))
    apply(writer, things)
    insert(writer, things, {"name": "a"})
    before = content(writer)
    assert apply(writer, table(name=str, tags=(list[str], []), by_name=index("name"))) == []
    assert content(writer) == before


def test_a_schema_lasts_over_reopening(tmp_path: Any) -> None:
    things = table(name=str, by_name=unique("name"))
    with closing(Database.open(tmp_path / "engine.db", Limits())) as database:
        apply(database.writer, things)
        insert(database.writer, things, {"name": "a"})
    with closing(Database.open(tmp_path / "engine.db", Limits())) as database:
        assert apply(database.writer, things) == []
        assert documents(database.writer, things) == [{"name": "a"}]


# -- changes that are applied


def test_a_file_of_an_older_format_gets_the_newest_with_what_the_older_engine_could_not_keep(
    writer: WriterConnection,
) -> None:
    def format_version() -> int:
        ((version,),) = writer.fetch_all('SELECT "format_version" FROM "_engine_meta"')
        return int(version)

    old = {"columns": {}, "indexes": {}}  # as format 1 described a table
    writer.execute(
        'UPDATE "_engine_meta" SET "format_version" = 1, "schema_json" = ?',
        (msgspec.json.encode({"things": old}).decode(),),
    )
    writer.execute('CREATE TABLE "things" ("_creation" INTEGER PRIMARY KEY, "id" TEXT NOT NULL) STRICT')
    apply(writer, table())
    assert format_version() == 1  # nothing was done
    apply(writer, table(level=(int, 1)))
    assert format_version() == FORMAT_VERSION


def test_a_table_is_added_beside_others(writer: WriterConnection) -> None:
    things = table(name=str)
    apply(writer, things)
    insert(writer, things, {"name": "a"})
    assert apply(writer, things, table("users", name=str)) == ["users: table added"]
    assert documents(writer, things) == [{"name": "a"}]


@pytest.mark.parametrize(
    ("annotation", "default"),
    [
        (str, 'it\'s "new"'),
        (str, "nul \0 inside"),
        (str, "\U0001f600"),
        (str | None, None),
        (str | None, "x"),
        (int, -(2**63)),
        (bool, True),
        (float, 0.1),
        (float, 5),
        (float, inf),
        (float, -inf),
        (bytes, b"\0'\xff"),
        (int | str | float, 1e300),
        (int | str | float, "1"),
        (list[int], [1, 2]),
        (dict[str, Any], {"a": [None, 1.5]}),
        (Any, None),
        (Literal["low", "high"], "high"),
    ],
    ids=repr,
)
def test_a_field_with_a_default_is_added(writer: WriterConnection, annotation: Any, default: Any) -> None:
    things = table(name=str, by_name=unique("name"))
    apply(writer, things)
    insert(writer, things, {"name": "a"}, {"name": "b"})
    changed = table(new=(annotation, default), name=str, by_name=unique("name"))
    assert apply(writer, changed) == ["things.new: field added"]
    assert documents(writer, changed) == [{"name": "a", "new": default}, {"name": "b", "new": default}]
    assert indexes(writer) == ['CREATE UNIQUE INDEX "things.by_name" ON "things" ("name")']
    assert apply(writer, changed) == []


def test_a_field_that_may_be_none_needs_no_default(writer: WriterConnection) -> None:
    apply(writer, table(name=str))
    insert(writer, table(name=str), {"name": "a"})
    changed = table(name=str, nickname=str | None)
    assert apply(writer, changed) == ["things.nickname: field added"]
    assert documents(writer, changed) == [{"name": "a", "nickname": None}]


def test_a_field_without_a_default_is_added_to_an_empty_table(writer: WriterConnection) -> None:
    apply(writer, table(name=str))
    changed = table(name=str, level=int)
    assert apply(writer, changed) == ["things.level: field added"]
    insert(writer, changed, {"name": "a", "level": 1})
    assert documents(writer, changed) == [{"name": "a", "level": 1}]


def test_adding_a_field_with_a_default_writes_no_row(writer: WriterConnection) -> None:
    things = table(name=str)
    apply(writer, things)
    insert(writer, things, {"name": "a"})
    statements: list[str] = []
    writer._connection.set_trace_callback(statements.append)
    apply(writer, table(name=str, level=(int, 7)))
    writer._connection.set_trace_callback(None)
    assert any(statement.startswith('ALTER TABLE "things" ADD COLUMN') for statement in statements)
    assert not any(statement.startswith("INSERT") for statement in statements)


def test_a_new_default_is_for_new_documents(writer: WriterConnection) -> None:
    things = table(name=str)
    apply(writer, things)
    insert(writer, things, {"name": "a"})
    apply(writer, table(name=str, level=(int, 1)))
    changed = table(name=str, level=(int, 2))
    assert apply(writer, changed) == []
    assert documents(writer, changed) == [{"name": "a", "level": 1}]


def test_a_field_that_is_none_everywhere_is_dropped(writer: WriterConnection) -> None:
    things = table(name=str, old=(str | None, None), by_old=index("old"), by_name=index("name"))
    apply(writer, things)
    insert(writer, things, {"name": "a"})
    changed = table(name=str, by_name=index("name"))
    assert apply(writer, changed) == ["things.old: field dropped", "things.by_old: index dropped"]
    assert documents(writer, changed) == [{"name": "a"}]
    assert indexes(writer) == ['CREATE INDEX "things.by_name" ON "things" ("name")']


def test_indexes_are_added_changed_and_dropped(writer: WriterConnection) -> None:
    first = table(a=int, b=int, by_a=index("a"), by_b=index("b"), by_ab=index("a", "b"))
    apply(writer, first)
    insert(writer, first, {"a": 1, "b": 1}, {"a": 2, "b": 1})
    second = table(a=int, b=int, by_a=unique("a"), by_ab=index("b", "a"), by_bb=index("b"))
    assert apply(writer, second) == [
        "things.by_b: index dropped",
        "things.by_a: index changed",
        "things.by_ab: index changed",
        "things.by_bb: index added",
    ]
    assert indexes(writer) == [
        'CREATE UNIQUE INDEX "things.by_a" ON "things" ("a")',
        'CREATE INDEX "things.by_ab" ON "things" ("b", "a")',
        'CREATE INDEX "things.by_bb" ON "things" ("b")',
    ]


def test_a_unique_index_may_be_added_where_values_differ_or_are_none(writer: WriterConnection) -> None:
    things = table(name=(str | None, None), level=int)
    apply(writer, things)
    insert(writer, things, {"name": None, "level": 1}, {"name": None, "level": 1})
    assert apply(writer, table(name=(str | None, None), level=int, by_name=unique("name", "level"))) == [
        "things.by_name: index added"
    ]


class Point(msgspec.Struct):
    x: int


class PointWithLabel(msgspec.Struct):
    x: int
    label: str = ""


@pytest.mark.parametrize(
    ("old", "new", "value", "converted"),
    [
        (str, str | None, "a", "a"),
        (str | None, str, "a", "a"),
        (int, float, 5, 5.0),
        (int, int | str, 5, 5),
        (int, Any, 2**60, 2**60),
        (bool, bool | str, True, True),
        (str, str | list[str], "a", "a"),
        (str | list[str], str, "a", "a"),
        (str | None, Any, None, None),
        (list[int] | None, list[float], [1], [1.0]),
        (list[int], list[int | str], [1], [1]),
        (str, Literal["a", "b"], "a", "a"),
        (Literal["a"], Literal["a", "b"], "a", "a"),
        (int, Annotated[int, msgspec.Meta(ge=0)], 5, 5),
        (str, Id["User"], USER_ID, USER_ID),
        (Point, PointWithLabel, Point(1), PointWithLabel(1, "")),
        (dict[str, int], Point, {"x": 1}, Point(1)),
        (bytes, bytes | None, b"\0", b"\0"),
    ],
    ids=repr,
)
def test_a_type_changes_when_every_row_fits_the_new_one(
    writer: WriterConnection, old: Any, new: Any, value: Any, converted: Any
) -> None:
    first, users = table(key=str, field=old, by_key=unique("key")), table("users")
    apply(writer, first, users)
    insert(writer, first, {"key": "a", "field": value})
    second = table(key=str, field=new, by_key=unique("key"))
    (done,) = apply(writer, second, users)
    assert done.startswith("things.field: type changed to ")
    (document,) = documents(writer, second)
    assert document == {"key": "a", "field": converted}
    assert type(document["field"]) is type(converted)
    assert indexes(writer) == ['CREATE UNIQUE INDEX "things.by_key" ON "things" ("key")']
    assert apply(writer, second, users) == []


def test_an_index_follows_a_field_whose_type_changes(writer: WriterConnection) -> None:
    first = table(level=int, by_level=index("level"))
    apply(writer, first)
    insert(writer, first, {"level": 1})
    assert apply(writer, table(level=float, by_level=index("level"))) == ["things.level: type changed to float"]
    assert indexes(writer) == ['CREATE INDEX "things.by_level" ON "things" ("level")']


def test_a_copied_table_keeps_every_row(writer: WriterConnection) -> None:
    first = table(number=int)
    apply(writer, first)
    codec: RowCodec[Any] = RowCodec(compile_schema([first], Limits()).table_of(first))
    writer.begin()
    for number in range(2_500):  # more than two pages
        document_id = make_id(table_tag("things"), TICK + number, b"123456789")
        codec.insert(writer, (TICK + number, document_id, number))
    writer.commit()
    apply(writer, table(number=float))
    rows = writer.fetch_all("SELECT _creation, number FROM things ORDER BY _creation")
    assert rows == [(TICK + number, float(number)) for number in range(2_500)]


# -- a table that is gone and comes back


def test_a_table_that_is_no_longer_declared_stays(writer: WriterConnection) -> None:
    things, users = table(name=str, by_name=unique("name")), table("users", name=str)
    apply(writer, things, users)
    insert(writer, things, {"name": "a"})
    before = content(writer)
    assert apply(writer, users) == []
    assert content(writer) == before
    assert apply(writer, things, users) == []
    assert documents(writer, things) == [{"name": "a"}]


def test_a_table_that_comes_back_is_compared_with_what_it_was(writer: WriterConnection) -> None:
    things, users = table(name=str), table("users", name=str)
    apply(writer, things, users)
    insert(writer, things, {"name": "a"})
    apply(writer, users, table("games", title=str))  # the description is written anew meanwhile
    with pytest.raises(SchemaError, match=r"things\.level: the field is new and has no default"):
        apply(writer, table(name=str, level=int), users)
    changed = table(name=str, level=(int, 1))
    assert apply(writer, changed, users) == ["things.level: field added"]
    assert documents(writer, changed) == [{"name": "a", "level": 1}]


# -- changes that are refused

REFUSALS: list[tuple[type[Table], type[Table], str]] = [
    (
        table(name=str),
        table(name=str, level=int),
        rf"^things\.level: the field is new and has no default, and there are rows, such as '{FIRST_ID}'\. Give it a",
    ),
    (
        table(name=str),
        table(nickname=(str, "")),
        rf"^things\.name: the field is gone, but the row '{FIRST_ID}' has 'a' in it\. Declare it as optional",
    ),
    (
        table(name=str),
        table(name=int),
        rf"^things\.name: the row '{FIRST_ID}' has 'a', which does not fit the new type: expected int, got 'a'\.",
    ),
    (
        table(name=str, by_name=index("name")),
        table(name=str, by_name=unique("name")),
        rf"^things\.by_name: cannot be unique, the rows '{FIRST_ID}' and '{SECOND_ID}' both have name='a'\. Change or",
    ),
    (
        table(name=str),
        table(name=str, level=(int, 1), by_name_level=unique("name", "level")),
        r"both have name='a', level=1\.",
    ),
    (
        table(name=str),
        table(name=Literal["b", "c"]),
        r"has 'a', which does not fit the new type: expected one of 'b', 'c'",
    ),
    (table(name=str), table(name=Id["User"]), r"expected Id\[User\], got 'a'"),
    (table(name=str), table(name=Annotated[str, msgspec.Meta(min_length=2)]), r"expected str .length >= 2., got 'a'"),
    (table(name=str), table(name=list[str]), r"expected list\[str\], got 'a'"),
    (table(name=str), table(name=bytes), "expected bytes, got 'a'"),
    (
        table(name=str, none=(str | None, None)),
        table(name=str, none=str),
        "has null, which does not fit .*: expected str",
    ),
    (table(name=str, flag=(bool, True)), table(name=str, flag=int), "expected int, got true"),
    (table(name=str, ratio=(float, 1.5)), table(name=str, ratio=int), "expected int, got 1.5"),
    (table(name=str, big=(int, 2**60)), table(name=str, big=float), "expected float, got 1152921504606846976"),
    (table(name=str, points=(list[int], [1])), table(name=str, points=list[str]), r"\[0\]: expected str, got 1"),
    (table(name=str, point=(Point, Point(1))), table(name=str, point=dict[str, str]), "x: expected str, got 1"),
    (table(name=str, x=(PointWithLabel, PointWithLabel(1))), table(name=str, x=Point), "label: unknown"),
]


@pytest.mark.parametrize(("old", "new", "message"), REFUSALS, ids=[message for _, _, message in REFUSALS])
def test_a_change_that_a_row_does_not_fit_is_refused_whole(
    writer: WriterConnection, old: type[Table], new: type[Table], message: str
) -> None:
    users = table("users", name=str)
    apply(writer, old, users)
    insert(writer, old, {"name": "a"}, {"name": "a"})
    before = content(writer)
    added = table("games", title=str)
    with pytest.raises(SchemaError, match=message):
        apply(writer, added, new, table("users", name=str, age=(int, 0)))
    assert not writer.in_transaction
    assert content(writer) == before
    assert apply(writer, old, users) == []


def test_a_table_of_another_program_is_not_taken_over(writer: WriterConnection) -> None:
    apply(writer, table("users"))
    writer.execute("CREATE TABLE Things (x)")
    before = content(writer)
    with pytest.raises(SchemaError, match="things: another program made a table of this name"):
        apply(writer, table("users"), table(name=str))
    assert content(writer) == before
