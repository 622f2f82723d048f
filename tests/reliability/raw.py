"""Clients that misbehave on purpose, and what a server process costs meanwhile.

A `RawClient` is one TCP connection that a test holds: what it sends goes out byte for byte, it reads only when it is
told to, and it answers no ping.
"""

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

SECONDS_MAX = 30  # what takes longer hangs
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
TEXT, CLOSE, PING = 0x81, 0x88, 0x89


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_SIZE


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def file_count(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def until(condition: Callable[[], object], what: str, seconds: float = SECONDS_MAX) -> None:
    """Wait for what nobody tells of."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not in {seconds:g} s: {what}") from None


def frame(payload: bytes, first_byte: int = TEXT) -> bytes:
    """One frame, masked with zeros."""
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 1 << 16:
        length = bytes((0x80 | 126,)) + size.to_bytes(2)
    else:
        length = bytes((0x80 | 127,)) + size.to_bytes(8)
    return bytes((first_byte,)) + length + bytes(4) + payload


def message(value: dict[str, Any]) -> bytes:
    return frame(json.dumps(value).encode())


class RawClient:
    """One connection."""

    def __init__(self, kernel_socket: socket.socket) -> None:
        self.socket = kernel_socket
        self._unread = bytearray()

    @classmethod
    async def open(cls, port: int, *, receive_buffer_bytes: int = 0) -> "RawClient":
        kernel_socket = socket.socket()
        if receive_buffer_bytes:
            kernel_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        kernel_socket.setblocking(False)
        await asyncio.get_running_loop().sock_connect(kernel_socket, ("127.0.0.1", port))
        return cls(kernel_socket)

    @classmethod
    async def upgraded(cls, port: int, *messages: dict[str, Any], receive_buffer_bytes: int = 0) -> "RawClient":
        """A WebSocket, with these messages sent and nothing read after the handshake."""
        client = await cls.open(port, receive_buffer_bytes=receive_buffer_bytes)
        await client.send(
            f"GET /api/sync HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {_KEY}\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in client._unread:
            await client._read_more()
        head, _, rest = bytes(client._unread).partition(b"\r\n\r\n")
        assert b"101 " in head, head
        client._unread = bytearray(rest)
        if messages:
            await client.send(b"".join(map(message, messages)))
        return client

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def hear(self) -> tuple[int, bytes] | None:
        """The next frame, whatever it is; None when the connection has ended."""
        while True:
            found = self._next_frame()
            if found is not None:
                return found
            try:
                await self._read_more()
            except (ConnectionError, EOFError):
                return None

    async def ended(self) -> None:
        """Read on until the server ends the connection; answer nothing."""
        while await self.hear() is not None:
            pass

    def close(self) -> None:
        self.socket.close()

    def __del__(self) -> None:  # also when the test that holds it fails, as some are to
        self.socket.close()

    async def _read_more(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 18)
        if not data:
            raise EOFError
        self._unread += data

    def _next_frame(self) -> tuple[int, bytes] | None:
        unread = self._unread
        if len(unread) < 2:
            return None
        start, size = 2, unread[1] & 0x7F
        if size >= 126:
            start = 4 if size == 126 else 10
            size = int.from_bytes(unread[2:start])
        if len(unread) < start + size:
            return None
        found = unread[0], bytes(unread[start : start + size])
        del unread[: start + size]
        return found


async def within(work: Awaitable[Any], what: str, seconds: float = SECONDS_MAX) -> Any:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise AssertionError(f"not in {seconds:g} s: {what}") from None
