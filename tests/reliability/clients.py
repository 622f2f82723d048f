"""Clients that outlive their server, each with a ledger of what it sent and what it was told.

The raw ones speak as the npm client does, and see every message; the official ones run in processes of their own
(`tests/clients/ledger.mjs`, and this file as a program), and say line by line what they send and hear.

Invariants of the raw ones, each checked with every message
  1. Over every reconnect a client keeps its session id, and a request its id; what may be unanswered goes again, in
     order.
  2. On one connection each request is answered once, in the order sent, and the same as any answer that it had before.
  3. Each Transition starts where the one before ended; timestamps never go back, over reconnects too.
  4. A connection ends only with its server, unless the network is told to break it.
"""

import asyncio
import json
import os
import random
import select
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from engine.sync.protocol import decode_timestamp, encode_timestamp
from tests.reliability.server_process import DEATH_SECONDS_MAX, REPOSITORY, SECONDS_MAX, ServerProcess
from tests.sync.fakes import add, connect, mutation, query_set

Put = tuple[int, int]  # client, number

_START: dict[str, Any] = {"querySet": 0, "identity": 0, "ts": encode_timestamp(0)}
_SILENCE_SECONDS = 0.3
_RETRY_SECONDS = 0.1
_REPEATED_COUNT = 3  # requests before the first that may be unanswered, which go again with it


class Answer(msgspec.Struct, frozen=True):
    """What a `put` was acknowledged with."""

    ts: int | None  # None: an official client keeps it for itself
    position: int  # among all puts, from 1
    floor: int = 0  # the highest position that a raw writer had been answered when this put was first sent
    count: int | None = None  # what an official client that watches the counter was shown when the answer came


class Seen(msgspec.Struct, frozen=True):
    """What the watcher held after a Transition."""

    ts: int
    count: int


class Told(msgspec.Struct, frozen=True):
    """What the clients know, at some moment."""

    sent_counts: Sequence[int]  # by client; it has sent the numbers below
    answers: Mapping[Put, Answer]
    seen: Sequence[Seen]  # by the watcher, in order


class Client:
    """Comes back after every kill."""

    def __init__(self, server: ServerProcess, random_source: random.Random, address: str | None = None) -> None:
        """With an address of its own it goes through something that may break its connections."""
        self.session_id = str(uuid.UUID(int=random_source.getrandbits(128), version=4))
        self.newest_ts = 0  # of everything heard
        self.heard_at_start = 0  # the newest start of the server that something was heard from
        self.loss_count = 0  # connections that ended while the server lived
        self._server = server
        self._address = address or server.sync_address
        self._is_network_bad = address is not None
        self._connection_count = 0
        self._version = _START
        self._has_heard = asyncio.Event()
        self._socket: aiohttp.ClientWebSocketResponse

    async def run(self, http: aiohttp.ClientSession) -> None:
        """Speak to the server, whenever it is up, until cancelled."""
        while True:
            await self._server.is_up.wait()
            await self._pause()
            start_count, gone, end = self._server.start_count, self._server.gone, "a close"
            try:
                async with http.ws_connect(self._address, max_msg_size=0) as self._socket:
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
                        self.heard_at_start = start_count
                        self._has_heard.set()
                    end = f"close code {self._socket.close_code}, {self._socket.exception()!r}"
            except (aiohttp.ClientError, ConnectionError) as error:
                end = repr(error)
            if self._is_network_bad:
                self.loss_count += 1
                self._has_heard.set()
                continue
            try:
                await asyncio.wait_for(gone.wait(), DEATH_SECONDS_MAX)
            except TimeoutError:
                raise AssertionError(
                    f"4: a living server ended a connection: {end}; {self._server.log_tail()}"
                ) from None

    async def until(self, is_reached: Callable[[], bool]) -> None:
        """Wait until it is so, after some message."""
        async with asyncio.timeout(SECONDS_MAX):
            while not is_reached():
                self._has_heard.clear()
                await self._has_heard.wait()

    async def heard_from(self, start_count: int) -> None:
        """Wait until this start of the server has said something."""
        await self.until(lambda: self.heard_at_start >= start_count)

    async def lost(self, count: int) -> None:
        """Wait until so many connections have ended."""
        await self.until(lambda: self.loss_count >= count)

    async def silence(self) -> None:
        """Wait until nothing was heard for a while."""
        await _silence(self._has_heard)

    async def _pause(self) -> None:
        """What comes before a connection."""

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


async def _silence(has_heard: asyncio.Event) -> None:
    with suppress(TimeoutError):
        while True:
            has_heard.clear()
            await asyncio.wait_for(has_heard.wait(), _SILENCE_SECONDS)


class Horizon(msgspec.Struct):
    """What the raw writers know together."""

    position: int = 0  # the highest that any was answered


class Writer(Client):
    """Puts 0, 1, 2, …, several at a time; a put's number is its request id."""

    def __init__(
        self,
        server: ServerProcess,
        random_source: random.Random,
        client: int,
        in_flight_count_max: int,
        horizon: Horizon,
        address: str | None = None,
    ) -> None:
        super().__init__(server, random_source, address)
        self._horizon = horizon
        self._floors: list[int] = []  # by number
        self.answers: dict[int, Answer] = {}  # by number
        self.sent_count = 0  # numbers below this were sent
        self.repeat_count = 0  # answers that confirmed an earlier one
        self._client, self._in_flight_count_max = client, in_flight_count_max
        self._is_stopping = False  # then nothing new is put
        self._complete_count = 0  # numbers below this have an answer, and a Transition that reaches it
        self._fresh_from = 0  # numbers from this on were first sent on this connection
        self._awaited: deque[int] = deque()  # sent on this connection, not yet answered there

    def has_answers(self, count: int) -> bool:
        return len(self.answers) >= count

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
            self._floors.append(self._horizon.position)
            await self._put(self.sent_count - 1)

    async def _put(self, number: int) -> None:
        self._awaited.append(number)
        await self._say(mutation(number, "puts:put", {"client": self._client, "number": number}))

    async def _answered(self, response: dict[str, Any]) -> None:
        assert response["success"], f"client {self._client}: {response}; {self._server.log_tail()}"
        expected, number = self._awaited.popleft(), response["requestId"]
        assert number == expected, f"2: client {self._client} was answered {number} before {expected}"
        answer = Answer(decode_timestamp(response["ts"]), int(response["result"]), self._floors[number])
        self._horizon.position = max(self._horizon.position, answer.position)
        if (earlier := self.answers.get(number)) is not None:
            assert answer == earlier, f"2: client {self._client}, put {number}: {earlier} became {answer}"
            self.repeat_count += 1
        if number >= self._fresh_from:
            is_news = decode_timestamp(response["ts"]) > decode_timestamp(self._version["ts"])
            assert is_news, "a Transition showed a write before its answer"
        self.answers[number] = answer
        await self._put_more()

    async def _moved(self, ts: int, transition: dict[str, Any]) -> None:
        while (answer := self.answers.get(self._complete_count)) is not None and (answer.ts or 0) <= ts:
            self._complete_count += 1


class Watcher(Client):
    """Subscribes to the counter."""

    def __init__(self, server: ServerProcess, random_source: random.Random, address: str | None = None) -> None:
        super().__init__(server, random_source, address)
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


class OfficialClients:
    """Clients of one program, which put numbers as a `Writer` does; a put's number is not on the wire."""

    def __init__(
        self,
        command: Sequence[str | Path],
        server: ServerProcess,
        clients: Sequence[int],
        address: str | None = None,
    ) -> None:
        """With an address of its own it goes through something that may break its connections."""
        self.clients = clients
        self.sent_counts = dict.fromkeys(clients, 0)
        self.answers: dict[Put, Answer] = {}  # by client and number
        self.answered_at_start = dict.fromkeys(clients, 0)  # the newest start of the server that answered
        self._command, self._server = [*command, address or server.address, *map(str, clients)], server
        self._has_heard = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None  # None until `run`

    async def run(self) -> None:
        """Until all is answered after `finish`, or cancelled."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY
        )
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                self._hear(json.loads(line))
                self._has_heard.set()
            assert await self._process.wait() == 0, self._command
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    def tell(self, word: str) -> None:
        """`online`: try to connect now, as a browser does when it is told so; `finish`: put nothing new."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{word}\n".encode())

    async def until(self, is_reached: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(SECONDS_MAX):
                while not is_reached():
                    self._has_heard.clear()
                    await self._has_heard.wait()
        except TimeoutError:
            raise AssertionError(f"clients {self.clients}: waited for {what}; {self._server.log_tail()}") from None

    async def silence(self) -> None:
        """Wait until nothing was said for a while."""
        await _silence(self._has_heard)

    async def answered_more(self, count: int, meanwhile: Callable[[], None]) -> None:
        """Wait for so many more answers; what is done meanwhile is done again and again."""
        wanted = len(self.answers) + count
        async with asyncio.timeout(SECONDS_MAX):
            while len(self.answers) < wanted:
                meanwhile()
                self._has_heard.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._has_heard.wait(), _SILENCE_SECONDS)

    async def answered_by(self, start_count: int) -> None:
        """Wait until each has had an answer of this start of the server."""
        await self.until(lambda: min(self.answered_at_start.values()) >= start_count, f"start {start_count}")

    def _hear(self, said: dict[str, Any]) -> None:
        client = said["client"]
        match said:
            case {"failed": _}:
                pass
            case {"sent": number}:
                assert number == self.sent_counts[client]
                self.sent_counts[client] += 1
            case {"answered": number, "position": position, "count": count}:
                assert (client, number) not in self.answers
                self.answers[client, number] = Answer(None, int(position), count=None if count is None else int(count))
                self.answered_at_start[client] = self._server.start_count
            case _:
                raise AssertionError(f"{said}; {self._server.log_tail()}")


class Crowd:
    """Clients that put numbers, raw ones from 0 on, and a watcher."""

    def __init__(
        self,
        server: ServerProcess,
        random_source: random.Random,
        in_flight_counts: Sequence[int],
        *,
        npm: Sequence[int] = (),
        python: Sequence[int] = (),
        address: str | None = None,
    ) -> None:
        """`npm` and `python` are the numbers of official clients; `address` as theirs."""
        sync_address = address and f"{address}/api/1.48.0/sync"
        horizon = Horizon()
        self.writers = [
            Writer(server, random_source, client, in_flight_count_max, horizon, sync_address)
            for client, in_flight_count_max in enumerate(in_flight_counts)
        ]
        self.watcher = Watcher(server, random_source, sync_address)
        self.officials: list[OfficialClients] = []
        if npm:
            command = ["node", REPOSITORY / "tests" / "clients" / "ledger.mjs"]
            self.officials.append(OfficialClients(command, server, npm, address))
        self.officials += [OfficialClients([sys.executable, "-m", __name__], server, [one], address) for one in python]
        self._official_tasks: list[asyncio.Task[None]] = []
        self._raw_tasks: list[asyncio.Task[None]] = []

    def start(self, http: aiohttp.ClientSession, tasks: asyncio.TaskGroup) -> None:
        self._raw_tasks = [tasks.create_task(client.run(http)) for client in self.raw]
        self._official_tasks = [tasks.create_task(official.run()) for official in self.officials]

    @property
    def raw(self) -> list[Client]:
        return [*self.writers, self.watcher]

    @property
    def sent_count(self) -> int:
        return sum(self.told().sent_counts)

    def told(self) -> Told:
        sent_counts, answers = {}, {}
        for client, writer in enumerate(self.writers):
            sent_counts[client] = writer.sent_count
            answers |= {(client, number): answer for number, answer in writer.answers.items()}
        for official in self.officials:
            sent_counts |= official.sent_counts
            answers |= official.answers
        return Told([sent_counts[client] for client in sorted(sent_counts)], answers, list(self.watcher.seen))

    def go_online(self) -> None:
        """Have npm clients connect now: they wait a second or more, unless the browser says that there is a network."""
        for official in self.officials:
            official.tell("online")

    async def answered(self, count: int = 20) -> None:
        """Wait until each raw writer has had so many more answers."""
        wanted = [(writer, len(writer.answers) + count) for writer in self.writers]
        await asyncio.gather(*[writer.until(partial(writer.has_answers, total)) for writer, total in wanted])

    async def officials_answered_by(self, start_count: int) -> None:
        """Wait until each official client has had an answer of this start of the server."""
        for official in self.officials:
            await official.answered_by(start_count)

    async def finish(self) -> None:
        """Put nothing new; wait until every put is answered and the watcher has seen the last. Then all are gone."""
        for official in self.officials:
            official.tell("finish")
        unfinished = set(self._official_tasks)
        async with asyncio.timeout(SECONDS_MAX):
            while unfinished:
                self.go_online()
                _, unfinished = await asyncio.wait(unfinished, timeout=_SILENCE_SECONDS)
        for writer in self.writers:
            await writer.finish()
        await self.watcher.until(lambda: bool(self.watcher.seen) and self.watcher.seen[-1].count == self.sent_count)
        for task in self._raw_tasks:
            task.cancel()


def put_until_told(address: str, client: int) -> None:
    """The body of a process: the PyPI client.

    It has a new session id for each connection, so its app helps itself (`put_once`). When its connection ends at a bad
    moment, or it finds no server at first, it fails for good, with "channel closed": then another one asks again.
    """
    from convex import ConvexClient  # a native library, for this process only

    def say(**said: Any) -> None:
        print(json.dumps({"client": client, **said}), flush=True)

    convex, number = ConvexClient(address), 0
    while not _is_told_to_finish():
        say(sent=number)
        while True:
            try:
                position: Any = convex.mutation("puts:put_once", {"client": client, "number": number})
                count = convex.query("puts:count") if number % 8 == 0 else None
                break
            except Exception as error:
                if str(error) != "channel closed":
                    raise
                say(failed=number)
                time.sleep(_RETRY_SECONDS)
                convex = ConvexClient(address)
        say(answered=number, position=position, count=count)
        number += 1
    os._exit(0)  # its threads would wait


def _is_told_to_finish() -> bool:
    while select.select([sys.stdin], [], [], 0)[0]:
        word = os.read(sys.stdin.fileno(), 1 << 16)  # what is read ahead `select` would not see
        if not word or b"finish" in word:
            return True
    return False


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        put_until_told(sys.argv[1], int(sys.argv[2]))
