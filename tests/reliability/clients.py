"""Clients that outlive their server: raw WebSockets that speak as the npm client does, and remember what they heard.

Invariants, each checked with every message
  1. Over every reconnect a client keeps its session id, and a request its id; what may be unanswered goes again, in
     order.
  2. On one connection each request is answered once, in the order sent, and the same as any answer that it had before.
  3. Each Transition starts where the one before ended; timestamps never go back, over reconnects too.
  4. A connection ends only with its server.
"""

import asyncio
import json
import random
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from engine.sync.protocol import decode_timestamp, encode_timestamp
from tests.reliability.server_process import SECONDS_MAX, ServerProcess
from tests.sync.fakes import add, connect, mutation, query_set

_START: dict[str, Any] = {"querySet": 0, "identity": 0, "ts": encode_timestamp(0)}
_REPEATED_COUNT = 3  # requests before the first that may be unanswered, which go again with it


class Answer(msgspec.Struct, frozen=True):
    """What a `put` was acknowledged with."""

    ts: int
    position: int  # among all puts, from 1


class Seen(msgspec.Struct, frozen=True):
    """What the watcher held after a Transition."""

    ts: int
    count: int


class Client:
    """Comes back after every kill."""

    def __init__(self, server: ServerProcess, random_source: random.Random) -> None:
        self.session_id = str(uuid.UUID(int=random_source.getrandbits(128), version=4))
        self.newest_ts = 0  # of everything heard
        self._server = server
        self._connection_count = 0
        self._version = _START
        self._has_heard = asyncio.Event()
        self._socket: aiohttp.ClientWebSocketResponse

    async def run(self, http: aiohttp.ClientSession) -> None:
        """Speak to the server, whenever it is up, until cancelled."""
        while True:
            await self._server.is_up.wait()
            start_count, end = self._server.start_count, "a close"
            try:
                async with http.ws_connect(self._server.sync_address, max_msg_size=0) as self._socket:
                    self._version = _START
                    observed = {"maxObservedTimestamp": encode_timestamp(self.newest_ts)} if self.newest_ts else {}
                    await self._say(
                        connect(sessionId=self.session_id, connectionCount=self._connection_count, **observed)
                    )
                    self._connection_count += 1
                    await self._begin()
                    async for message in self._socket:
                        if message.type is aiohttp.WSMsgType.ERROR:
                            break
                        assert message.type is aiohttp.WSMsgType.TEXT, message
                        await self._hear(json.loads(message.data))
                        self._has_heard.set()
                    end = f"close code {self._socket.close_code}, {self._socket.exception()!r}"
            except (aiohttp.ClientError, ConnectionError) as error:
                end = repr(error)
            is_same_server = self._server.is_up.is_set() and self._server.start_count == start_count
            assert not is_same_server, f"4: a living server ended a connection: {end}; {self._server.log_tail()}"

    async def until(self, is_reached: Callable[[], bool]) -> None:
        """Wait until it is so, after some message."""
        async with asyncio.timeout(SECONDS_MAX):
            while not is_reached():
                self._has_heard.clear()
                await self._has_heard.wait()

    async def _begin(self) -> None:
        """Say what follows `Connect`."""
        raise NotImplementedError

    async def _answered(self, response: dict[str, Any]) -> None:
        raise AssertionError(f"2: nothing was asked: {response}")

    async def _moved(self, ts: int, transition: dict[str, Any]) -> None:
        raise NotImplementedError

    async def _say(self, message: dict[str, Any]) -> None:
        await self._socket.send_str(json.dumps(message))

    async def _hear(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "Ping":
                pass
            case "MutationResponse":
                await self._answered(message)
            case "Transition":
                assert message["startVersion"] == self._version, f"3: {message} after {self._version}"
                self._version = message["endVersion"]
                ts = decode_timestamp(self._version["ts"])
                assert ts >= self.newest_ts, f"3: {ts} after {self.newest_ts}"
                self.newest_ts = ts
                await self._moved(ts, message)
            case _:
                raise AssertionError(f"unexpected: {message}; {self._server.log_tail()}")


class Writer(Client):
    """Puts 0, 1, 2, …, several at a time; a put's number is its request id."""

    def __init__(
        self,
        server: ServerProcess,
        random_source: random.Random,
        client: int,
        in_flight_count_max: int,
        on_answer: Callable[[], None],
    ) -> None:
        super().__init__(server, random_source)
        self.answers: dict[int, Answer] = {}  # by number
        self.sent_count = 0  # numbers below this were sent
        self.repeat_count = 0  # answers that confirmed an earlier one
        self._client, self._in_flight_count_max, self._on_answer = client, in_flight_count_max, on_answer
        self._is_stopping = False  # then nothing new is put
        self._complete_count = 0  # numbers below this have an answer, and a Transition that reaches it
        self._fresh_from = 0  # numbers from this on were first sent on this connection
        self._awaited: deque[int] = deque()  # sent on this connection, not yet answered there

    async def finish(self) -> None:
        """Put nothing new, and wait until all is answered and shown."""
        self._is_stopping = True
        await self.until(lambda: self._complete_count == self.sent_count)

    async def _begin(self) -> None:
        self._awaited.clear()
        self._fresh_from = self.sent_count
        await self._say(query_set(0))
        for number in range(max(0, self._complete_count - _REPEATED_COUNT), self.sent_count):
            await self._put(number)
        await self._put_more()

    async def _put_more(self) -> None:
        while not self._is_stopping and len(self._awaited) < self._in_flight_count_max:
            self.sent_count += 1  # before the send, which may fail after the bytes are out
            await self._put(self.sent_count - 1)

    async def _put(self, number: int) -> None:
        self._awaited.append(number)
        await self._say(mutation(number, "puts:put", {"client": self._client, "number": number}))

    async def _answered(self, response: dict[str, Any]) -> None:
        assert response["success"], f"client {self._client}: {response}; {self._server.log_tail()}"
        expected, number = self._awaited.popleft(), response["requestId"]
        assert number == expected, f"2: client {self._client} was answered {number} before {expected}"
        answer = Answer(decode_timestamp(response["ts"]), int(response["result"]))
        if (earlier := self.answers.get(number)) is not None:
            assert answer == earlier, f"2: client {self._client}, put {number}: {earlier} became {answer}"
            self.repeat_count += 1
        if number >= self._fresh_from:
            assert answer.ts > decode_timestamp(self._version["ts"]), "a Transition showed a write before its answer"
        self.answers[number] = answer
        self._on_answer()
        await self._put_more()

    async def _moved(self, ts: int, transition: dict[str, Any]) -> None:
        while (answer := self.answers.get(self._complete_count)) is not None and answer.ts <= ts:
            self._complete_count += 1


class Watcher(Client):
    """Subscribes to the counter."""

    def __init__(self, server: ServerProcess, random_source: random.Random) -> None:
        super().__init__(server, random_source)
        self.seen: list[Seen] = []  # after every Transition, in the order they came
        self._count: int | None = None  # None until the connection's first result

    async def _begin(self) -> None:
        self._count = None
        await self._say(query_set(0, add(0, "puts:count")))

    async def _moved(self, ts: int, transition: dict[str, Any]) -> None:
        for modification in transition["modifications"]:
            assert modification["type"] == "QueryUpdated", f"{modification}; {self._server.log_tail()}"
            self._count = int(modification["value"])
        assert self._count is not None, "the first Transition answers every query"
        self.seen.append(Seen(ts, self._count))
