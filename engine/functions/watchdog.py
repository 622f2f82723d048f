"""Stops functions that do not end: a thread that raises an exception in the thread that runs them.

    marked ──run_ms_max passes──> injected into the app's code, again every look until it leaves ──> it has failed

Invariants
  1. The watchdog injects only while the marker says that a function is being driven; clearing it and injecting happen
     under one lock, and clearing withdraws what was not delivered yet. A run that it stopped has failed, also when the
     function swallowed the exception.
  2. It injects only where the innermost frame is not the engine's, so that hardly any stop lands in engine code, and
     what the engine shares between runs is not left half changed. `ctx.db` checks the deadline by itself.
It cannot break a blocking C call: that run fails when the call returns (`server/held_loop.py` sees to what holds on).
"""

import ctypes
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.clock import cpu_clock
from engine.limits import Limits

_cpu = cpu_clock()
_LOOK_SECONDS = 0.05
_LOOK_AGAIN_SECONDS = 0.001  # while engine code is under way, which is soon back in the app's
_ENGINE = f"{Path(__file__).parents[1]}{os.sep}"


class RunStopped(BaseException):
    """Ends a run from outside; not an Exception, so that `except Exception` in a function does not swallow it."""


class RunTimedOut(RunStopped):
    """The run held the loop for run_ms_max."""


class StepTimedOut(RunStopped):
    """An action held the loop for run_ms_max between two waits."""


class Escaped(Exception):
    """A function let out what is no Exception (SystemExit, CancelledError, …): its `__cause__`.

    It is a failure like any other; going on as it is, it would end the loop that serves everybody.
    """


class ThreadCall:
    """A plain function that runs in a thread of its own, and is stopped there once nobody waits for it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._thread_id: int | None = None  # while it runs: the marker

    def __call__(self) -> Any:
        self._thread_id = threading.get_ident()
        try:
            return self._function()
        finally:
            self._leave()

    def stop(self) -> bool:
        """Inject once, if it is in code of the app just now (2); False when it does not run (any more)."""
        with self._lock:
            if self._thread_id is None:
                return False
            if not _is_in_engine(self._thread_id):
                _inject(self._thread_id, RunTimedOut)
            return True

    def _leave(self) -> None:
        try:
            with self._lock:
                if self._thread_id is not None:
                    _inject(self._thread_id, None)
                self._thread_id = None
        except RunTimedOut:  # delivered just here
            self._leave()


class Watchdog:
    """Watches the functions of one engine; entered around each that is driven on the loop.

    A run costs two looks at a clock and one lock operation.
    """

    def __init__(self, limits: Limits) -> None:
        self._run_seconds_max = limits.run_ms_max / 1000
        self._lock = threading.Lock()
        self._driven_since: float | None = None  # the marker (1)
        self._was_injected = False
        self._is_in_step = False  # of an action: what is driven inside of it leaves its marker behind
        self._abandoned: list[ThreadCall] = []  # nobody waits for them any more
        self._loop_thread_id = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> None:
        self._driven_since = _cpu()  # one assignment: the thread sees all of it, or nothing yet

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leave() and not isinstance(error, RunTimedOut):
            raise RunTimedOut from error  # whatever the function made of it: half an operation may have been cut off
        if error is not None and not isinstance(error, (Exception, RunStopped, KeyboardInterrupt)):
            raise Escaped from error

    def steps(self, coroutine: Any) -> Awaitable[Any]:
        """An action's coroutine, each step of which, from one wait to the next, is watched."""
        return _Steps(self, coroutine)

    def step(self, advance: Callable[[], Any]) -> Any:
        """One of them. What it waits for is the engine's as often as not, and then drives runs of its own inside."""
        outer, self._is_in_step = self._is_in_step, True
        self._driven_since = _cpu()
        try:
            return advance()
        finally:
            self._is_in_step = outer
            if self._leave():
                raise StepTimedOut

    def abandon(self, call: ThreadCall) -> None:
        """Stop this one, as often as it takes."""
        if call.stop():
            with self._lock:
                self._abandoned.append(call)

    def _leave(self) -> bool:
        """Clear the marker; whether what was driven has been stopped."""
        try:
            with self._lock:
                self._driven_since = _cpu() if self._is_in_step else None
                was_stopped, self._was_injected = self._was_injected, False
                if was_stopped:
                    _inject(self._loop_thread_id, None)  # withdraws it if it was not delivered
                return was_stopped
        except RunTimedOut:  # delivered just here: the marker must be cleared all the same
            self._leave()
            return True

    def _watch(self) -> None:
        seconds = _LOOK_SECONDS
        while not self._stopped.wait(seconds):
            seconds = _LOOK_SECONDS
            with self._lock:
                since = self._driven_since
                # again each time: Python drops what is raised in a `__del__`, and a function may catch it
                if since is not None and _cpu() - since > self._run_seconds_max:
                    if _is_in_engine(self._loop_thread_id):
                        seconds = _LOOK_AGAIN_SECONDS
                    else:
                        self._was_injected = True
                        _inject(self._loop_thread_id, RunTimedOut)
                if self._abandoned:
                    self._abandoned = [call for call in self._abandoned if call.stop()]


class _Steps:
    """Awaiting it drives a coroutine as `await` does."""

    def __init__(self, watchdog: Watchdog, coroutine: Any) -> None:
        self._watchdog, self._coroutine = watchdog, coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine = self._coroutine
        advance = go_on = partial(coroutine.send, None)
        while True:
            try:
                yielded = self._watchdog.step(advance)
            except StopIteration as stop:
                return stop.value
            advance = go_on
            try:
                yield yielded
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's
                advance = partial(coroutine.throw, error)


def _is_in_engine(thread_id: int) -> bool:
    """Whether the innermost frame of a thread is the engine's."""
    frame = sys._current_frames().get(thread_id)
    return frame is not None and frame.f_code.co_filename.startswith(_ENGINE)


def _inject(thread_id: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), ctypes.py_object(error) if error is not None else None
    )
