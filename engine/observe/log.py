"""What a running engine writes to its log.

Invariants
  1. A record takes one line, each line of a traceback one more; every line has its time and level, holds no control
     character, and is cut at 4 KiB. So nobody who chooses a value that is logged can forge a line or move a cursor.
  2. Of records that say the same, at most `SAME_COUNT_MAX` a second are written; the next one tells how many were not.
     So nobody fills the disk by doing over and over what is logged.
  3. Of functions only their faults are logged, whole, under the request id that the client was shown. Arguments,
     results, tokens and headers are not: where an error of ours quotes a value, the value is left out. (What the app
     writes into the text of its own exceptions is there: it is the app's to say.)
"""

import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TextIO

from engine.errors import AppFault
from engine.events import (
    ClockRead,
    CodeReloaded,
    Event,
    Events,
    FunctionFaulted,
    ResultsDiffered,
    RoomEnded,
    RoomReturned,
)

LINE_SIZE_MAX = 4_096
SAME_COUNT_MAX = 10
_KEPT_COUNT_MAX = 1_000
_CUT = " … (cut)"

# C0, DEL and C1 controls, and what else ends a line for some reader; written as Python writes them.
_ESCAPES = {
    code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0xD800, 0xE000))
}

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)  # as `repr` writes text

_log = logging.getLogger("engine.functions")
_storage_log = logging.getLogger("engine.storage")


class LineFormatter(logging.Formatter):
    """`2026-10-01T00:00:00.000Z ERROR engine.functions: chat:send_message failed …`"""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        prefix = f"{moment.removesuffix('+00:00')}Z {record.levelname} {record.name}: "
        return "\n".join(single_line(prefix + line) for line in _lines_of(record))


class FloodFilter(logging.Filter):
    """Leaves out what was said too often just now (2)."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[tuple[object, ...], list[float]] = {}  # since when, and how often since

    def filter(self, record: logging.LogRecord) -> bool:
        function = record.args[0] if hasattr(record, "request_id") and isinstance(record.args, tuple) else None
        key = (record.name, record.msg, function)  # each function has faults of its own
        if len(self._counts) >= _KEPT_COUNT_MAX:
            self._counts.clear()
        count = self._counts.setdefault(key, [record.created, 0])
        if record.created - count[0] >= 1:
            left_out_count = int(count[1]) - SAME_COUNT_MAX
            if left_out_count > 0:
                record.msg, record.args = f"{record.getMessage()} ({left_out_count} more like it were left out)", ()
            count[:] = record.created, 0
        count[1] += 1
        return count[1] <= SAME_COUNT_MAX


def _lines_of(record: logging.LogRecord) -> Iterator[str]:
    yield record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        mark = f"[{record.request_id}] " if hasattr(record, "request_id") else ""
        for line in _trace_of(record.exc_info[1]).rstrip("\n").split("\n"):
            yield f"{mark}{line}"


def _trace_of(error: BaseException) -> str:
    """The traceback, without the values that our own errors quote (3)."""
    trace = "".join(traceback.format_exception(error))
    part: BaseException | None = error
    seen: set[int] = set()  # an app can tie a knot
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        if isinstance(part, AppFault):
            text = BaseException.__str__(part)
            trace = trace.replace(text, _QUOTED.sub("'…'", text))
        part = part.__cause__ or part.__context__
    return trace


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
    handler.addFilter(FloodFilter())
    logging.basicConfig(handlers=[handler], level=level, force=True)


def log_events(events: Events) -> Callable[[], None]:
    """Write an engine's faults and warnings to the log from now on; the returned function ends that."""
    warned: set[str] = set()  # paths of functions, until the code changes
    differed: set[str] = set()

    def write(event: Event) -> None:
        if isinstance(event, ClockRead) and event.path not in warned:
            warned.add(event.path)
            _log.warning(
                "%s reads ctx.now: its result stays as it is until something that it read is written. "
                "A bound that moves with time is ctx.ago(minutes=2); ctx.rerun_at(ms) runs it again.",
                event.path,
            )
        elif isinstance(event, ResultsDiffered) and event.path not in differed:
            differed.add(event.path)
            _log.warning(
                "%s returned something else when it ran again on the same data: what it returns must depend on its "
                "arguments and on what it reads only. ctx.random and ctx.now are the same for both runs; random, "
                "uuid, time and what a module keeps are not.",
                event.path,
            )
        elif isinstance(event, CodeReloaded):
            warned.clear()
            differed.clear()
        _write(event)

    return events.listen(write)


def _write(event: Event) -> None:
    if isinstance(event, RoomEnded):
        _storage_log.warning("the disk has no room: mutations are refused until there is some again; queries go on")
    elif isinstance(event, RoomReturned):
        _storage_log.warning("the disk has room again: mutations are taken")
    if isinstance(event, FunctionFaulted):
        _log.error(
            "%s failed [Request ID: %s] %s",
            event.path,
            event.request_id,
            type(event.error).__name__,
            exc_info=event.error,
            extra={"request_id": event.request_id},
        )
