"""The engine's own tables for work that runs later."""

from typing import Literal

from engine.schema import Table, index, unique


class ScheduledJob(Table, name="_scheduled_jobs", system=True):
    """One run of a mutation or action at a time to come, or how it ended."""

    path: str
    arguments: bytes  # JSON, in wire form
    due_at: float  # ms since the epoch
    state: Literal["pending", "running", "succeeded", "failed", "cancelled"] = "pending"
    error: str | None = None  # of a failed one, as a client would see it in development
    started_at: float | None = None
    finished_at: float | None = None
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


SYSTEM_TABLES: tuple[type[Table], ...] = (ScheduledJob, CronJob)
