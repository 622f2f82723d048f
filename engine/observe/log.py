"""What a running engine writes to its log.

Invariants
  1. A record takes one line, each line of a traceback one more; every line has its time and level, holds no control
     character, and is cut at 4 KiB. So nobody who chooses a value that is logged can forge a line or move a cursor.
  2. Of functions only their faults are logged, whole, under the request id that the client was shown. Arguments,
     results, tokens and headers are not.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TextIO

from engine.events import ClockRead, Event, Events, FunctionFaulted

LINE_SIZE_MAX = 4_096
_CUT = " … (cut)"

# C0, DEL and C1 controls, and what else ends a line for some reader; written as Python writes them.
_ESCAPES = {
    code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0xD800, 0xE000))
}

_log = logging.getLogger("engine.functions")


class LineFormatter(logging.Formatter):
    """`2026-10-01T00:00:00.000Z ERROR engine.functions: chat:send_message failed …`"""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        prefix = f"{moment.removesuffix('+00:00')}Z {record.levelname} {record.name}: "
        return "\n".join(single_line(prefix + line) for line in _lines_of(record))


def _lines_of(record: logging.LogRecord) -> Iterator[str]:
    yield record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        mark = f"[{record.request_id}] " if hasattr(record, "request_id") else ""
        for part in traceback.format_exception(record.exc_info[1]):
            yield from (f"{mark}{line}" for line in part.rstrip("\n").split("\n"))


def single_line(text: str) -> str:
    """The text without control characters, and at most 4 KiB of it (1)."""
    line = text.translate(_ESCAPES)
    if len(line) > LINE_SIZE_MAX or len(line.encode()) > LINE_SIZE_MAX:
        kept = line.encode()[: LINE_SIZE_MAX - len(_CUT.encode())]
        line = kept.decode(errors="ignore") + _CUT
    return line


def set_up_logging(*, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the log of this process to a stream (default: standard error); what was set up before is replaced."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)


def log_events(events: Events) -> Callable[[], None]:
    """Write an engine's faults and warnings to the log from now on; the returned function ends that."""
    warned: set[str] = set()

    def write(event: Event) -> None:
        if isinstance(event, ClockRead) and event.path not in warned:
            warned.add(event.path)
            _log.warning(
                "%s reads ctx.now: its result stays as it is until something that it read is written. "
                "A bound that moves with time is ctx.ago(minutes=2); ctx.rerun_at(ms) runs it again.",
                event.path,
            )
        _write(event)

    return events.listen(write)


def _write(event: Event) -> None:
    if isinstance(event, FunctionFaulted):
        _log.error(
            "%s failed [Request ID: %s] %s",
            event.path,
            event.request_id,
            type(event.error).__name__,
            exc_info=event.error,
            extra={"request_id": event.request_id},
        )
