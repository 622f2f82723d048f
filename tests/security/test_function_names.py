"""What a client writes as a function's path is looked up among registered names, and nothing else happens to it."""

import random
import re
import sys
from pathlib import Path
from typing import Any

from engine.errors import FunctionNotFound
from tests.server.fakes import SocketClient
from tests.server.real import RealServer, serve_app
from tests.sync.fakes import connect, query_set

FUNCTIONS = {
    "m": """
    from functions._helpers import helper
    @query
    async def one(ctx) -> int: return 1
    @query
    async def get_all(ctx) -> int: return 1
    @query(internal=True)
    async def secret(ctx) -> str: return "SECRET"
    @mutation(internal=True)
    async def wipe(ctx) -> str: return "SECRET"
    @mutation
    async def write(ctx) -> str: return "SECRET"
    def plain(ctx) -> str: return "SECRET"
    """,
    "_helpers": """
    @query
    async def helper(ctx) -> str: return "SECRET"
    """,
    "deep/inner": """
    @query(internal=True)
    async def secret(ctx) -> str: return "SECRET"
    """,
}
KNOWN = {"m:one", "m:get_all", "m:getAll"}  # and with .js behind the module
COUNT = 10_000
SEED = 20_261_121

PARTS = [
    *(
        "m one get_all getAll secret wipe write plain helper _helpers deep inner deep/inner functions schema engine"
    ).split(),
    *(
        "__init__ __class__ __globals__ __dict__ __builtins__ __import__ __subclasses__ __name__ __mro__ default"
    ).split(),
    *("os sys subprocess eval exec open system _engine_meta _storage _scheduled_jobs sqlite_master").split(),
    *("../ ../../etc/passwd ..\\ /etc/passwd . .. / // %2e%2e%2f file:///etc/passwd C:\\ ~ $HOME ${IFS} `id`").split(),
    *("\0 m\0 \0m one\0 \u200b \u202e ｍ ⅿ о\u0435 оne onе ONE M Ｏne ſecret ₘ m\u0301 \ufeffm \ud800").split(" "),
    *("' \" ; -- /* %s {} {0.__class__} %(x)s <script> \r\n \t").split(" "),
    *("a:b a::b :b a: : :: ::: m:one: :m:one m:one:default m.js m.js.js m.py m.one m/one m:one.js js .js").split(),
    "a" * 5_000,
    "",
    "🦀",
]


NEAR = [  # to names that are there: internal, of another kind, undecorated, helpers, other letters
    *("m:secret m:wipe m:write m:plain m:helper _helpers:helper deep/inner:secret m:SECRET m:One M:one").split(),
    *("m: one", " m:one", "m:one ", "m:one\0", "m:o\u0301ne", "ｍ:one", "m：one", "m:ｏne"),
]


def names() -> list[str]:
    """As many different paths that name no public query."""
    choices = random.Random(SEED)
    found: dict[str, None] = dict.fromkeys(NEAR)
    while len(found) < COUNT:
        separator = choices.choice([":", ":", ":", "/", ".", "", "::", "\0", "："])
        parts = [choices.choice(PARTS) for _ in range(choices.randint(1, 4))]
        path = separator.join(parts)
        if choices.random() < 0.2:
            place = choices.randint(0, len(path))
            path = path[:place] + chr(choices.choice([0, 10, 46, 47, 58, 95, 0x200B, 0xFF1A])) + path[place:]
        if re.sub(r"\.js(?=:)", "", path) not in KNOWN:
            found[path] = None
    return list(found)


def neutral(message: str) -> str:
    """Without what is different in every answer: the request id, and the path that was asked for."""
    message = re.sub(r"^\[Request ID: [0-9a-f]+\] Server Error: ", "", message)
    return re.sub(r"(?s)function for '.*'\. `engine", "function for '…'. `engine", message)


SAME = "FunctionNotFound: Could not find public query function for '…'. `engine functions` lists what there is."


async def test_10_000_names_that_are_no_public_query_are_one_error_and_import_nothing(tmp_path: Path) -> None:
    async with serve_app(tmp_path, FUNCTIONS, mode="production") as real:
        modules, backend = set(sys.modules), real.engine.backend
        told = set()
        paths = names()
        assert len(paths) == COUNT
        for path in paths:
            result = await backend.http_query(path, b"{}", None)
            assert result.failure is not None, repr(path)
            told.add((result.failure.code, neutral(result.failure.message), result.failure.data))
        assert told == {("FunctionNotFound", SAME, None)}
        assert set(sys.modules) == modules
        assert await socket_says(real, [path for path in paths[:300] if "\ud800" not in path]) == {(SAME, False)}
        assert await http_says(real, [path for path in paths[:300] if "\ud800" not in path]) == {(200, SAME, False)}


async def socket_says(real: RealServer, paths: list[str]) -> set[tuple[str, bool]]:
    async with real.server.connected() as socket:
        return {await failure_of(socket, number, path) for number, path in enumerate(paths)}


async def failure_of(socket: SocketClient, number: int, path: str) -> tuple[str, bool]:
    add = {"type": "Add", "queryId": number, "udfPath": path, "args": [{}]}
    await socket.say(*([connect()] if number == 0 else []), query_set(number, add))
    (modification,) = (await socket.hear())["modifications"]
    return neutral(modification["errorMessage"]), "errorData" in modification


async def http_says(real: RealServer, paths: list[str]) -> set[tuple[int, str, bool]]:
    told = set()
    for path in paths:
        status, answer = await real.server.post("/api/query", {"path": path, "args": {}})
        told.add((status, neutral(answer["errorMessage"]), "errorData" in answer))
    return told


async def test_a_name_that_is_one_is_found_so_the_test_above_can_fail(tmp_path: Path) -> None:
    async with serve_app(tmp_path, FUNCTIONS, mode="production") as real:
        for path in (*KNOWN, "m.js:one"):
            result = await real.engine.backend.http_query(path, b"{}", None)
            assert (result.failure, result.value) == (None, b"1"), path


async def test_an_error_says_of_a_long_name_its_beginning_only(tmp_path: Path) -> None:
    assert len(str(FunctionNotFound("x" * 1_000_000, "query"))) < 500


async def test_an_admin_is_told_apart_by_the_key_alone(tmp_path: Path) -> None:
    """Internal functions are there for admins; who only says so finds nothing."""
    async with serve_app(tmp_path, FUNCTIONS, mode="production") as real:
        claims: list[dict[str, Any]] = [{}, {"componentPath": "x"}, {"isAdmin": True}, {"internal": True}]
        for claim in claims:
            status, answer = await real.server.post("/api/query", {"path": "m:secret", "args": {}, **claim})
            assert (status, answer["status"]) == (200, "error")
            assert "SECRET" not in str(answer)
        for headers in ({}, real.token("admin"), {"Authorization": "Convex adm_guess"}):
            reply = await real.ask("POST", "/api/function", data=b'{"path":"m:secret","args":{}}', headers=headers)
            assert reply.status in (401, 403)
