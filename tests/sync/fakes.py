"""A backend for sessions that a test runs by hand, and a client that speaks to a session without a socket.

The fake keeps the promises of `engine/sync/backend.py`: of one commit, all `done` callbacks come before `on_ready`.
Its queries return whatever the test last put under their path.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from engine.identity import Identity
from engine.limits import Limits
from engine.sync.backend import ActionOutcome, MutationOutcome
from engine.sync.protocol import decode_timestamp
from engine.sync.session import Session
from engine.sync.shared_frames import SharedFrames
from engine.testing import ManualClock

SESSION_ID = "3f0e8f6c-0c51-4c0a-9b6a-5b8f0c4c2d10"


class FakeFailure(msgspec.Struct, frozen=True):
    message: str
    data: bytes | None = None
    code: str = "FunctionFailed"


class FakeResult(msgspec.Struct):
    value: bytes | None
    failure: FakeFailure | None = None
    log_lines: tuple[str, ...] = ()
    journal: str | None = None
    encoded: bytes | None = None
    ts: int = 0
    http_plain: bytes | None = None
    http_encoded: bytes | None = None


class FakeChange(msgspec.Struct, frozen=True):
    ts: int
    results: Mapping[int, FakeResult]


class FakeVerified(msgspec.Struct, frozen=True):
    identity: Identity | None
    expires_at_ms: float | None = None
    is_admin: bool = False


class FakeView:
    """Shows each query the backend's result for its path; every result object is given once."""

    def __init__(self, backend: "FakeBackend", on_ready: Callable[[], None]) -> None:
        self.backend, self.on_ready = backend, on_ready
        self.paths: dict[int, str] = {}
        self.asked: dict[int, tuple[bytes, str | None]] = {}  # arguments and journal
        self.identity: Identity | None = None
        self.is_closed = False
        self.taken_count = 0  # changes that were taken
        self._taken: dict[int, FakeResult] = {}

    def set_identity(self, identity: Identity | None) -> None:
        self.identity = identity

    def add(self, query_id: int, path: str, arguments: bytes, journal: str | None) -> None:
        self.paths[query_id], self.asked[query_id] = path, (arguments, journal)

    def remove(self, query_id: int) -> None:
        del self.paths[query_id]
        self._taken.pop(query_id, None)

    def take(self) -> FakeChange | None:
        if any(path in self.backend.slow_paths for path in self.paths.values()):
            return None
        results = {query_id: self.backend.results[path] for query_id, path in self.paths.items()}
        news = {query_id: result for query_id, result in results.items() if self._taken.get(query_id) is not result}
        self._taken.update(news)
        self.taken_count += 1
        return FakeChange(self.backend.view_ts or self.backend.ts, news)

    def take_only(self, since_ts: int) -> tuple[int, FakeResult] | None:
        results = {query_id: self.backend.results[path] for query_id, path in self.paths.items()}
        news = {query_id: result for query_id, result in results.items() if self._taken.get(query_id) is not result}
        if len(news) != 1 or self.backend.slow_paths:
            return None
        ((query_id, result),) = news.items()
        if result.value is None or result.ts < since_ts:
            return None
        self._taken[query_id] = result
        self.taken_count += 1
        return query_id, result

    def close(self) -> None:
        self.is_closed = True


class FakeRequest(msgspec.Struct, eq=False):
    """A mutation or action that was started and waits for the test to end it."""

    path: str
    arguments: bytes
    identity: Identity | None
    done: Callable[[Any], None]
    request_id: int | None = None
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeBackend:
    """Plays the engine: `commit` ends mutations and shows results as one commit."""

    def __init__(self, *, ts: int = 1000) -> None:
        self.ts = ts
        self.view_ts: int | None = None  # a held view: what it takes is older than the newest commit
        self.results: dict[str, FakeResult] = {}
        self.slow_paths: set[str] = set()  # have no result yet
        self.views: list[FakeView] = []
        self.mutations: list[FakeRequest] = []  # running
        self.actions: list[FakeRequest] = []  # running
        self.started: list[str] = []  # paths of mutations and actions, in the order they were started
        self.recorded: dict[tuple[str, int], MutationOutcome] = {}
        self.seen: list[tuple[str, int]] = []
        self.connections: list[tuple[str, int | str | None]] = []  # "connected", or the code that a client went with

    def show(self, path: str, value: Any, **more: Any) -> None:
        self.results[path] = FakeResult(json.dumps(value).encode(), ts=self.ts, **more)

    def fail(self, path: str, failure: FakeFailure, **more: Any) -> None:
        self.results[path] = FakeResult(None, failure, ts=self.ts, **more)

    def commit(self, *mutations: FakeRequest, value: Any = None, **shown: Any) -> int:
        """One commit of these mutations, after which queries return what is `shown`."""
        self.ts += 1
        for path, result in shown.items():
            self.show(path, result)
        for mutation in mutations:
            self.mutations.remove(mutation)
            mutation.done(MutationOutcome(ts=self.ts, value=json.dumps(value).encode()))
        self.tell()
        return self.ts

    def tell(self) -> None:
        for view in self.views:
            view.on_ready()

    def refuse(self, mutation: FakeRequest, failure: FakeFailure) -> None:
        self.mutations.remove(mutation)
        mutation.done(MutationOutcome(ts=None, value=None, failure=failure))

    def end(self, action: FakeRequest, value: Any = None, failure: FakeFailure | None = None) -> None:
        self.actions.remove(action)
        encoded = None if failure is not None else json.dumps(value).encode()
        action.done(ActionOutcome(value=encoded, failure=failure))

    # -- the Backend of sessions

    def published_ts(self) -> int:
        return self.ts

    def make_view(self, on_ready: Callable[[], None]) -> FakeView:
        view = FakeView(self, on_ready)
        self.views.append(view)
        return view

    def recorded_outcome(
        self, session_id: str, request_id: int, identity: Identity | None, path: str, arguments: bytes
    ) -> MutationOutcome | None:
        return self.recorded.get((session_id, request_id))

    def start_mutation(
        self,
        path: str,
        arguments: bytes,
        identity: Identity | None,
        session_id: str,
        request_id: int,
        done: Callable[[MutationOutcome], None],
    ) -> None:
        self.started.append(path)
        if path == "refused:at_once":
            done(MutationOutcome(ts=None, value=None, failure=FakeFailure("no", code="Overloaded")))
            return
        self.mutations.append(FakeRequest(path, arguments, identity, done, request_id))

    def start_action(
        self, path: str, arguments: bytes, identity: Identity | None, done: Callable[[ActionOutcome], None]
    ) -> FakeRequest:
        self.started.append(path)
        request = FakeRequest(path, arguments, identity, done)
        self.actions.append(request)
        if path == "refused:at_once":
            self.end(request, failure=FakeFailure("no", code="Overloaded"))
        return request

    async def authenticate(self, credential: Any) -> FakeVerified:
        raise AssertionError("a session leaves that to its door")

    def session_connected(self, session_id: str) -> None:
        self.connections.append((session_id, "connected"))

    def session_gone(self, session_id: str, close_code: int | None) -> None:
        self.connections.append((session_id, close_code))

    def client_saw(self, session_id: str, up_to_request_id: int) -> None:
        self.seen.append((session_id, up_to_request_id))


class FakeClient:
    """Says messages to a session, and checks what official clients would check in what comes back."""

    def __init__(
        self,
        backend: FakeBackend,
        *,
        clock: ManualClock | None = None,
        limits: Limits | None = None,
        accepts_chunks: bool = False,
        shared: SharedFrames | None = None,
    ) -> None:
        self.backend = backend
        self.written: list[bytes] = []  # past the outbox, as sessions in step do; only with `shared`
        self.clock = clock or ManualClock()
        self.wake_count = 0
        self.version: dict[str, Any] = {"querySet": 0, "identity": 0, "ts": "AAAAAAAAAAA="}
        self.state: dict[int, Any] = {}  # query id → value, or the text of its error
        self.session = Session(
            backend,
            limits or Limits(),
            self.clock,
            wake=self._woken,
            accepts_chunks=accepts_chunks,
            write=None if shared is None else self._write,
            shared=shared,
        )

    @property
    def view(self) -> FakeView:
        return self.backend.views[-1]

    def _woken(self) -> None:
        self.wake_count += 1

    def _write(self, frame: bytes) -> None:
        assert not self.session.outbox, "frames stay in order"
        self.written.append(frame)

    def say(self, *messages: dict[str, Any]) -> list[dict[str, Any]]:
        """Send messages in one burst; gives what the session answers."""
        for message in messages:
            self.session.receive(json.dumps(message))
        return self.hear()

    def hear(self) -> list[dict[str, Any]]:
        """Flush as a door does until nothing more comes; gives what came, in order."""
        heard = []
        while True:
            self.wake_count = 0
            self.session.flush()
            frames, self.session.outbox = self.session.outbox, []
            texts, self.written = [*self.written, *map(b"".join, frames)], []
            for text in texts:
                heard.append(json.loads(text))
                self._check(heard[-1])
            if not texts and not self.wake_count:
                return heard

    def _check(self, message: dict[str, Any]) -> None:
        if message["type"] != "Transition":
            return
        start, end = message["startVersion"], message["endVersion"]
        assert start == self.version, "each Transition starts where the one before ended"
        assert end["querySet"] >= start["querySet"]
        assert end["identity"] >= start["identity"]
        assert decode_timestamp(end["ts"]) >= decode_timestamp(start["ts"])
        self.version = end
        ids = [modification["queryId"] for modification in message["modifications"]]
        assert len(ids) == len(set(ids)), "one modification for each query"
        for modification in message["modifications"]:
            match modification["type"]:
                case "QueryUpdated":
                    self.state[modification["queryId"]] = modification["value"]
                case "QueryFailed":
                    self.state[modification["queryId"]] = modification["errorMessage"]
                case "QueryRemoved":
                    self.state.pop(modification["queryId"], None)

    @property
    def ts(self) -> int:
        return decode_timestamp(self.version["ts"])


def connect(**more: Any) -> dict[str, Any]:
    return {
        "type": "Connect",
        "sessionId": SESSION_ID,
        "connectionCount": 0,
        "lastCloseReason": "InitialConnect",
        **more,
    }


def add(query_id: int, path: str, *args: Any, **more: Any) -> dict[str, Any]:
    return {"type": "Add", "queryId": query_id, "udfPath": path, "args": list(args) or [{}], **more}


def remove(query_id: int) -> dict[str, Any]:
    return {"type": "Remove", "queryId": query_id}


def query_set(base: int, *modifications: dict[str, Any], to: int | None = None) -> dict[str, Any]:
    version = base + 1 if to is None else to
    return {"type": "ModifyQuerySet", "baseVersion": base, "newVersion": version, "modifications": list(modifications)}


def mutation(request_id: int, path: str = "chat:send", *args: Any, **more: Any) -> dict[str, Any]:
    return {"type": "Mutation", "requestId": request_id, "udfPath": path, "args": list(args) or [{}], **more}


def action(request_id: int, path: str = "mail:send", **more: Any) -> dict[str, Any]:
    return {"type": "Action", "requestId": request_id, "udfPath": path, "args": [{}], **more}


def authenticate(base: int, token: str | None = "token", **more: Any) -> dict[str, Any]:
    if token is None:
        return {"type": "Authenticate", "baseVersion": base, "tokenType": "None"}
    return {"type": "Authenticate", "baseVersion": base, "tokenType": "User", "value": token, **more}


def types(messages: list[dict[str, Any]]) -> list[str]:
    return [message["type"] for message in messages]
