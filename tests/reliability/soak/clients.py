"""The clients of the soak: those that behave and check all that they hear, and those that stop reading.

Invariants, each checked with every message
  1. Each Transition starts where the one before ended, and timestamps never go back.
  2. Requests are answered in the order sent; a mutation that may not fail does not.
  3. Nothing else is heard: no AuthError over any number of tokens, no FatalError, no end of the connection.
"""

import asyncio
import json
import os
import socket
import uuid
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec

from engine.sync.protocol import decode_timestamp, encode_timestamp
from tests.sync.fakes import add, connect, query_set

SECONDS_MAX = 60
_STUCK_BUFFER_SIZE = 32 << 10
_START: dict[str, Any] = {"querySet": 0, "identity": 0, "ts": encode_timestamp(0)}
_decode = msgspec.json.Decoder().decode
Query = tuple[str, dict[str, Any]]


class Client:
    """One user in one room."""

    def __init__(self, sync_address: str, subject: str, sign: Callable[[str], str], queries: list[Query]) -> None:
        self.subject, self.queries = subject, queries
        self.results: dict[int, Any] = {}  # by query id; the newest of each
        self.newest_ts = self.answered_ts = 0
        self._sync_address, self._sign = sync_address, sign
        self._version: dict[str, Any] = _START
        self._token_count = self._request_count = 0
        self._unanswered: deque[tuple[int, asyncio.Future[dict[str, Any]]]] = deque()
        self._actions: dict[int, asyncio.Future[dict[str, Any]]] = {}  # unanswered, by request id
        self._heard = asyncio.Event()
        self._is_leaving = False
        self._socket: aiohttp.ClientWebSocketResponse
        self._listening: asyncio.Task[None]

    async def open(self, http: aiohttp.ClientSession) -> None:
        """Connect, sign in and subscribe; returns with the first results."""
        self._socket = await http.ws_connect(self._sync_address, max_msg_size=0)
        await self._say(connect(sessionId=str(uuid.uuid4())))
        await self.refresh()
        await self._say(query_set(0, *[add(number, *query) for number, query in enumerate(self.queries)]))
        self._listening = asyncio.create_task(self._listen())
        await self.until(lambda: len(self.results) == len(self.queries))

    async def refresh(self) -> None:
        """Sign in with a fresh token, as official clients do before the old one expires."""
        version, self._token_count = self._token_count, self._token_count + 1
        value = self._sign(self.subject)
        await self._say({"type": "Authenticate", "baseVersion": version, "tokenType": "User", "value": value})

    async def call(self, path: str, arguments: dict[str, Any], *, kind: str = "Mutation") -> dict[str, Any]:
        """The response to a mutation or an action; of a mutation, once a Transition shows it."""
        request_id, self._request_count = self._request_count, self._request_count + 1
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if kind == "Mutation":
            self._unanswered.append((request_id, answer))
        else:
            self._actions[request_id] = answer
        await self._say({"type": kind, "requestId": request_id, "udfPath": path, "args": [arguments]})
        return await answer

    async def until(self, is_reached: Callable[[], bool]) -> None:
        """Wait until it is so, after some message."""
        async with asyncio.timeout(SECONDS_MAX):
            while not is_reached():
                self._heard.clear()
                if self._listening.done():
                    self._listening.result()
                    raise AssertionError(f"3: the connection of {self.subject} has ended")
                await self._heard.wait()

    async def leave(self, *, abruptly: bool) -> None:
        """Go, with a close frame or without a word."""
        self._is_leaving = True
        if abruptly:
            transport = self._socket._writer.transport
            if transport is not None:
                transport.abort()
        else:
            await self._socket.close()
        await self._listening

    def check(self) -> None:
        """Raises what has gone wrong."""
        if self._listening.done():
            self._listening.result()
            raise AssertionError(f"3: the connection of {self.subject} has ended, {self._socket.close_code}")

    async def _say(self, message: dict[str, Any]) -> None:
        with suppress(ConnectionError, aiohttp.ClientError):  # it is leaving, or `check` says so
            await self._socket.send_str(json.dumps(message))

    async def _listen(self) -> None:
        try:
            async for message in self._socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                self._hear(_decode(message.data))
                self._heard.set()
            assert self._is_leaving, f"3: the server ended a connection with {self._socket.close_code}"
        finally:
            self._heard.set()
            for answer in [*(future for _, future in self._unanswered), *self._actions.values()]:
                answer.cancel()

    def _hear(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "Ping":
                pass
            case "MutationResponse":
                request_id, answer = self._unanswered.popleft()
                assert message["requestId"] == request_id, f"2: {message} before {request_id}"
                if message["success"]:
                    self.answered_ts = decode_timestamp(message["ts"])
                if not answer.done():
                    answer.set_result(message)
            case "ActionResponse":
                answer = self._actions.pop(message["requestId"])
                if not answer.done():
                    answer.set_result(message)
            case "Transition":
                assert message["startVersion"] == self._version, f"1: {message} after {self._version}"
                self._version = message["endVersion"]
                ts = decode_timestamp(self._version["ts"])
                assert ts >= self.newest_ts, f"1: {ts} after {self.newest_ts}"
                self.newest_ts = ts
                for modification in message["modifications"]:
                    assert modification["type"] == "QueryUpdated", modification
                    self.results[modification["queryId"]] = modification["value"]
            case _:
                raise AssertionError(f"3: {self.subject} heard {message}")


class StuckClient(asyncio.Protocol):
    """Subscribes to something large that changes often, and never reads."""

    def __init__(self, host: str, port: int) -> None:
        self._place = host, port
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport

    async def open(self, path: str) -> None:
        loop, peer = asyncio.get_running_loop(), socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _STUCK_BUFFER_SIZE)
        peer.setblocking(False)
        await loop.sock_connect(peer, self._place)
        self._transport, _ = await loop.create_connection(lambda: self, sock=peer)
        self._transport.pause_reading()
        host, port = self._place
        request = (
            f"GET /api/1.48.0/sync HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {b64encode(os.urandom(16)).decode()}\r\n\r\n"
        )
        self._transport.write(request.encode())
        for message in (connect(sessionId=str(uuid.uuid4())), query_set(0, add(0, path, {}))):
            self._transport.write(_text_frame(json.dumps(message).encode()))

    def connection_lost(self, error: Exception | None) -> None:
        self._gone.set_result(None)

    @property
    def is_dropped(self) -> bool:
        """Whether the server has had enough; a pong that nobody asked for tells."""
        if not self._transport.is_closing():
            self._transport.write(b"\x8a\x80\0\0\0\0")
        return self._transport.is_closing()

    async def close(self) -> None:
        self._transport.abort()
        await self._gone


def _text_frame(payload: bytes) -> bytes:
    """Masked with zeros, which any server must take."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + size.to_bytes(2, "big")
    return b"\x81" + length + bytes(4) + payload
