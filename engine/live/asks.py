"""What has been asked lately: the same ask is one object, and its arguments are decoded once.

Clients that come back after a lost connection all ask the same: finding the call of an ask costs a look-up then.

Invariants
  1. A call that is kept is what resolving the ask would give now; refusals are not kept.
  2. At most `_COUNT_MAX` asks with at most `_SIZE_BYTES_MAX` each are kept, the newest.
"""

from collections.abc import Callable

from engine.functions.outcomes import Call
from engine.live.live_query import Ask

_COUNT_MAX = 4_096
_SIZE_BYTES_MAX = 1_024  # of path, arguments and journal


class Asks:
    """The asks of one engine."""

    def __init__(self, resolve: Callable[[str, bytes], Call]) -> None:
        self._resolve = resolve  # raises RequestError
        self._known: dict[Ask, tuple[Ask, Call]] = {}  # oldest first

    def ask(self, path: str, arguments: bytes, journal: str | None) -> Ask:
        """This ask; the object that is kept for it, if there is one."""
        ask = Ask(path, arguments, journal)
        known = self._known.get(ask)
        return ask if known is None else known[0]

    def call(self, ask: Ask) -> Call:
        """What is asked for. Raises RequestError."""
        known = self._known.get(ask)
        if known is not None:
            return known[1]
        call = self._resolve(ask.path, ask.arguments)
        if len(ask.path) + len(ask.arguments) + len(ask.journal or "") <= _SIZE_BYTES_MAX:
            if len(self._known) >= _COUNT_MAX:
                del self._known[next(iter(self._known))]
            self._known[ask] = (ask, call)
        return call

    def clear(self) -> None:
        """The app's code has changed."""
        self._known.clear()
