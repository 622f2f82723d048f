"""Every error that the engine raises, and whom it concerns.

    EngineError
    ├── RequestError              the asker's: clear, cheap, never logged as an error; its message reaches the client
    │   ├── InvalidArgument       an argument is wrong, missing or unknown
    │   ├── FunctionNotFound      no public function has this path (also: it is internal, or of another kind)
    │   ├── LimitExceeded         the run passed a bound of `limits.py`; the same request will fail again
    │   ├── InvalidCursor         a pagination cursor that this query did not make
    │   ├── AuthenticationFailed  a credential was refused
    │   ├── Forbidden             this caller may not do that
    │   ├── RateLimited           too often: try again after `retry_after_ms`
    │   ├── SessionRequired       this needs a client that stays connected: it cannot be asked over HTTP
    │   ├── RequestIdReused       a (session id, request id) was used for another request before
    │   ├── Overloaded            a bound of the whole engine: try again
    │   │   └── StorageFull       the disk is full: reads go on, writes fail until there is room
    │   └── EngineClosed          the engine is closing: connect again
    ├── AppError                  the app's, raised on purpose: its data reaches the client
    ├── AppFault                  the app's mistakes, as a function meets them; redacted in production
    │   ├── DocumentNotFound      patch, replace or delete of a document that is not there
    │   ├── ConstraintViolation   a write that the tables do not allow: `table`, `field` and `value` say which
    │   │   ├── UniqueViolation       it would put a second document at one key of a `unique(...)`
    │   │   ├── ForeignKeyViolation   it would leave a document that names one that is not there
    │   │   ├── TotalOverflow         it would take a sum of an `aggregate(...)` beyond 64 bits
    │   │   └── InvalidDocument       a document does not fit its table: a type, or bounds of `msgspec.Meta`
    │   ├── NotUnique             `.unique()` met a second document
    │   ├── InvalidResult         a function returned what its annotation or the protocol does not allow
    │   ├── FunctionMisuse        a function did what its kind may not: I/O in a query, a write from a query
    │   └── FunctionFailed        any other exception in a function; the cause is the app's own exception
    ├── DeveloperError            found at start or reload: nothing was changed
    │   ├── SchemaError           `schema.py` is wrong, or existing rows do not fit it
    │   ├── RegistryError         a module of `functions/` is wrong
    │   └── ConfigError           `engine.toml`, a setting or a command-line option is wrong
    └── InternalError             ours: a bug, or storage that cannot be trusted; the process stops
        └── StorageFailed         the disk refused a read or a write, or gave what was not written: start again
            └── CommitUnknown     COMMIT failed in a way that says nothing about the disk; nothing was answered

`code` is stable: clients and tests match on it, never on the text. A message has the thing, its value, the bound
and what to do.
"""

from typing import Any, ClassVar

_PATH_LENGTH_SHOWN_MAX = 256  # of a path that a stranger asks for


class EngineError(Exception):
    """The root of every error of the engine."""

    code: ClassVar[str] = "EngineError"


class RequestError(EngineError):
    """The asker's error: the request is wrong or cannot be served now."""

    code = "RequestError"


class InvalidArgument(RequestError):
    code = "InvalidArgument"


class FunctionNotFound(RequestError):
    """Unknown, internal and wrong-kind functions give one error, so that names cannot be probed."""

    code = "FunctionNotFound"

    def __init__(self, path: str, kind: str) -> None:
        shown = path if len(path) <= _PATH_LENGTH_SHOWN_MAX else f"{path[:_PATH_LENGTH_SHOWN_MAX]}…"
        super().__init__(
            f"Could not find public {kind} function for '{shown}'. `engine functions` lists what there is."
        )


class LimitExceeded(RequestError):
    """A run passed one of `limits.py`; the same request will fail again."""

    code = "LimitExceeded"

    def __init__(self, what: str, *, used: int | float, allowed: int | float, remedy: str) -> None:
        super().__init__(f"{what}: {used:,} used, {allowed:,} allowed. {remedy}")


class InvalidCursor(RequestError):
    """A cursor or journal of another query, or a damaged one; client hooks start again from the first page."""

    code = "InvalidCursor"

    def __init__(self, reason: str) -> None:
        super().__init__(f"InvalidCursor: {reason}. Start again from the first page (cursor: null).")


class AuthenticationFailed(RequestError):
    code = "AuthenticationFailed"


class Forbidden(RequestError):
    code = "Forbidden"


class RateLimited(RequestError):
    """Somebody does something too often; official clients find `retry_after_ms` in the data of the error."""

    code = "RateLimited"

    def __init__(self, name: str, *, count: int, per_ms: int, retry_after_ms: int) -> None:
        super().__init__(f"{name}: {count:,} in {per_ms:,} ms allowed. Try again in {retry_after_ms:,} ms.")
        self.name, self.retry_after_ms = name, retry_after_ms


class SessionRequired(RequestError):
    """What was asked is about the caller's connection, and it has none that stays."""

    code = "SessionRequired"


class RequestIdReused(RequestError):
    code = "RequestIdReused"


class Overloaded(RequestError):
    """The engine as a whole has no room for this now; trying again is right."""

    code = "Overloaded"


class StorageFull(Overloaded):
    code = "StorageFull"


class EngineClosed(RequestError):
    code = "EngineClosed"


class AppError(EngineError):
    """Raise it in a function to tell the client something: `raise AppError({"code": "EMPTY_MESSAGE"})`.

    `data` is any value that the wire knows (`values.py`). Official clients get it as `ConvexError.data`, also in
    production.
    """

    code = "AppError"
    data: Any = None  # also of a subclass that does not call `super().__init__`

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.data = data


class AppFault(EngineError):
    """A mistake in the app's code or in how it uses its tables; the client sees it only in development."""

    code = "AppFault"


class DocumentNotFound(AppFault):
    code = "DocumentNotFound"

    def __init__(self, table: str, document_id: str, operation: str) -> None:
        super().__init__(
            f"{operation} {table}: there is no document {document_id!r}. `get` gives None for a missing one."
        )


class ConstraintViolation(AppFault):
    """A write that the tables do not allow; a function that catches it can tell its client in its own words."""

    code = "ConstraintViolation"

    def __init__(self, message: str, *, table: str | None = None, field: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.table = table  # None: it names no table
        self.field = field  # None: it is no matter of one field
        self.value = value  # of that field


class UniqueViolation(ConstraintViolation):
    code = "UniqueViolation"

    def __init__(self, table: str, index: str, values: dict[str, Any]) -> None:
        """`values`: by field, in the order of the index; of several fields, `field` and `value` are the last one's."""
        field, value = list(values.items())[-1]
        super().__init__(
            f"{table}.{index}: a document with {values!r} is there already. Patch that one, or use other values.",
            table=table,
            field=field,
            value=value,
        )
        self.index, self.values = index, values


class ForeignKeyViolation(ConstraintViolation):
    """`table`, `field` and `value` are of the document that names another one, also when it is that one's delete."""

    code = "ForeignKeyViolation"


class TotalOverflow(ConstraintViolation):
    """`field` is the summed one."""

    code = "TotalOverflow"

    def __init__(self, table: str, aggregate: str, field: str) -> None:
        super().__init__(
            f"{table}.{aggregate}: the sum of {field!r} would not fit 64 bits. Store a coarser unit in that field, or "
            "leave it out of sum=(…).",
            table=table,
            field=field,
        )
        self.aggregate = aggregate


class InvalidDocument(ConstraintViolation):
    code = "InvalidDocument"


class NotUnique(AppFault):
    code = "NotUnique"


class InvalidResult(AppFault):
    code = "InvalidResult"


class FunctionMisuse(AppFault):
    code = "FunctionMisuse"


class FunctionFailed(AppFault):
    """A function raised an exception of its own; `__cause__` is that exception."""

    code = "FunctionFailed"


class DeveloperError(EngineError):
    """The app directory is wrong; found before anything was changed."""

    code = "DeveloperError"


class SchemaError(DeveloperError):
    code = "SchemaError"


class RegistryError(DeveloperError):
    code = "RegistryError"


class ConfigError(DeveloperError):
    code = "ConfigError"


class InternalError(EngineError):
    """A bug of the engine, or storage that cannot be trusted any more."""

    code = "InternalError"


class StorageFailed(InternalError):
    """The disk refused a read or a write, or gave back what was not written: only a restart can tell what is on it."""

    code = "StorageFailed"


class CommitUnknown(StorageFailed):
    """COMMIT failed and may or may not be on disk: only a restart can tell (the ledger decides)."""

    code = "CommitUnknown"
