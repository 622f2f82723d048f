"""The engine's own tables for work that runs later, and the list of all tables that it has in an app's database."""

from typing import Literal

from engine.functions.disconnects import OnDisconnect
from engine.functions.rate_limits import RateLimitUse
from engine.functions.storage import LooseFile, StoredFile
from engine.functions.webhooks import WebhookDelivery
from engine.schema import Table, index, unique


class ScheduledJob(Table, name="_scheduled_jobs", system=True):
    """One run of a mutation or action at a time to come, or how it ended; functions may read it like any table.

    `await ctx.db.get(job_id)`, `await ctx.db.query(ScheduledJob.by_state_due, state="failed").take(20)`
    """

    path: str
    arguments: bytes  # JSON, in wire form
    due_at: float  # ms since the epoch; later than before when it failed and is tried again
    state: Literal["pending", "running", "succeeded", "failed", "cancelled"] = "pending"
    attempts: int = 0  # how often it was started
    error: str | None = None  # how the newest attempt failed, as a client would see it in development
    started_at: float | None = None  # of an action: its newest attempt
    finished_at: float | None = None  # of the newest attempt, or when it was cancelled
    by_state_due = index("state", "due_at")
    by_state_finished = index("state", "finished_at")


class CronJob(Table, name="_cron_jobs", system=True):
    """When a function with `@cron` runs next. One row a function, so no two runs of it overlap."""

    path: str
    spec: str  # when it changes, the next time is worked out anew
    next_at: float  # ms since the epoch
    state: Literal["waiting", "running"] = "waiting"
    last_error: str | None = None
    by_path = unique("path")
    by_state_next = index("state", "next_at")


SYSTEM_TABLES: tuple[type[Table], ...] = (
    ScheduledJob,
    CronJob,
    OnDisconnect,
    RateLimitUse,
    WebhookDelivery,
    StoredFile,
    LooseFile,
)
