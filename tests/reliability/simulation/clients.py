"""Clients that run transactions and watch queries, speak as the npm client does, and remember what they were told.

    awake ──connected──> sends all that is not answered again, then new ones ──the connection is gone──> awake
      └── dies, now and then: nobody knows what became of what it had sent; another one takes its place

Invariants, each checked with every message
  1. On one connection each request is answered once; those that are new on it, in the order sent, but for failures
     before the first Transition; those that succeeded before, as they were answered then.
  2. Each Transition starts where the one before ended; timestamps never go back, over reconnects too.
  3. A Transition comes at or past the timestamp of an answer only after that answer, if it was asked but once.
"""

import asyncio
import itertools
import json
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Protocol

import msgspec

from engine.sync.protocol import decode_timestamp, encode_timestamp
from tests.reliability.simulation.list_append import Status
from tests.reliability.simulation.transactions import Mill, Operation, encode
from tests.sync.fakes import add, connect, mutation, query_set, remove

_START: dict[str, Any] = {"querySet": 0, "identity": 0, "ts": encode_timestamp(0)}
_RETRY_SECONDS = 0.02


class Socket(Protocol):
    """A connection, of whatever kind."""

    close_code: int | None  # that the server closed with

    async def say(self, text: str) -> None: ...

    async def hear(self) -> str | None: ...

    def cut(self) -> None: ...


class Request(msgspec.Struct):
    """One transaction and what its client knows of it."""

    client: int
    number: int
    operations: list[Operation]
    sent_at: int  # a place in the order in which things happened to clients
    status: Status = "info"
    answered_at: int | None = None
    ts: int | None = None
    results: list[Any] = []
    failure: str = ""


class Sight(msgspec.Struct, frozen=True):
    """All that a client held after a Transition."""

    client: int
    ts: int
    held: tuple[tuple[str, str], ...]  # operation and result of each query, encoded


class History:
    """What all clients sent and were told."""

    def __init__(self, random_source: Random, transaction_count: int) -> None:
        self.random, self.mill = random_source, Mill(random_source)
        self.requests: list[Request] = []
        self.sights: list[Sight] = []
        self.complaints: list[str] = []  # of clients, of what they could see to be wrong
        self.moment = itertools.count()
        self.progress = asyncio.Event()  # something was heard
        self.length = self._left_count = transaction_count
        self._client_numbers = itertools.count()

    def next_client(self) -> int:
        return next(self._client_numbers)

    def new_request(self, client: int, number: int) -> Request | None:
        """None: enough were made."""
        if not self._left_count:
            return None
        self._left_count -= 1
        self.requests.append(Request(client, number, self.mill.transaction(), next(self.moment)))
        return self.requests[-1]

    @property
    def is_over(self) -> bool:
        return not self._left_count


class Client:
    """Runs until it dies, or nothing is left to do."""

    def __init__(
        self,
        history: History,
        open_socket: Callable[[], Awaitable[Socket]],
        *,
        in_flight_count_max: int,
        death_chance: float,
    ) -> None:
        self._history, self._open_socket = history, open_socket
        self._in_flight_count_max, self._death_chance = in_flight_count_max, death_chance
        self.number = history.next_client()
        self.session_id = str(uuid.UUID(int=self.number))
        self.is_done = False  # all that it sent is answered and shown
        self.held: dict[str, str] = {}  # by operation; of the queries that were shown
        self._asked: dict[int, str] = {}  # operations by query id
        self._next_query_id, self._query_set_version = 0, 0
        self._requests: list[Request] = []
        self._unshown: deque[Request] = deque()  # not answered, or no Transition has reached them; in order
        self._awaited: dict[int, Request] = {}  # by number: sent on this connection, not answered there; in order
        self._held_back: set[int] = set()  # must have failed: later ones were answered before
        self._connection_count = 0
        self._fresh_from = 0  # requests from this on were first sent on this connection
        self.newest_ts = 0  # of everything heard
        self._version = _START
        self._socket: Socket

    @property
    def is_shown(self) -> bool:
        """Whether all that it asks was shown on this connection."""
        return len(self.held) == len(self._asked) and self._version["querySet"] == self._query_set_version

    async def run(self) -> None:
        """Until it dies; raises AssertionError on what it can see to be wrong."""
        while True:
            try:
                self._socket = await self._open_socket()
                await self._begin()
                while (text := await self._socket.hear()) is not None:
                    await self._hear(json.loads(text))
                    self._history.progress.set()
                    if self._requests and self._history.random.random() < self._death_chance:
                        self._socket.cut()
                        return
            except ConnectionError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            code = self._socket.close_code
            assert code in (None, 1001), f"client {self.number} was sent away with {code}"

    async def _begin(self) -> None:
        self._version = _START
        observed = {"maxObservedTimestamp": encode_timestamp(self.newest_ts)} if self.newest_ts else {}
        await self._say(connect(sessionId=self.session_id, connectionCount=self._connection_count, **observed))
        self._connection_count += 1
        self.held.clear()
        if not self._asked:
            self._ask_more()
        self._query_set_version = 1
        await self._say(query_set(0, *(self._add(query_id) for query_id in self._asked)))
        self._awaited.clear()
        self._held_back.clear()
        self._fresh_from = len(self._requests)
        for request in self._unshown:
            await self._send(request)
        await self._send_more()

    async def _send_more(self) -> None:
        while len(self._awaited) < self._in_flight_count_max:
            request = self._history.new_request(self.number, len(self._requests))
            if request is None:
                break
            self._requests.append(request)
            self._unshown.append(request)
            await self._send(request)
        self.is_done = self._history.is_over and not self._unshown

    async def _send(self, request: Request) -> None:
        self._awaited[request.number] = request
        arguments = {"client": self.number, "number": request.number, "operations": encode(request.operations)}
        await self._say(mutation(request.number, "tx:run", arguments))

    # -- queries

    def _ask_more(self) -> None:
        while len(self._asked) < 3:
            operation = encode(self._history.mill.query())
            if operation not in self._asked.values():
                self._asked[self._next_query_id] = operation
                self._next_query_id += 1

    def _add(self, query_id: int) -> dict[str, Any]:
        operation = self._asked[query_id]
        path = "tx:look_long" if operation == '["sum"]' else "tx:look"
        return add(query_id, path, {"operation": operation})

    async def _ask_otherwise(self) -> None:
        """Watch something else instead of what it watched first."""
        before = set(self._asked)
        gone = min(before)
        operation = self._asked.pop(gone)
        self._ask_more()
        self.held.pop(operation, None)
        self._query_set_version += 1
        news = [self._add(query_id) for query_id in self._asked if query_id not in before]
        await self._say(query_set(self._query_set_version - 1, remove(gone), *news))

    # -- hearing

    async def _say(self, message: dict[str, Any]) -> None:
        await self._socket.say(json.dumps(message))

    async def _hear(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "Ping":
                pass
            case "MutationResponse":
                await self._answered(message)
            case "Transition":
                await self._moved(message)
            case _:
                raise AssertionError(f"unexpected: {message}")

    async def _answered(self, response: dict[str, Any]) -> None:
        request = self._awaited.pop(response["requestId"])
        if request.number >= self._fresh_from:
            earlier = [number for number in self._awaited if self._fresh_from <= number < request.number]
            self._held_back.update(earlier)
            assert not earlier or self._version is _START, f"1: {response} before {earlier}"
        assert not (response["success"] and request.number in self._held_back), f"1: {response} came late"
        if request.answered_at is None:
            request.answered_at = next(self._history.moment)
            if response["success"]:
                client, number, request.results = json.loads(response["result"])
                assert (client, number) == (self.number, request.number), f"1: {response} for {request}"
                request.status, request.ts = "ok", decode_timestamp(response["ts"])
                if request.number >= self._fresh_from:
                    assert request.ts > decode_timestamp(self._version["ts"]), f"3: {request}"
            else:
                request.status, request.failure = "fail", response["result"]
                self._unshown.remove(request)
        elif request.status == "ok":
            again = (decode_timestamp(response["ts"]), json.loads(response["result"])[2])
            assert response["success"], f"1: {request} became {response}"
            assert again == (request.ts, request.results), f"1: {request} became {response}"
        await self._send_more()

    async def _moved(self, transition: dict[str, Any]) -> None:
        assert transition["startVersion"] == self._version, f"2: {transition} after {self._version}"
        self._version = transition["endVersion"]
        ts = decode_timestamp(self._version["ts"])
        assert ts >= self.newest_ts, f"2: {ts} after {self.newest_ts}"
        self.newest_ts = ts
        for modification in transition["modifications"]:
            operation = self._asked.get(modification["queryId"])
            if operation is None:
                continue  # it was removed meanwhile
            assert modification["type"] == "QueryUpdated", modification
            self.held[operation] = modification["value"]
        self._history.sights.append(Sight(self.number, ts, tuple(self.held.items())))
        while self._unshown and self._unshown[0].status == "ok" and (self._unshown[0].ts or 0) <= ts:
            self._unshown.popleft()
        self.is_done = self._history.is_over and not self._unshown
        if self._version["querySet"] == self._query_set_version and self._history.random.random() < 0.02:
            await self._ask_otherwise()
