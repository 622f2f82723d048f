"""What a production server says of failures, to their callers and in its log: a snapshot of every kind.

Each request carries secrets in the places where secrets are: none of them may come back or be written down. A change of
the snapshot is a change of what strangers learn; look at it as such.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

from engine.auth.admin import digest_of, make_admin_key
from engine.observe.log import log_events
from engine.testing import ManualClock
from tests.server.real import RealServer, serve_app
from tests.sync.fakes import connect, query_set

FUNCTIONS = """
@query
async def echo(ctx, text: str) -> str: return text
@query(internal=True)
async def inner(ctx) -> int: return 1
@query
async def broken(ctx, text: str) -> int: return 1 // 0
@query
async def typed(ctx, n: int) -> int: return n
@query
async def wrong(ctx, text: str) -> int: return text
@mutation
async def taken(ctx, text: str) -> None:
    await ctx.db.insert(Name(name="one")); await ctx.db.insert(Name(name="one"))
@mutation
async def told(ctx, text: str) -> None: raise AppError({"code": "FULL"})
@query
async def page(ctx, pagination_opts: PaginationOptions) -> Page[Item]:
    return await ctx.db.query(Item).paginate(pagination_opts)
"""

KEY, OTHER_KEY = make_admin_key(ManualClock()), make_admin_key(ManualClock(seed=5))
SECRETS = {
    "ARGUMENT": "s3cret-argument",
    "BODY": "s3cret-body",
    "COOKIE": "s3cret-cookie",
    "HEADER": "s3cret-header",
    "KEY": KEY,
    "OTHER KEY": OTHER_KEY,
    "DIGEST": digest_of(KEY),
    "BEARER": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzM2NyZXQifQ.c2VjcmV0LXNpZ25hdHVyZQ",
}
CARRIED = {"Cookie": SECRETS["COOKIE"], "X-Api-Key": SECRETS["HEADER"]}

ASKS: list[tuple[str, str, Any, dict[str, str]]] = [
    ("function fails", "/api/query", {"path": "m:broken", "args": {"text": SECRETS["ARGUMENT"]}}, {}),
    ("wrong argument", "/api/query", {"path": "m:typed", "args": {"n": SECRETS["ARGUMENT"]}}, {}),
    ("unknown argument", "/api/query", {"path": "m:typed", "args": {"n": 1, "m": SECRETS["ARGUMENT"]}}, {}),
    ("wrong result", "/api/query", {"path": "m:wrong", "args": {"text": SECRETS["ARGUMENT"]}}, {}),
    ("constraint", "/api/mutation", {"path": "m:taken", "args": {"text": SECRETS["ARGUMENT"]}}, {}),
    ("app error", "/api/mutation", {"path": "m:told", "args": {"text": SECRETS["ARGUMENT"]}}, {}),
    ("unknown function", "/api/query", {"path": "no:such", "args": {"text": SECRETS["ARGUMENT"]}}, {}),
    ("internal function", "/api/query", {"path": "m:inner", "args": {}}, {}),
    ("cursor", "/api/query", {"path": "m:page", "args": {"paginationOpts": {"numItems": 1, "cursor": "AAAA"}}}, {}),
    ("not JSON", "/api/query", SECRETS["BODY"].encode(), {}),
    ("wrong JSON", "/api/query", {"path": [SECRETS["BODY"]]}, {}),
    ("bad token", "/api/query", {"path": "m:echo", "args": {}}, {"Authorization": f"Bearer {SECRETS['BEARER']}"}),
    ("bad scheme", "/api/query", {"path": "m:echo", "args": {}}, {"Authorization": f"Basic {SECRETS['BEARER']}"}),
    ("bad admin key", "/api/function", {"path": "m:inner", "args": {}}, {"Authorization": f"Convex {OTHER_KEY}"}),
    ("no admin key", "/api/function", {"path": "m:inner", "args": {}}, {}),
    ("key in a page", "/api/function", {"path": "m:inner"}, {"Authorization": f"Convex {KEY}", "Origin": "https://x.y"}),
    ("key in the address", f"/api/function?key={KEY}&adminKey={KEY}", {"path": "m:inner", "args": {}}, {}),
    ("digest as the key", "/api/function", {"path": "m:inner"}, {"Authorization": f"Convex {digest_of(KEY)}"}),
    ("upload", f"/api/storage/upload?token={SECRETS['BODY']}", SECRETS["BODY"].encode(), {}),
    ("address", f"/nowhere/{SECRETS['BODY']}?token={SECRETS['BODY']}", {}, {}),
]  # fmt: skip

SNAPSHOT = Path(__file__).with_name("redaction.txt")


def neutral(text: str) -> str:
    """Without what is different each time: request ids and times."""
    text = re.sub(r"Request ID: [0-9a-f]+", "Request ID: …", text)
    text = re.sub(r"\[[0-9a-f]{16}\]", "[…]", text)
    return re.sub(r"(?m)^\S+Z ", "", text)


def told(log: str) -> str:
    """The log without the frames of tracebacks, which change with every line of code; each kind of line once."""
    lines = [line for line in log.splitlines() if not re.search(r"\[…\] (  |Traceback)|connections at most", line)]
    return "\n".join(dict.fromkeys(line for line in lines if not line.endswith("[…] ")))


async def answers_of(real: RealServer) -> str:
    lines = []
    for name, path, body, headers in ASKS:
        status, answer = await real.server.post(path, body, headers=CARRIED | headers)
        lines.append(f"{name}: {status} {json.dumps(answer, separators=(',', ':'), ensure_ascii=False)}")
    return neutral("\n".join(lines))


async def socket_answers_of(real: RealServer) -> str:
    """What is said over sockets."""
    heard = []
    argument = {"text": SECRETS["ARGUMENT"]}
    adds = [
        {"type": "Add", "queryId": number, "udfPath": path, "args": [argument]}
        for number, path in enumerate(("m:broken", "no:such"))
    ]
    last: list[dict[str, Any]] = [
        {"type": "Authenticate", "baseVersion": 0, "tokenType": "User", "value": SECRETS["BEARER"]},
        {"type": "Authenticate", "baseVersion": 0, "tokenType": "Admin", "value": OTHER_KEY},
        {"type": SECRETS["BODY"]},
        {"type": "Mutation", "requestId": SECRETS["BODY"]},
    ]
    for message in last:
        async with real.server.connected(headers=CARRIED) as socket:
            await socket.say(connect(lastCloseReason=SECRETS["BODY"]), query_set(0, *adds))
            heard.append(await socket.hear())
            await socket.say(message)
            heard.append(await socket.hear())
    return neutral("\n".join(json.dumps(each) for each in heard))


def found_in(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


async def test_no_failure_shows_or_writes_down_a_secret(tmp_path: Path, written: io.StringIO) -> None:
    async with serve_app(tmp_path, FUNCTIONS, mode="production", admin_key_digests=(digest_of(KEY),)) as real:
        log_events(real.engine.events)
        answers = await answers_of(real)
        on_sockets = await socket_answers_of(real)
        log = neutral(written.getvalue())
    assert found_in(log) == []
    assert found_in(answers) == ["ARGUMENT"], "the caller's own wrong one, told to the caller"
    assert found_in(on_sockets) == []
    for hidden in ("Traceback", "File ", "ZeroDivisionError", "sqlite", "SELECT", str(tmp_path), "engine/"):
        assert hidden not in answers + on_sockets
    snapshot = f"{answers}\n\n{told(log)}\n"
    assert snapshot == SNAPSHOT.read_text(encoding="utf-8"), f"if that is meant, it is now:\n{snapshot}"


async def test_the_right_key_opens_so_the_test_above_asks_rightly(tmp_path: Path) -> None:
    async with serve_app(tmp_path, FUNCTIONS, mode="production", admin_key_digests=(digest_of(KEY),)) as real:
        headers = {"Authorization": f"Convex {KEY}"}
        status, answer = await real.server.post("/api/function", {"path": "m:inner", "args": {}}, headers=headers)
        assert (status, answer["value"]) == (200, 1.0)


async def test_while_developing_the_same_failures_are_told_whole(tmp_path: Path) -> None:
    """The control: it is the mode that hides them, and the search would find them."""
    async with serve_app(tmp_path, FUNCTIONS, admin_key_digests=(digest_of(KEY),)) as real:
        answers = await answers_of(real)
    assert "ZeroDivisionError" in answers
    assert "File " in answers
