"""What a client writes is bound to a statement, never part of one; and SQL is put together in few places only."""

import ast
import os
import random
import re
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import engine.storage.connections
from engine.errors import SchemaError
from engine.limits import Limits
from engine.schema import Table, compile_schema
from tests.server.real import RealServer, serve_app
from tests.sync.fakes import connect, query_set

SEED = int(os.environ.get("REL_SEED", 20_261))
ENGINE = Path(__file__).parents[2] / "engine"

# Who may put a name into a statement: the names are those of the schema, checked when it is compiled.
MAY_BUILD_SQL = {
    "storage/connections.py",  # pragmas and savepoints, with numbers of its own
    "storage/ddl.py",
    "storage/ranked.py",
    "storage/rows.py",
    "storage/scans.py",
    "storage/search.py",
    "storage/shadows.py",
    "storage/totals.py",
}
_SQL = re.compile(
    r"\b(SELECT\b.*\bFROM|INSERT (OR \w+ )?INTO|UPDATE\b.*\bSET|DELETE FROM"
    r"|(CREATE|DROP|ALTER) (UNIQUE |VIRTUAL )?(TABLE|INDEX)|PRAGMA|SAVEPOINT|ATTACH|WHERE|ORDER BY|RELEASE"
    r"|ROLLBACK TO)\b",
    re.DOTALL,
)


def built_texts(source: str) -> Iterator[tuple[int, str]]:
    """Each text that is put together from pieces (f"", %, +, format, join), with its line and its constant parts."""
    for node in ast.walk(ast.parse(source)):
        constants: list[str] = []
        match node:
            case ast.JoinedStr(values=values) if any(isinstance(value, ast.FormattedValue) for value in values):
                constants = [str(value.value) for value in values if isinstance(value, ast.Constant)]
            case ast.BinOp(op=ast.Mod() | ast.Add(), left=left, right=right):
                constants = [str(side.value) for side in (left, right) if isinstance(side, ast.Constant)]
            case ast.Call(func=ast.Attribute(attr="format" | "join" | "replace", value=ast.Constant(value=value))):
                constants = [str(value)]
            case ast.AugAssign(op=ast.Add(), value=ast.Constant(value=value)):
                constants = [str(value)]
        if constants:
            yield getattr(node, "lineno", 0), " ".join(constants)


def sql_builders(source: str) -> list[int]:
    return [line for line, text in built_texts(source) if _SQL.search(text)]


def test_sql_is_put_together_in_the_modules_that_may_and_nowhere_else() -> None:
    building = {
        path.relative_to(ENGINE).as_posix(): lines
        for path in ENGINE.rglob("*.py")
        if (lines := sql_builders(path.read_text(encoding="utf-8")))
    }
    assert building.keys() <= MAY_BUILD_SQL, "bind the value, or build it where names are checked"
    assert len(building) >= 6, "the check sees what it looks for"


@pytest.mark.parametrize(
    "source",
    [
        'x = f"SELECT * FROM {name}"',
        "x = \"DELETE FROM t WHERE k = '%s'\" % key",
        'x = "SELECT a FROM t WHERE k = " + key',
        'x = "UPDATE t SET a = {}".format(a)',
        'sql = "SELECT 1"\nsql += " ORDER BY "',
    ],
)
def test_the_check_finds_each_way_of_putting_it_together(source: str) -> None:
    assert sql_builders(source)


# -- every text of a client, while all statements are recorded

FUNCTIONS = """
from datetime import timedelta
@query
async def by_key(ctx, key: str) -> list[Item]: return await ctx.db.query(Item.by_key, key=key).collect()
@query
async def since(ctx, key: str, rank: int) -> int: return await ctx.db.query(Item.by_key, key=key, gte=rank).count()
@query
async def page(ctx, key: str, pagination_opts: PaginationOptions) -> Page[Item]:
    return await ctx.db.query(Item.by_key, key=key).paginate(pagination_opts)
@query
async def get(ctx, id: str) -> Item | None: return await ctx.db.get(id)
@query
async def find(ctx, text: str, tag: str) -> list[Text]:
    return await ctx.db.search(Text.by_words, text, tag=tag).take(10)
@mutation
async def add(ctx, key: str, note: str, extra: Any = None) -> Id[Item]:
    await ctx.db.insert(Text(words=note, tag=key))
    return await ctx.db.insert(Item(key=key, note=note, extra=extra))
@mutation
async def edit(ctx, id: Id[Item], note: str) -> None: await ctx.db.patch(id, note=note)
@mutation
async def drop(ctx, key: str) -> int:
    found = await ctx.db.query(Item.by_key, key=key).collect()
    for item in found: await ctx.db.delete(item.id)
    return len(found)
@mutation
async def limited(ctx, key: str) -> None: await ctx.limit("writes", key=key)
@query
async def who(ctx) -> str | None:
    identity = ctx.auth.identity()
    found = await ctx.db.query(Item.by_key, key=identity.subject).first() if identity else None
    return found.note if found else None
writes = token_bucket("writes", count=100_000, per=timedelta(seconds=1))
"""
SCHEMA = """
    from typing import Any
    from engine import Table, index, search_index
    class Item(Table, name="items"):
        key: str
        note: str = ""
        rank: int = 0
        extra: Any = None
        by_key = index("key", "rank")
    class Text(Table, name="texts"):
        words: str
        tag: str
        by_words = search_index("words", filter=("tag",))
"""
MARK = "zqx"  # in every payload, so that a statement that holds it is found
PAYLOADS = [
    "' OR '1'='1", "'; DROP TABLE items; --", '"; DROP TABLE "items"; --', "') UNION SELECT secret FROM _engine_meta--",
    "\\'; ATTACH DATABASE '/tmp/x' AS x; --", "1; PRAGMA writable_schema=ON", "?", ":key", "@x", "$x", "%", "_", "*",
    "key\0'; DROP TABLE items", "`items`", "[items]", "/* */", "x' COLLATE NOCASE --", "NEAR(a b)", "words:x", '" OR "',
    "^a", "a*", "{tag}: x", "(a OR b", "-a", "\u2019; DROP", "＇ OR 1=1", "randomblob(1e9)", "load_extension('x')",
]  # fmt: skip


class Recording(sqlite3.Connection):
    """A real connection that also remembers every statement."""

    statements: set[str] = set()

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        return super().cursor(_RecordingCursor)

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self.statements.add(sql)
        return super().execute(sql, *arguments)


class _RecordingCursor(sqlite3.Cursor):
    def execute(self, sql: str, *arguments: Any) -> "_RecordingCursor":
        Recording.statements.add(sql)
        return super().execute(sql, *arguments)

    def executemany(self, sql: str, *arguments: Any) -> "_RecordingCursor":
        Recording.statements.add(sql)
        return super().executemany(sql, *arguments)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The text of each statement from now on."""
    real = sqlite3.connect
    monkeypatch.setattr(
        engine.storage.connections.sqlite3, "connect", lambda *a, **options: real(*a, **options, factory=Recording)
    )
    monkeypatch.setattr(Recording, "statements", set())
    return Recording.statements


def tables_of(database: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True) as connection:
        return connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()


async def ask_everything(real: RealServer, payload: str) -> None:
    """The payload in the place of each text that a client may send."""
    p, first = payload, {"numItems": 2, "cursor": None}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("query", {"path": "m:by_key", "args": {"key": p}}),
        ("query", {"path": "m:since", "args": {"key": p, "rank": 1}}),
        ("query", {"path": "m:get", "args": {"id": p}}),
        ("query", {"path": "m:find", "args": {"text": p, "tag": p}}),
        ("query", {"path": "m:find", "args": {"text": f"a {p} b", "tag": ""}}),
        ("query", {"path": p, "args": {}}),
        ("query", {"path": "m:by_key", "args": {p: p, "key": "a"}}),
        ("query", {"path": "m:by_key", "args": {"key": p}, "format": p}),
        ("query", {"path": "m:by_key", "args": {"key": p}, "componentPath": p}),
        ("query", {"path": "m:page", "args": {"key": p, "paginationOpts": first}}),
        ("query", {"path": "m:page", "args": {"key": "a", "paginationOpts": {**first, "cursor": p}}}),
        ("query", {"path": "m:page", "args": {"key": "a", "paginationOpts": {**first, "endCursor": p}}}),
        ("query_at_ts", {"path": "m:by_key", "args": {"key": p}, "ts": p}),
        ("query_batch", {"queries": [{"path": "m:by_key", "args": {"key": p}}]}),
        ("mutation", {"path": "m:add", "args": {"key": p, "note": p, "extra": {"k": [p, {"n": p}]}}}),
        ("mutation", {"path": "m:edit", "args": {"id": p, "note": p}}),
        ("mutation", {"path": "m:limited", "args": {"key": p}}),
        ("mutation", {"path": "m:drop", "args": {"key": f"no {p}"}}),
        ("action", {"path": p, "args": {"x": p}}),
    ]  # fmt: skip
    for name, body in bodies:
        status, answer = await real.server.post(f"/api/{name}", body)
        assert status < 500, (name, body, answer)
    for headers in (real.token(p) if p.isprintable() else {}, {"Authorization": f"Bearer {quoted(p)}"}):
        reply = await real.ask("POST", "/api/query", data=b'{"path":"m:who","args":{}}', headers=headers)
        assert reply.status < 500
    for target in ("/api/run/{}/x", "/api/storage/{}", "/api/storage/upload?token={}", "/api/query?path={}&args={}"):
        reply = await real.ask("GET", target.replace("{}", percent(p)))
        assert reply.status < 500


def quoted(payload: str) -> str:
    return "".join(character for character in payload if " " <= character <= "~")


def percent(payload: str) -> str:
    return "".join(f"%{byte:02x}" for byte in payload.encode())


async def ask_on_a_socket(real: RealServer, payload: str) -> None:
    adds = [
        {"type": "Add", "queryId": 0, "udfPath": "m:by_key", "args": [{"key": payload}], "journal": payload},
        {"type": "Add", "queryId": 1, "udfPath": payload, "args": [{payload: payload}]},
        {"type": "Add", "queryId": 2, "udfPath": "m:page", "journal": payload,
         "args": [{"key": "a", "paginationOpts": {"numItems": 2, "cursor": None}}]},
    ]  # fmt: skip
    async with real.server.connected() as socket:
        hello = {**connect(), "sessionId": str(uuid.uuid4()), "lastCloseReason": payload}
        await socket.say(hello, query_set(0, *adds))
        told = await socket.hear()
        assert len(told["modifications"]) == 3
        await socket.say(
            {"type": "Mutation", "requestId": 0, "udfPath": "m:add", "args": [{"key": payload, "note": payload}]}
        )
        while (told := await socket.hear())["type"] != "MutationResponse":
            pass
        assert told["success"], told
        await socket.say({"type": "Authenticate", "baseVersion": 0, "tokenType": "User", "value": payload})
        while (told := await socket.hear())["type"] != "AuthError":
            pass


@pytest.mark.slow
async def test_no_text_of_a_client_becomes_part_of_a_statement(tmp_path: Path, statements: set[str]) -> None:
    choices = random.Random(SEED)
    payloads = [f"{payload} {MARK}" for payload in PAYLOADS]
    payloads += [
        f"{MARK}{''.join(choices.choices(list(chr(39) + chr(34) + ';-%*()[]?:@$' + chr(0)), k=9))}" for _ in range(20)
    ]
    async with serve_app(tmp_path, FUNCTIONS, schema=SCHEMA) as real:
        await real.app.call("m:add", key="a", note="first")
        before = tables_of(tmp_path / "engine.db")
        for payload in payloads:
            await ask_everything(real, payload)
            await ask_on_a_socket(real, payload)
            found = await real.app.call("m:by_key", key=payload)
            assert [item.note for item in found] == [payload] * 2, "it is kept as it is, and nothing else is found"
        await real.app.idle()
        assert tables_of(tmp_path / "engine.db") == before
        assert len(await real.app.call("m:by_key", key="a")) == 1
        assert len(statements) > 30, "they were recorded"
        assert [sql for sql in statements if MARK in sql] == []


async def test_the_recorder_sees_a_value_that_is_written_into_a_statement(tmp_path: Path, statements: set[str]) -> None:
    """The control."""
    async with serve_app(tmp_path, FUNCTIONS, schema=SCHEMA) as real:
        real.engine.database.writer.execute(f"SELECT '{MARK}'")
        assert [sql for sql in statements if MARK in sql] == [f"SELECT '{MARK}'"]


@pytest.mark.parametrize("name", ['x"; DROP TABLE items; --', "x y", "1x", "naïve", "x'"])
def test_names_of_tables_are_checked_when_they_are_declared(name: str) -> None:
    def declare() -> None:
        compile_schema([type("T", (Table,), {"__annotations__": {"a": str}}, name=name)], Limits())

    with pytest.raises(SchemaError):
        declare()
