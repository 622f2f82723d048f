"""Connections without sockets: messages that take their time, in order, and may be lost with the connection.

The server's end is the door to a real `Session`: it feeds it, flushes it, and says so when the client lags.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from engine.clock import Clock
from engine.limits import Limits
from engine.sync.backend import Backend
from engine.sync.session import Session
from engine.sync.shared_frames import SharedFrames


class Conditions(NamedTuple):
    """How a network behaves."""

    delay_seconds_max: float = 0.004  # one way
    cut_chance: float = 1 / 400  # with each message
    lag_chance: float = 1 / 200  # that the client stops reading for a while


class Server(NamedTuple):
    """What the connections of one process share."""

    backend: Backend
    limits: Limits
    clock: Clock
    shared_frames: SharedFrames


class Line:
    """One connection: the client's hold on it, and the server's door."""

    def __init__(
        self, server: Server, random_source: Random, conditions: Conditions, tell: Callable[[str], None]
    ) -> None:
        self.close_code: int | None = None  # that the server closed with
        self.conditions = conditions
        self._random, self._tell = random_source, tell
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[str | None] = asyncio.Queue()  # None: the connection is gone
        self._is_cut = False
        self._arrivals = {"in": 0.0, "out": 0.0}  # of what was sent last: nothing overtakes it
        self._unread: deque[str] = deque()  # by the session, which wants no more for now
        self._is_due, self._is_lagging = False, False
        self._session = Session(
            server.backend,
            server.limits,
            server.clock,
            wake=self._flush_soon,
            write=self._write,
            shared=server.shared_frames,
        )

    # -- the client's end

    async def say(self, text: str) -> None:
        """Raises ConnectionError when the connection is known to be gone."""
        if self._is_cut:
            raise ConnectionResetError
        self._send("in", lambda: self._receive(text))

    async def hear(self) -> str | None:
        """The next message; None once the connection is gone."""
        return await self._heard.get()

    def cut(self) -> None:
        """Both ends lose it, and what is on its way."""
        if not self._is_cut:
            self._is_cut = True
            self._heard.put_nowait(None)
            self._session.close(1000, "")

    # -- the server's end

    def _receive(self, text: str) -> None:
        self._unread.append(text)
        self._feed()
        self._flush()

    def _feed(self) -> None:
        while self._unread and not self._session.is_reading_paused:
            self._session.receive(self._unread.popleft())

    def _flush_soon(self) -> None:
        if not self._is_due and not self._is_cut:
            self._is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        session = self._session
        self._is_due = False
        if self._is_cut:
            return
        session.flush()
        frames, session.outbox = session.outbox, []
        for frame in frames:
            self._write(b"".join(frame))
        if session.ping_payload is not None:
            payload, session.ping_payload = session.ping_payload, None
            self._send("out", lambda: self._send("in", lambda: session.pong(payload)))
        if session.closing is not None:
            self._send("out", lambda: self._closed(session.closing.code if session.closing else None))
        elif not self._is_lagging:
            self._feed()
            if frames and self._random.random() < self.conditions.lag_chance:
                self._lag()

    def _write(self, frame: bytes) -> None:
        self._send("out", lambda: self._heard.put_nowait(frame.decode()))

    def _closed(self, code: int | None) -> None:
        self.close_code = code
        self.cut()

    def _lag(self) -> None:
        """The client reads nothing for some time: it is skipped, and gets the newest state then."""
        self._tell("lags")
        self._is_lagging = True
        self._session.set_lagging(True)
        self._loop.call_later(self._random.random() * 0.1, self._catch_up)

    def _catch_up(self) -> None:
        self._is_lagging = False
        if not self._is_cut:
            self._session.set_lagging(False)

    # -- the way between them

    def _send(self, direction: str, deliver: Callable[[], None]) -> None:
        if self._is_cut:
            return
        if self._random.random() < self.conditions.cut_chance:
            self._tell("cut")
            self._loop.call_soon(self.cut)
            return
        delay = self._random.random() * self.conditions.delay_seconds_max
        self._arrivals[direction] = max(self._loop.time() + delay, self._arrivals[direction] + 1e-6)
        self._loop.call_at(self._arrivals[direction], lambda: None if self._is_cut else deliver())
