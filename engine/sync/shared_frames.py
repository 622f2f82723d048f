"""Ready frames of Transitions that many sessions are sent alike.

A Transition depends on where it starts, where it ends and what it brings. Sessions that were given the same so far, and
ask a query under the same id, get the same bytes; so these are made once, down to the frame of the door.

Invariants
  1. Frames of one result only are kept, of at most `_COUNT_MAX` starts.
  2. Sessions that are given one frame hold one `StateVersion` then.
"""

from collections.abc import Callable

from engine.clock import Clock
from engine.sync import protocol
from engine.sync.protocol import Frame, Result, StateVersion

_COUNT_MAX = 64

Shared = tuple[bytes, StateVersion, float]  # a ready frame, where it ends, when it was made (monotonic)


class SharedFrames:
    """For the sessions of one door whose frames are made in one way."""

    def __init__(self, ready: Callable[[Frame], bytes], clock: Clock) -> None:
        self._ready, self._clock = ready, clock  # `ready` makes a message ready to be written
        self._result: Result | None = None
        self._by_start: dict[tuple[bytes, int], Shared] = {}  # text of the start and query id
        self._end_by_announced: dict[tuple[int, int], StateVersion] = {}

    def get(self, start: StateVersion, query_id: int, result: Result) -> Shared:
        """The Transition that brings this result alone, a value and not large, to a client that is at `start`."""
        if result is self._result:
            shared = self._by_start.get((start.text, query_id))
            if shared is not None:
                return shared
        else:
            self._result, self._by_start, self._end_by_announced = result, {}, {}
        return self._make(start, query_id, result)

    def _make(self, start: StateVersion, query_id: int, result: Result) -> Shared:
        announced = (start.query_set, start.identity)
        end = self._end_by_announced.get(announced)
        if end is None:
            end = self._end_by_announced[announced] = StateVersion(*announced, result.ts)
        if len(self._by_start) >= _COUNT_MAX:
            del self._by_start[next(iter(self._by_start))]
        message = protocol.transition(start, end, [(query_id, protocol.fragment_of(result))], None)
        shared = self._by_start[start.text, query_id] = (self._ready(message), end, self._clock.monotonic())
        return shared
