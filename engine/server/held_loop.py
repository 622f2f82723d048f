"""What becomes of a serving process whose event loop is held: by a call that blocks, which no exception can break.

    goes on ──loop_held_dump_seconds without a sign──> its stack is in the log ──loop_held_seconds_max──> ended

A thread counts the seconds in which the loop gave no sign: none while the whole process stands still (a paused
container). Where that thread cannot run either, since C code keeps the interpreter to itself (a regular expression that
backtracks without end), faulthandler ends the process a little later, with all stacks and its own exit code, 1.
"""

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from engine.clock import Clock, TimerHandle
from engine.limits import Limits

_SIGN_SECONDS = 1.0
_SPARE_SECONDS = 5  # for the thread to end the process in its own way
_log = logging.getLogger("engine")


@contextmanager
def watched_loop(limits: Limits, clock: Clock, *, exit_code: int | None) -> Iterator[None]:
    """Watch the running loop meanwhile. No exit code: the process goes on, as somebody may debug it."""
    watch = _Watch(limits, clock, exit_code)
    try:
        yield
    finally:
        watch.close()


class _Watch:
    def __init__(self, limits: Limits, clock: Clock, exit_code: int | None) -> None:
        self._limits, self._clock, self._exit_code = limits, clock, exit_code
        self._silent_count = 0  # seconds since the last sign; counted by the thread, cleared by the loop
        self._loop_thread_id = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._count, name="engine-loop-watch", daemon=True)
        self._timer: TimerHandle
        self._give_sign()
        self._thread.start()

    def close(self) -> None:
        self._timer.cancel()
        self._closed.set()
        self._thread.join()
        if self._exit_code is not None:
            faulthandler.cancel_dump_traceback_later()

    def _give_sign(self) -> None:
        silent_count, self._silent_count = self._silent_count, 0
        if silent_count >= self._limits.loop_held_dump_seconds:
            _log.warning("the event loop goes on; it was held for about %d s", silent_count)
        if self._exit_code is not None:  # 30 µs a second
            faulthandler.dump_traceback_later(self._limits.loop_held_seconds_max + _SPARE_SECONDS, exit=True)
        self._timer = self._clock.call_later(_SIGN_SECONDS, self._give_sign)

    def _count(self) -> None:
        while not self._closed.wait(_SIGN_SECONDS):
            self._silent_count += 1
            if self._silent_count == self._limits.loop_held_dump_seconds:
                self._dump()
            if self._exit_code is not None and self._silent_count >= self._limits.loop_held_seconds_max:
                _log.critical(
                    "the process ends: its event loop was held for %d s, which nobody can wait for. A call that blocks "
                    "belongs into an @action that is a plain `def`; or raise limits.loop_held_seconds_max.",
                    self._silent_count,
                )
                logging.shutdown()
                os._exit(self._exit_code)

    def _dump(self) -> None:
        trace, frame = None, sys._current_frames().get(self._loop_thread_id)
        while frame is not None:
            trace = TracebackType(trace, frame, frame.f_lasti, frame.f_lineno)
            frame = frame.f_back
        held = TimeoutError(f"the event loop is held for {self._silent_count} s, nobody is served")
        _log.error("%s", held, exc_info=held.with_traceback(trace))
