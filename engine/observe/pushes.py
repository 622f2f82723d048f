"""Why each push was sent: the commit, the function, the document and the read that it fell into. For development."""

from collections import deque
from collections.abc import Callable

from engine.events import Event, Events, Reran

_KEPT_COUNT = 500  # pushes that can be looked up: the newest


def text_of(push: Reran) -> str:
    """One line, for people."""
    cause = push.cause
    by = f"{cause.function or 'the engine'} wrote {cause.write}, in {cause.read}" if cause.write else cause.read
    arguments = push.arguments.decode(errors="replace")
    return f"{'push' if push.is_changed else 'same'} {push.path} {arguments} <- commit {cause.ts}: {by}"


class PushTrace:
    """The newest pushes of an engine, and the runs that changed nothing; `on_push` is called with each."""

    def __init__(self, events: Events, on_push: Callable[[Reran], None] = lambda push: None) -> None:
        self.pushes: deque[Reran] = deque(maxlen=_KEPT_COUNT)
        self._on_push = on_push
        events.trace(self._write)

    def _write(self, event: Event) -> None:
        if isinstance(event, Reran):
            self.pushes.append(event)
            self._on_push(event)
