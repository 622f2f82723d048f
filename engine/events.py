"""What happened, for whoever listens: tests, logs and metrics.

Emitting costs one truth test while nobody listens: `if events.listeners: events.emit(Committed(...))`.
A listener must not raise and must not call back into the engine.
"""

from collections.abc import Callable

import msgspec


class Event(msgspec.Struct, frozen=True):
    """The base of all events."""


class Committed(Event, frozen=True):
    ts: int  # newest commit timestamp of the group
    mutation_count: int  # mutations that were settled with it, failed ones too
    write_count: int  # documents that it changed


class QueryRan(Event, frozen=True):
    path: str
    ts: int  # the snapshot that it read


class ResultUnchanged(Event, frozen=True):
    """A live query ran again and its bytes are equal: nobody is told."""

    path: str
    ts: int


class ResultChanged(Event, frozen=True):
    path: str
    ts: int


class Cause(msgspec.Struct, frozen=True):
    """Why a live query runs again."""

    ts: int  # of the commit
    function: str  # path of the mutation that wrote; empty: the engine itself
    write: str  # `table/id`; empty: nothing was written, a moment has come
    read: str  # what of the query's reads it falls into, in words


class Reran(Event, frozen=True):
    """A live query ran again; only told while somebody traces (`Events.trace`)."""

    path: str
    arguments: bytes  # JSON, as the first who asked sent them
    cause: Cause
    is_changed: bool  # whether subscribers were sent anything


class MutationRan(Event, frozen=True):
    path: str
    committed: bool


class ActionRan(Event, frozen=True):
    path: str
    succeeded: bool


class FunctionFaulted(Event, frozen=True):
    """A function failed by its own mistake; the log has the traceback under `request_id`."""

    path: str
    request_id: str
    error: BaseException


class ClockRead(Event, frozen=True):
    """A query asked what time it is, and nothing will run it again when that has changed its result."""

    path: str


class ResultsDiffered(Event, frozen=True):
    """A query returned something else when it ran twice on the same data, for the same caller at the same time."""

    path: str


class CodeReloaded(Event, frozen=True):
    function_count: int


class RoomEnded(Event, frozen=True):
    """The disk of the database is full, or nearly: mutations are refused from now on."""


class RoomReturned(Event, frozen=True):
    """Mutations commit again."""


class JobFinished(Event, frozen=True):
    path: str
    state: str


class DisconnectRan(Event, frozen=True):
    """A mutation ran that was registered for the end of a session."""

    path: str
    succeeded: bool


class Events:
    """The listeners of one engine."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Event], None]] = []
        self.is_traced = False  # whether reasons are wanted too, which cost time to find

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` for each event from now on; the returned function ends that."""
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def trace(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """As `listen`, and be told of reasons too from now on."""
        self.is_traced = True
        return self.listen(listener)

    def emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)
