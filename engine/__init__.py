"""The reactive state engine: tables in SQLite, Python functions, results pushed when they change."""

from engine.clock import Clock, SystemClock
from engine.config import Config, load_config
from engine.engine import Engine
from engine.errors import (
    AppError,
    ConstraintViolation,
    DocumentNotFound,
    EngineError,
    Forbidden,
    ForeignKeyViolation,
    InvalidArgument,
    InvalidDocument,
    LimitExceeded,
    NotUnique,
    RateLimited,
    SessionRequired,
    TotalOverflow,
    UniqueViolation,
)
from engine.functions.context import ActionCtx, MutationCtx, QueryCtx
from engine.functions.http import http
from engine.functions.jobs import ScheduledJob
from engine.functions.pages import Page, PaginationOptions
from engine.functions.policies import Policy, policy
from engine.functions.rate_limits import fixed_window, token_bucket
from engine.functions.registry import action, cron, mutation, query
from engine.functions.requests import Request, Response
from engine.functions.settings import Secret, Settings
from engine.functions.storage import FileMetadata, StoredFile
from engine.functions.totals import RankedPage, Total
from engine.functions.triggers import trigger
from engine.functions.webhooks import SignatureScheme, Webhook
from engine.identity import Identity
from engine.ids import Id
from engine.limits import Limits
from engine.schema import DeletedAt, Table, UpdatedAt, aggregate, foreign_key, index, search_index, unique
from engine.transaction.rules import Change
from engine.values import Int64

__all__ = [
    "ActionCtx",
    "AppError",
    "Change",
    "Clock",
    "Config",
    "ConstraintViolation",
    "DeletedAt",
    "DocumentNotFound",
    "Engine",
    "EngineError",
    "FileMetadata",
    "Forbidden",
    "ForeignKeyViolation",
    "Id",
    "Identity",
    "Int64",
    "InvalidArgument",
    "InvalidDocument",
    "LimitExceeded",
    "Limits",
    "MutationCtx",
    "NotUnique",
    "Page",
    "PaginationOptions",
    "Policy",
    "QueryCtx",
    "RankedPage",
    "RateLimited",
    "Request",
    "Response",
    "ScheduledJob",
    "Secret",
    "SessionRequired",
    "Settings",
    "SignatureScheme",
    "StoredFile",
    "SystemClock",
    "Table",
    "Total",
    "TotalOverflow",
    "UniqueViolation",
    "UpdatedAt",
    "Webhook",
    "action",
    "aggregate",
    "cron",
    "fixed_window",
    "foreign_key",
    "http",
    "index",
    "load_config",
    "mutation",
    "policy",
    "query",
    "search_index",
    "token_bucket",
    "trigger",
    "unique",
]
