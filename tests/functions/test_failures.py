"""Errors of runs as clients may see them."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from engine.errors import (
    AppError,
    DocumentNotFound,
    EngineError,
    FunctionNotFound,
    InvalidArgument,
    InvalidCursor,
    InvalidResult,
    LimitExceeded,
    NotUnique,
    Overloaded,
)
from engine.events import Event, Events, FunctionFaulted
from engine.functions.failures import Failure, Failures
from engine.functions.run import RanLong
from engine.functions.watchdog import Escaped, RunTimedOut
from engine.limits import Limits
from engine.testing import ManualClock

RESET = {"isConvexSystemError": True, "paginationError": "InvalidCursor"}


class Shown:
    """What a door makes of errors, and what it tells those who listen."""

    def __init__(self, *, is_production: bool) -> None:
        self.told: list[Event] = []
        events = Events()
        events.listen(self.told.append)
        self._failures = Failures(Limits(), ManualClock(), events, is_production=is_production)

    def failure_of(self, error: BaseException) -> Failure:
        try:
            raise error  # with a traceback, as it comes from a run
        except BaseException as raised:  # noqa: BLE001 - runs catch all
            return self._failures.of(raised, "m:get")


@pytest.fixture(params=[False, True], ids=["development", "production"])
def is_production(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


ASKERS: list[EngineError] = [
    InvalidArgument("limit: expected int, got 1.5"),
    FunctionNotFound("m:get", "query"),
    LimitExceeded("documents read", used=3, allowed=2, remedy="Read fewer."),
    Overloaded("try again"),
]


@pytest.mark.parametrize("error", ASKERS, ids=lambda error: error.code)
def test_the_askers_own_errors_are_shown_in_either_mode_and_are_no_faults(
    error: EngineError, is_production: bool
) -> None:
    shown = Shown(is_production=is_production)
    failure = shown.failure_of(error)
    assert failure.message.endswith(f"Server Error: {error.code}: {error}")
    assert (failure.code, failure.data, failure.error, shown.told) == (error.code, None, error, [])


def test_an_invalid_cursor_carries_what_client_hooks_look_for(is_production: bool) -> None:
    failure = Shown(is_production=is_production).failure_of(InvalidCursor("damaged"))
    assert "InvalidCursor" in failure.message
    assert failure.data is not None
    assert msgspec.json.decode(failure.data) == RESET


def test_data_of_an_app_error_is_shown_in_either_mode_but_its_text_in_development_only(is_production: bool) -> None:
    failure = Shown(is_production=is_production).failure_of(AppError({"code": "FULL"}))
    assert failure.data == b'{"code":"FULL"}'
    assert ("FULL" in failure.message) is not is_production


FAULTS: list[tuple[BaseException, str]] = [
    (DocumentNotFound("items", "x", "patch"), "DocumentNotFound"),
    (NotUnique("two"), "NotUnique"),
    (InvalidResult("wrong"), "InvalidResult"),
    (ValueError("secret"), "FunctionFailed"),
    (SystemExit(3), "FunctionFailed"),
]


@pytest.mark.parametrize(("error", "code"), FAULTS, ids=[code + type(error).__name__ for error, code in FAULTS])
def test_the_apps_mistakes_are_hidden_in_production_and_found_by_their_request_id(
    error: BaseException, code: str, is_production: bool
) -> None:
    shown = Shown(is_production=is_production)
    failure = shown.failure_of(error)
    (fault,) = shown.told
    assert isinstance(fault, FunctionFaulted)
    assert (fault.path, fault.error) == ("m:get", error)
    assert failure.message.startswith(f"[Request ID: {fault.request_id}] Server Error")
    assert (failure.message == f"[Request ID: {fault.request_id}] Server Error") is is_production
    assert ("raise error" in failure.message) is not is_production, "the line that raised"
    assert (failure.code, failure.data) == (code, None)


def test_what_escaped_is_told_as_what_it_was() -> None:
    shown, cause = Shown(is_production=False), SystemExit(3)
    escaped = Escaped()
    escaped.__cause__ = cause
    failure = shown.failure_of(escaped)
    assert failure.error.__cause__ is cause
    assert "SystemExit: 3" in failure.message


@pytest.mark.parametrize("stop", [RunTimedOut, RanLong])
def test_a_stopped_run_names_the_limit_and_is_told_as_a_fault(
    stop: Callable[[], BaseException], is_production: bool
) -> None:
    shown = Shown(is_production=is_production)
    failure = shown.failure_of(stop())
    assert failure.code == "LimitExceeded"
    assert "run time in ms of m:get: 1,000 used, 1,000 allowed" in failure.message
    assert len(shown.told) == 1


def test_each_failure_has_a_request_id_of_its_own_and_like_ones_are_alike() -> None:
    shown = Shown(is_production=True)

    def fail(text: str) -> Failure:
        return shown.failure_of(ValueError(text))

    first, second, other = fail("a"), fail("a"), fail("b")
    assert first.message != second.message
    assert first.likeness.splitlines()[0] == second.likeness.splitlines()[0] == "FunctionFailed"
    assert first.likeness == second.likeness
    assert first.likeness != other.likeness


@pytest.mark.parametrize("error", [ValueError("\ud800"), ValueError("x" * 10_000_000), AppError("x" * 1_000_000)])
def test_a_message_is_text_of_bounded_size(error: BaseException) -> None:
    failure = Shown(is_production=False).failure_of(error)
    assert len(failure.message.encode()) < 20_000


def test_an_error_that_cannot_be_written_is_a_failure_too() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    assert Shown(is_production=False).failure_of(Odd()).code == "FunctionFailed"


@pytest.mark.parametrize("data", [object(), "\ud800", {"$key": 1}, {1: 2}])
def test_data_that_the_wire_does_not_know_is_an_invalid_result(data: Any, is_production: bool) -> None:
    failure = Shown(is_production=is_production).failure_of(AppError(data))
    assert (failure.code, failure.data) == ("InvalidResult", None)


def test_data_past_the_size_of_a_result_passes_the_limit() -> None:
    assert Shown(is_production=False).failure_of(AppError("x" * (9 << 20))).code == "LimitExceeded"
