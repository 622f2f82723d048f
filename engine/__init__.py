"""The reactive state engine: tables in SQLite, Python functions, results pushed when they change."""

from engine.clock import Clock, SystemClock
from engine.config import Config, load_config
from engine.engine import Engine
from engine.errors import (
    AppError,
    EngineError,
    Forbidden,
    InvalidArgument,
    LimitExceeded,
    NotUnique,
    UniqueViolation,
)
from engine.functions.context import ActionCtx, MutationCtx, QueryCtx
from engine.functions.pages import Page, PaginationOptions
from engine.functions.registry import action, cron, mutation, query
from engine.identity import Identity
from engine.ids import Id
from engine.limits import Limits
from engine.schema import Table, index, unique
from engine.values import Int64

__all__ = [
    "ActionCtx",
    "AppError",
    "Clock",
    "Config",
    "Engine",
    "EngineError",
    "Forbidden",
    "Id",
    "Identity",
    "Int64",
    "InvalidArgument",
    "LimitExceeded",
    "Limits",
    "MutationCtx",
    "NotUnique",
    "Page",
    "PaginationOptions",
    "QueryCtx",
    "SystemClock",
    "Table",
    "UniqueViolation",
    "action",
    "cron",
    "index",
    "load_config",
    "mutation",
    "query",
    "unique",
]
