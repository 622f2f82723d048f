"""A network that misbehaves: a TCP proxy between clients and a server of this machine.

    pass        bytes go both ways
    delay       each piece comes `delay_seconds` later, in order
    blackhole   nothing gets through and nothing is refused; what was held goes on when it ends
    drop        of the new connections, the share `drop_share` is reset after some pieces

Invariants
  1. What gets through is what was sent, in order: a mode delays or ends a connection, and changes no byte.
  2. `mode` holds from the next piece and the next connection on; `reset` and `half_close` are done to those there are.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

Mode = Literal["pass", "delay", "blackhole", "drop"]
_PIECE_SIZE_MAX = 1 << 16
_DROPPED_AFTER_PIECES_MAX = 12
_NO_LINGER = struct.pack("ii", 1, 0)  # closing sends a reset


class Proxy:
    """One address that leads to a server's. Use `open_proxy`."""

    def __init__(self, server_port: int, random_source: random.Random) -> None:
        self.port = 0  # set by `open_proxy`
        self.accepted_count = 0
        self.dropped_count = 0  # connections that `drop` has reset
        self.delay_seconds = 0.1
        self.drop_share = 0.5
        self._mode: Mode = "pass"
        self._server_port, self._random = server_port, random_source
        self._is_open = asyncio.Event()  # not set in a blackhole
        self._is_open.set()
        self._links: set[_Link] = set()

    @property
    def sync_address(self) -> str:
        return f"{self.address}/api/1.48.0/sync"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "blackhole":
            self._is_open.clear()
        else:
            self._is_open.set()

    def reset(self) -> None:
        """End every connection as a router does that has forgotten them."""
        for link in list(self._links):
            link.reset()

    def half_close(self) -> None:
        """Tell the server that its clients will say nothing more; they still hear, and do not know it."""
        for link in list(self._links):
            link.to_server.write_eof()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        self.accepted_count += 1
        await self._is_open.wait()
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except ConnectionError:
            _reset(writer)
            return
        link = _Link(writer, server_writer)
        if self._mode == "drop" and self._random.random() < self.drop_share:
            link.pieces_left = self._random.randint(0, _DROPPED_AFTER_PIECES_MAX)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._carry(reader, server_writer, link))
                ways.create_task(self._carry(server_reader, writer, link))
                ways.create_task(link.ended())
        except* ConnectionError:
            pass
        finally:
            self._links.discard(link)
            link.reset()  # whatever is left of it

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: "_Link") -> None:
        while piece := await reader.read(_PIECE_SIZE_MAX):
            if self._mode == "delay":
                await asyncio.sleep(self.delay_seconds)
            await self._is_open.wait()
            if link.pieces_left is not None:
                link.pieces_left -= 1
                if link.pieces_left < 0:
                    self.dropped_count += 1
                    raise ConnectionResetError
            writer.write(piece)
            await writer.drain()
        link.end(writer)


class _Link:
    """A client's connection and the one to the server that it is tied to."""

    def __init__(self, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter) -> None:
        self.to_client, self.to_server = to_client, to_server
        self.pieces_left: int | None = None  # then it is reset; None: it stays
        self._is_ended = asyncio.Event()

    def end(self, writer: asyncio.StreamWriter) -> None:
        """One side has ended; a server's end is that of both."""
        if writer is self.to_client:
            self._is_ended.set()
        elif not writer.is_closing():
            writer.write_eof()

    async def ended(self) -> None:
        await self._is_ended.wait()
        raise ConnectionResetError  # so that both directions end

    def reset(self) -> None:
        for writer in (self.to_client, self.to_server):
            _reset(writer)


@asynccontextmanager
async def open_proxy(server_port: int, random_source: random.Random) -> AsyncIterator[Proxy]:
    proxy = Proxy(server_port, random_source)
    server = await asyncio.start_server(proxy.take, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.mode = "pass"
        proxy.reset()


def _reset(writer: asyncio.StreamWriter) -> None:
    kernel_socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        kernel_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    writer.transport.abort()
