"""The sockets of one server that speak HTTP: bounded in number and in time. (A WebSocket is one until its handshake.)

    silent: no whole header yet ──header──> asking ⇄ idle: kept alive for the next request

Invariants
  1. One that has not sent a whole request header in time is closed (aiohttp has no timer for that), and of these there
     are at most `unconnected_count_max`: past it the oldest makes room.
  2. There are at most `http_connection_count_max`: past it the oldest that asks nothing makes room, else the newcomer
     is not taken in.
  3. A peer that does not read its answer is dropped (`lagging`).
  4. What is no HTTP, or has a body that is not encoded as it says, is answered and not logged: anybody may send it, as
     often as he likes.
"""

import asyncio
from typing import Any

from aiohttp import StreamReader, web

from engine.clock import Clock, TimerHandle
from engine.limits import Limits
from engine.server.http import BROKEN_BODY, error_response
from engine.server.lagging import Lagging

_LOOKED_AT_COUNT_MAX = 16  # for one that may go


class HttpSocket(web.RequestHandler):
    """One of them, as aiohttp's protocol."""

    __slots__ = ("_sockets", "body", "failure_count", "is_asking")

    def __init__(self, server: web.Server, sockets: "HttpSockets", **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._sockets = sockets
        self.is_asking = False  # a request is being answered; changed by the front
        self.body: StreamReader | None = None  # of the newest request; set by the front
        self.failure_count = 0  # credentials that were refused here; changed by the front

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._sockets.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.transport is not None:
            self._sockets.lagging.ended(self.transport)
        self._sockets.gone(self)
        super().connection_lost(exc)
        if self.body is not None and not self.body.is_eof():
            # aiohttp's task would wait for the rest of an answered request for 10 s, for each that strangers break off
            self.body.set_exception(ConnectionResetError("the connection is lost"))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self._sockets.lagging.began(self.transport)  # 3

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport is not None:
            self._sockets.lagging.ended(self.transport)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if status >= 500 or request.writer.output_size:
            return super().handle_error(request, status, exc, message)
        text = "This is no HTTP request that is understood here: its header is malformed, or has too much in it."
        response = error_response(web.HTTPBadRequest(text=text))  # 4
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.force_close()
        return response

    def log_exception(self, *args: Any, **options: Any) -> None:
        if not isinstance(options.get("exc_info"), BROKEN_BODY):  # 4: met while the rest of a body is thrown away
            super().log_exception(*args, **options)


class HttpSockets:
    """All of them."""

    def __init__(self, limits: Limits, clock: Clock, lagging: Lagging) -> None:
        self._limits, self._clock, self.lagging = limits, clock, lagging
        self._all: dict[HttpSocket, None] = {}  # oldest first
        self._silent: dict[HttpSocket, TimerHandle] = {}  # oldest first; until the timer their header is to be here

    def opened(self, socket: HttpSocket) -> None:
        if len(self._all) >= self._limits.http_connection_count_max and not self._make_room():
            socket.force_close()
            return
        self._all[socket] = None
        seconds = self._limits.http_header_seconds_max
        self._silent[socket] = self._clock.call_later(seconds, socket.force_close)  # 1
        if len(self._silent) > self._limits.unconnected_count_max:
            next(iter(self._silent)).force_close()

    def heard(self, socket: HttpSocket) -> None:
        """A whole header has come from it."""
        timer = self._silent.pop(socket, None)
        if timer is not None:
            timer.cancel()

    def gone(self, socket: HttpSocket) -> None:
        self._all.pop(socket, None)
        self.heard(socket)

    def _make_room(self) -> bool:
        """Close one that nobody misses (2)."""
        for _ in range(min(len(self._all), _LOOKED_AT_COUNT_MAX)):
            oldest = next(iter(self._all))
            del self._all[oldest]
            if not oldest.is_asking:
                oldest.force_close()
                return True
            self._all[oldest] = None
        return False
