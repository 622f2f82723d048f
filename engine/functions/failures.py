"""Errors of runs as clients may see them: what is shown, what is hidden, where the whole of it is found.

Invariants
  1. In production only data of an AppError and texts of the asker's own errors leave the process.
  2. Every other failure is emitted whole as `FunctionFaulted`, under the request id that the client is shown.
"""

import traceback

import msgspec

from engine.clock import Clock
from engine.errors import (
    AppError,
    AppFault,
    EngineError,
    FunctionFailed,
    InvalidCursor,
    InvalidResult,
    LimitExceeded,
    RateLimited,
    RequestError,
)
from engine.events import Events, FunctionFaulted
from engine.functions.watchdog import Escaped, RunStopped, StepTimedOut
from engine.limits import Limits
from engine.values import encode_value

_PAGINATION_RESET = b'{"isConvexSystemError":true,"paginationError":"InvalidCursor"}'  # client hooks look for it
_REMEDY = "Read less, use an index, move work to an action, or raise limits.run_ms_max."
_ACTION_REMEDY = "Make it a plain `def`, which runs in a thread, await more often, or raise limits.run_ms_max."
_TEXT_LENGTH_MAX = 16_384  # of an error: it may quote megabytes of data


class Failure(msgspec.Struct, frozen=True):
    """How a function failed, ready for the wire."""

    code: str  # stable: `AppError`, `InvalidArgument`, …
    message: str  # begins with the request id
    data: bytes | None  # JSON of AppError.data; None when the error is not the app's own
    likeness: str  # equal for two failures that a client need not tell apart: without the request id
    error: EngineError  # for callers in this process: the asker's or the app's own error itself


class Failures:
    """Turns exceptions into failures."""

    def __init__(self, limits: Limits, clock: Clock, events: Events, *, is_production: bool) -> None:
        self._limits, self._clock, self._events, self._is_production = limits, clock, events, is_production

    def of(self, error: BaseException, path: str) -> Failure:
        """The failure that a client of function `path` is shown for `error`."""
        request_id = self._clock.entropy(8).hex()
        if isinstance(error, AppError | RequestError):
            # nobody looks where these come from; and their frames hold what will hold the failure, which holds them
            error.__traceback__ = None
        match error:
            case AppError():
                try:
                    data = self._data_of(error)
                except (InvalidResult, LimitExceeded) as cause:
                    return self.of(cause, path)
                return self._failure(error, request_id, f"Uncaught AppError: {data.decode()}", data)
            case InvalidCursor():
                return self._failure(error, request_id, str(error), _PAGINATION_RESET, is_public=True)
            case RateLimited():
                told = {"code": error.code, "name": error.name, "retry_after_ms": error.retry_after_ms}
                data = encode_value(told, self._limits)
                return self._failure(error, request_id, str(error), data, is_public=True)
            case RequestError():
                return self._failure(error, request_id, str(error), None, is_public=True)
            case RunStopped():
                # what is told says where it was; what is kept must not hold the frames
                fault, limit = self._overrun(error, path), self._overrun(error, path)
                fault.__cause__ = error
                self._events.emit(FunctionFaulted(path, request_id, fault))
                return self._failure(limit, request_id, str(limit), None, is_public=True)
            case Escaped() if error.__cause__ is not None:
                return self.of(error.__cause__, path)
            case AppFault():
                self._events.emit(FunctionFaulted(path, request_id, error))
                return self._failure(error, request_id, _trace_of(error), None)
            case _:
                self._events.emit(FunctionFaulted(path, request_id, error))
                # not str(error): the app's `__str__` may raise
                failed = FunctionFailed(f"{path} raised {traceback.format_exception_only(error)[-1].rstrip()}")
                failed.__cause__ = error
                return self._failure(failed, request_id, _trace_of(error), None)

    def _overrun(self, error: RunStopped, path: str) -> LimitExceeded:
        is_action = isinstance(error, StepTimedOut)
        return LimitExceeded(
            f"run time in ms of {path}{' between two awaits' if is_action else ''}",
            used=self._limits.run_ms_max,
            allowed=self._limits.run_ms_max,
            remedy=_ACTION_REMEDY if is_action else _REMEDY,
        )

    def _data_of(self, error: AppError) -> bytes:
        data, allowed = encode_value(error.data, self._limits), self._limits.result_size_bytes_max
        if len(data) > allowed:
            remedy = "Tell the client less, or raise limits.result_size_bytes_max."
            raise LimitExceeded("data of an AppError in bytes", used=len(data), allowed=allowed, remedy=remedy)
        return data

    def _failure(
        self, error: EngineError, request_id: str, text: str, data: bytes | None, *, is_public: bool = False
    ) -> Failure:
        code = error.code
        text = text[:_TEXT_LENGTH_MAX].encode(errors="backslashreplace").decode()  # lone surrogates are no UTF-8
        message = f"[Request ID: {request_id}] Server Error"
        if is_public:
            message += f": {code}: {text}"
        elif not self._is_production:
            message += f"\n{text}"
        return Failure(code, message, data, f"{code}\n{text}\n{data!r}", error)


def _trace_of(error: BaseException) -> str:
    """The traceback from the function's own frames on, as a developer wants to read it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/engine/functions/" not in frame.filename.replace("\\", "/")]
    lines = traceback.format_list(own)
    return "".join(["Uncaught ", *traceback.format_exception_only(error), *lines]).rstrip()
