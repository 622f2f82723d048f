"""A signed-in client of the sync protocol (sections 3 to 6 of its specification), for load only.

Invariants
  1. A mutation is *answered* with its MutationResponse: it is durable. It is *over* where an official client's promise
     resolves: at the first Transition after the response. A session's mutations are answered in the order they were
     sent.
  2. A mutation that fails, a query that fails, a lost connection: each ends the whole run by `Crowd.lose`.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from bench.load.connection import Connection, Receiver

# The letter after `{"type":"` tells the messages apart: looking is all that a delivery costs here.
_TYPE_INDEX = len('{"type":"')
_TRANSITION, _MUTATION_RESPONSE, _PING = b"TMP"
T = TypeVar("T")
Query = tuple[str, dict[str, Any]]  # function path, arguments
_OPENING_COUNT_MAX = 50  # clients that are between connecting and their first result at one time


def _nothing() -> None:
    pass


class Client:
    """One user on one WebSocket."""

    def __init__(self, crowd: "Crowd", subject: str) -> None:
        self.subject = subject
        self.on_result: Receiver | None = None  # shown each Transition once the client is ready
        self.transition_count = 0
        self._crowd = crowd
        self._connection: Connection  # set by `open`
        self._request_count = 0
        self._query_set_version = 0
        self._query_count = 0
        self._unanswered: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()  # on_answer, on_done
        self._answered: list[Callable[[], None]] = []  # on_done of those that wait for a Transition
        self._next_transition: asyncio.Future[bytes] | None = None

    async def open(self, token: str, queries: Sequence[Query] = ()) -> bytes:
        """Connect, sign in and subscribe, like the npm client in one burst; the first Transition."""
        self._connection = await self._crowd.connect(self._receive)
        connect = {"type": "Connect", "sessionId": str(uuid.uuid4()), "connectionCount": 0, "clientTs": 0}
        authenticate = {"type": "Authenticate", "baseVersion": 0, "tokenType": "User", "value": token}
        return await self._transition_after(
            connect | {"lastCloseReason": "InitialConnect"}, authenticate, self._subscribe(queries)
        )

    async def watch(self, path: str, arguments: dict[str, Any]) -> bytes:
        """Subscribe to a query; the Transition with its first result."""
        return await self.watch_all([(path, arguments)])

    async def watch_all(self, queries: Sequence[Query]) -> bytes:
        """Subscribe to queries in one message; the Transition with their first results."""
        transition = await self._transition_after(self._subscribe(queries))
        if b'"QueryUpdated"' not in transition or b'"QueryFailed"' in transition:
            raise RuntimeError(f"{queries[0]} and others failed: {transition[:500]!r}")
        return transition

    def start_mutation(
        self,
        path: str,
        arguments: dict[str, Any],
        on_done: Callable[[], None] = _nothing,
        on_answer: Callable[[], None] = _nothing,
    ) -> None:
        """Send a mutation; `on_answer` is called when it is answered, `on_done` when it is over (invariant 1)."""
        self._unanswered.append((on_answer, on_done))
        request_id, self._request_count = self._request_count, self._request_count + 1
        message = {"type": "Mutation", "requestId": request_id, "udfPath": path, "args": [arguments]}
        self._connection.send(msgspec.json.encode(message))

    async def mutate(self, path: str, arguments: dict[str, Any]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.start_mutation(path, arguments, lambda: done.set_result(None))
        await done

    def only_count(self, on_size: Callable[[int], None]) -> None:
        """From now on look at no frame, and tell the size of each."""
        self._connection.only_count(on_size)

    @property
    def is_busy(self) -> bool:
        """Whether a mutation is under way."""
        return bool(self._unanswered or self._answered)

    def _subscribe(self, queries: Sequence[Query]) -> dict[str, Any]:
        version, self._query_set_version = self._query_set_version, self._query_set_version + 1
        first, self._query_count = self._query_count, self._query_count + len(queries)
        modifications = [
            {"type": "Add", "queryId": query_id, "udfPath": path, "args": [arguments]}
            for query_id, (path, arguments) in enumerate(queries, first)
        ]
        message = {"type": "ModifyQuerySet", "baseVersion": version, "newVersion": version + 1}
        return message | {"modifications": modifications}

    async def _transition_after(self, *messages: dict[str, Any]) -> bytes:
        self._next_transition = asyncio.get_running_loop().create_future()
        self._connection.send(*[msgspec.json.encode(message) for message in messages])
        return await self._next_transition

    def _receive(self, buffer: bytearray, start: int, end: int) -> None:
        kind = buffer[start + _TYPE_INDEX]
        if kind == _TRANSITION:
            self.transition_count += 1
            if self._next_transition is not None:
                self._next_transition.set_result(bytes(buffer[start:end]))
                self._next_transition = None
            if self.on_result is not None:
                self.on_result(buffer, start, end)
            if self._answered:
                over, self._answered = self._answered, []
                for on_done in over:
                    on_done()
        elif kind == _MUTATION_RESPONSE and buffer.find(b'"success":true', start, end) >= 0:
            on_answer, on_done = self._unanswered.popleft()
            self._answered.append(on_done)
            on_answer()
        elif kind != _PING:
            self._crowd.lose(f"{self.subject} got {bytes(buffer[start : min(end, start + 500)])!r}")


class Crowd:
    """All connections of a workload: open together, and ended together when anything goes wrong with one."""

    def __init__(self, port: int, connection_class: type[Connection] = Connection) -> None:
        self._port, self._connection_class = port, connection_class
        self._connections: list[Connection] = []
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def connect(self, on_frame: Receiver) -> Connection:
        """One more socket."""
        connection = await self._connection_class.open(self._port, on_frame, self.lose)
        self._connections.append(connection)
        return connection

    async def join(
        self, subjects: Iterable[str], sign: Callable[[str], str], prepare: Callable[[Client], Awaitable[object]]
    ) -> list[Client]:
        """Open a client for each subject and prepare it, some at a time."""
        gate = asyncio.Semaphore(_OPENING_COUNT_MAX)

        async def enter(subject: str) -> Client:
            async with gate:
                client = Client(self, subject)
                await client.open(sign(subject))
                await prepare(client)
                return client

        return await self.unless_lost(asyncio.gather(*[enter(subject) for subject in subjects]))

    async def unless_lost(self, work: Awaitable[T]) -> T:
        """The outcome of `work`; whatever goes wrong with a client ends it."""
        task = asyncio.ensure_future(work)
        self._lost.add_done_callback(lambda _: task.cancel())
        try:
            return await task
        except asyncio.CancelledError:
            if self._lost.done():
                self._lost.result()
            raise

    @property
    def open_count(self) -> int:
        """How many sockets are open."""
        return sum(connection.is_open for connection in self._connections)

    def lose(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_exception(RuntimeError(reason))
            self._lost.exception()  # known, also if nobody waits any more

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
