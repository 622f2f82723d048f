"""The log: one line a record, nothing forged, faults whole."""

import io
import logging

import pytest

from engine.errors import InvalidResult, UniqueViolation
from engine.events import Committed, Events, FunctionFaulted, QueryRan, RoomEnded, RoomReturned
from engine.observe.log import LINE_SIZE_MAX, SAME_COUNT_MAX, FloodFilter, log_events, single_line


def fault() -> BaseException:
    try:
        try:
            raise KeyError("inner")
        except KeyError as cause:
            raise ValueError("outer\nforged line") from cause
    except ValueError as error:
        return error


def test_a_record_is_one_line_with_time_and_level(written: io.StringIO) -> None:
    logging.getLogger("engine.auth").warning("it is %s", "late")
    assert written.getvalue().endswith("Z WARNING engine.auth: it is late\n")
    assert written.getvalue().count("\n") == 1


@pytest.mark.parametrize("evil", ["\n", "\r", "\r\n", "\x1b[2J", "\0", "\x7f", "\x85", "\u2028", "\u2029", "\ud800"])
def test_a_value_cannot_forge_a_line_or_steer_a_terminal(written: io.StringIO, evil: str) -> None:
    logging.getLogger("engine").error("hello %s ERROR you are hacked", evil)
    text = written.getvalue()
    assert text.endswith("\n")
    assert text[:-1].isprintable()


def at(seconds: float, message: str, *args: object, **more: object) -> logging.LogRecord:
    record = logging.LogRecord("engine.sync", logging.INFO, "", 0, message, args, None)
    record.created = seconds
    vars(record).update(more)
    return record


def test_what_is_said_over_and_over_is_left_out_and_counted() -> None:
    flood = FloodFilter()
    passed = [flood.filter(at(100 + n / 1_000, "session %s: no", n)) for n in range(900)]
    assert passed == [True] * SAME_COUNT_MAX + [False] * (900 - SAME_COUNT_MAX)
    assert flood.filter(at(100.95, "something else"))
    later = at(101.1, "session %s: no", 7)
    assert flood.filter(later)
    assert later.getMessage() == f"session 7: no ({900 - SAME_COUNT_MAX} more like it were left out)"
    assert flood.filter(at(101.2, "session %s: no", 8))


def test_the_faults_of_one_function_hide_no_other_ones() -> None:
    flood = FloodFilter()
    for n in range(100):
        flood.filter(at(100, "%s failed [%s]", "m:often", n, request_id=n))
    assert not flood.filter(at(100, "%s failed [%s]", "m:often", 100, request_id=100))
    assert flood.filter(at(100, "%s failed [%s]", "m:once", 101, request_id=101))


def test_text_in_any_script_stays_readable() -> None:
    assert single_line("Алиса — 爱丽丝 🦀") == "Алиса — 爱丽丝 🦀"


@pytest.mark.parametrize("text", ["x" * 9_999, "爱" * 9_999, "\n" * 9_999])
def test_a_line_is_cut_at_4_kib(text: str) -> None:
    line = single_line(text)
    assert LINE_SIZE_MAX - 4 < len(line.encode()) <= LINE_SIZE_MAX
    assert line.endswith("… (cut)")
    assert single_line("x" * LINE_SIZE_MAX) == "x" * LINE_SIZE_MAX


def test_a_fault_is_logged_whole_under_its_request_id(written: io.StringIO) -> None:
    events = Events()
    log_events(events)
    events.emit(FunctionFaulted("chat:send_message", "c0ffee", fault()))
    lines = written.getvalue().splitlines()
    assert "chat:send_message failed [Request ID: c0ffee] ValueError" in lines[0]
    assert all("ERROR engine.functions: " in line and "c0ffee" in line for line in lines)
    assert any("KeyError: 'inner'" in line for line in lines)
    assert any("in fault" in line for line in lines)
    assert lines[-1].endswith("[c0ffee] forged line")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidResult("n: expected int, got 'it\\'s secret'"), "InvalidResult: n: expected int, got '…'"),
        (
            UniqueViolation("users", "by_name", {"name": 'a "secret" one'}),
            "users.by_name: a document with {'…': '…'} is",
        ),
        (ValueError("what the app says: 'shown'"), "ValueError: what the app says: 'shown'"),
    ],
)
def test_values_that_our_own_errors_quote_are_left_out(written: io.StringIO, error: Exception, told: str) -> None:
    events = Events()
    log_events(events)
    later = RuntimeError("it went wrong after that")
    later.__context__ = error
    events.emit(FunctionFaulted("chat:send_message", "c0ffee", later))
    assert told in written.getvalue()
    assert "secret" not in written.getvalue()


def test_errors_that_cause_each_other_are_logged_and_come_to_an_end(written: io.StringIO) -> None:
    events = Events()
    log_events(events)
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    events.emit(FunctionFaulted("chat:send_message", "c0ffee", first))
    assert "ValueError: first" in written.getvalue()


def test_what_is_not_a_fault_is_not_logged(written: io.StringIO) -> None:
    events = Events()
    end = log_events(events)
    events.emit(Committed(ts=1, mutation_count=1, write_count=1))
    events.emit(QueryRan(path="chat:get_messages", ts=1))
    end()
    events.emit(FunctionFaulted("chat:send_message", "c0ffee", fault()))
    assert written.getvalue() == ""


def test_a_full_disk_is_logged_and_so_is_its_end(written: io.StringIO) -> None:
    events = Events()
    log_events(events)
    events.emit(RoomEnded())
    events.emit(RoomReturned())
    full, free = written.getvalue().splitlines()
    assert "WARNING engine.storage: the disk has no room: mutations are refused" in full
    assert "WARNING engine.storage: the disk has room again" in free
