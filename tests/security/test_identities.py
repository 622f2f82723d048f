"""A result is shared with whoever would get the same, and with nobody else, over every door and in every order."""

import itertools
import sys
from pathlib import Path

import pytest

from engine.identity import Identity, Part
from tests.server.fakes import SocketClient
from tests.server.real import RealServer, serve_app
from tests.sync.fakes import connect, query_set

FUNCTIONS = """
def me(ctx) -> str:
    identity = ctx.auth.identity()
    return "nobody" if identity is None else identity.subject
@query
async def subject(ctx) -> str: return me(ctx)
@query
async def token_identifier(ctx) -> str:
    identity = ctx.auth.identity()
    return "nobody" if identity is None else identity.token_identifier.partition("|")[2]
@query
async def claim(ctx) -> str:
    identity = ctx.auth.identity()
    return "nobody" if identity is None else identity.claims["sub"]
@query
async def all_claims(ctx) -> str:
    identity = ctx.auth.identity()
    return "nobody" if identity is None else dict(identity.claims)["sub"]
@query
async def nested(ctx) -> str: return await ctx.run_query(subject)
@query
async def deeper(ctx) -> str: return await ctx.run_query(nested)
@query
async def late(ctx) -> str:
    for item in await ctx.db.query(Item).collect():
        if item.key == "ask": return me(ctx)
    return me(ctx)
@query
async def own_rows(ctx) -> str:
    return ",".join(item.note for item in await ctx.db.query(Item).collect() if item.note == me(ctx)) or "nobody"
@query
async def by_policy(ctx) -> str:
    return ",".join([name.name for name in await ctx.db.query(Name).collect()]) or "nobody"
@policy(Name)
class Names(Policy[None]):
    def read(self, name): return self.identity is not None and name.name == self.identity.subject
    def insert(self, name): return True
@mutation
async def fill(ctx) -> None:
    for person in ("alice", "bob", "carol"):
        await ctx.db.insert(Item(key="ask", note=person))
        await ctx.db.insert(Name(name=person))
@mutation
async def touch(ctx) -> None: await ctx.db.insert(Item(key="other"))
"""
PATHS = "subject token_identifier claim all_claims nested deeper late own_rows by_policy".split()
PEOPLE = ("alice", "bob", "carol", None)


async def over_http(real: RealServer, path: str, person: str | None) -> str:
    headers = {} if person is None else real.token(person)
    _, answer = await real.server.post("/api/query", {"path": f"m:{path}", "args": {}}, headers=headers)
    assert answer["status"] == "success", answer
    return str(answer["value"])


async def on_a_socket(real: RealServer, socket: SocketClient, person: str | None, paths: list[str]) -> dict[str, str]:
    """What each query gives."""
    messages = [connect()]
    if person is not None:
        value = real.token(person)["Authorization"].split()[1]
        messages.append({"type": "Authenticate", "baseVersion": 0, "tokenType": "User", "value": value})
    adds = [{"type": "Add", "queryId": n, "udfPath": f"m:{path}", "args": [{}]} for n, path in enumerate(paths)]
    await socket.say(*messages, query_set(0, *adds))
    told = (await socket.hear())["modifications"]
    return {paths[each["queryId"]]: each["value"] for each in told}


async def mistakes_of(real: RealServer, paths: list[str]) -> list[tuple[object, ...]]:
    """Each answer that is another person's, whoever asked before whom."""
    await real.engine.mutation("m:fill")
    mistakes: list[tuple[object, ...]] = []
    for order in itertools.permutations(PEOPLE):
        await real.engine.mutation("m:touch")  # what was kept is in doubt, and made anew by whoever comes first
        for path, person in itertools.product(paths, order):
            if (got := await over_http(real, path, person)) != (person or "nobody"):
                mistakes.append(("http", path, person, got))
    for order in (PEOPLE, PEOPLE[::-1]):
        async with real.server.connected() as a, real.server.connected() as b, real.server.connected() as c:
            for socket, person in zip((a, b, c), order, strict=False):
                for path, got in (await on_a_socket(real, socket, person, paths)).items():
                    if got != (person or "nobody"):
                        mistakes.append(("socket", path, person, got))
    return mistakes


async def test_nobody_is_given_what_was_made_for_another(tmp_path: Path) -> None:
    async with serve_app(tmp_path, FUNCTIONS) as real:
        assert await mistakes_of(real, PATHS) == []


async def test_a_cache_that_forgets_who_asked_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""

    def the_same_for_all(identity: Identity | None, part: Part) -> object:
        return identity is not None

    for name, module in list(sys.modules.items()):
        if name.startswith("engine.") and hasattr(module, "part_of"):
            monkeypatch.setattr(module, "part_of", the_same_for_all)
    async with serve_app(tmp_path, FUNCTIONS) as real:
        found = {(door, path) for door, path, *_ in await mistakes_of(real, ["subject", "claim"])}
    assert found == {("http", "subject"), ("http", "claim"), ("socket", "subject"), ("socket", "claim")}
