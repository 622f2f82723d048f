"""Transports that hold more than their peers have read, of one server.

Invariants
  1. One that got rid of nothing for `send_stuck_seconds_max` is aborted, at most a quarter of that later.
  2. Together they hold at most `send_unsent_size_bytes_max`; past it the one that holds the most is aborted.

Closing one that is stuck would wait for its peer: only an abort frees it at once.
"""

import asyncio
import logging
from functools import partial
from typing import Final

from engine.clock import Clock, TimerHandle
from engine.limits import Limits

_log = logging.getLogger("engine.server")

_LOOK_COUNT: Final = 4  # in `send_stuck_seconds_max`


class _Held:
    """What one of them held when it was last looked at."""

    __slots__ = ("look_count", "size_bytes", "timer")

    def __init__(self, size_bytes: int, timer: TimerHandle) -> None:
        self.size_bytes, self.timer = size_bytes, timer
        self.look_count = 0  # since it last got rid of anything


class Lagging:
    """Those of one server, from `pause_writing` to `resume_writing`."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits, self._clock = limits, clock
        self._held: dict[asyncio.Transport, _Held] = {}
        self._size_bytes = 0  # of all of them

    def began(self, transport: asyncio.Transport) -> None:
        """It holds more than its high water mark."""
        size_bytes = transport.get_write_buffer_size()
        self._held[transport] = _Held(size_bytes, self._timer(transport))
        self._size_bytes += size_bytes
        while self._size_bytes > self._limits.send_unsent_size_bytes_max:  # 2
            self._abort(max(self._held, key=lambda each: self._held[each].size_bytes), "too much is unsent in all")

    def ended(self, transport: asyncio.Transport) -> None:
        """Its peer has read enough, or it is gone; nothing happens for others."""
        held = self._held.pop(transport, None)
        if held is not None:
            self._size_bytes -= held.size_bytes
            held.timer.cancel()

    def _timer(self, transport: asyncio.Transport) -> TimerHandle:
        return self._clock.call_later(self._limits.send_stuck_seconds_max / _LOOK_COUNT, partial(self._look, transport))

    def _look(self, transport: asyncio.Transport) -> None:
        held, size_bytes = self._held[transport], transport.get_write_buffer_size()
        held.look_count = held.look_count + 1 if size_bytes >= held.size_bytes else 0
        if held.look_count == _LOOK_COUNT:
            self._abort(transport, "nothing was read for long")  # 1
            return
        self._size_bytes += size_bytes - held.size_bytes
        held.size_bytes, held.timer = size_bytes, self._timer(transport)

    def _abort(self, transport: asyncio.Transport, reason: str) -> None:
        self.ended(transport)
        peer = transport.get_extra_info("peername")
        _log.info("a client that does not read was dropped: %s (peer %s)", reason, peer and peer[0])
        transport.abort()
