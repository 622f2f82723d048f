"""The log: one line a record, nothing forged, faults whole."""

import io
import logging
from collections.abc import Iterator

import pytest

from engine.events import Committed, Events, FunctionFaulted, QueryRan
from engine.observe.log import LINE_SIZE_MAX, log_events, set_up_logging, single_line


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the log receives; the set-up of pytest is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    root.handlers.clear()
    set_up_logging(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


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


def test_what_is_not_a_fault_is_not_logged(written: io.StringIO) -> None:
    events = Events()
    end = log_events(events)
    events.emit(Committed(ts=1, mutation_count=1, write_count=1))
    events.emit(QueryRan(path="chat:get_messages", ts=1))
    end()
    events.emit(FunctionFaulted("chat:send_message", "c0ffee", fault()))
    assert written.getvalue() == ""
