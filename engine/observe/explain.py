"""What one run of a query did: what it read, what it cost, who shares it, and what would run it again."""

from datetime import UTC, datetime

import msgspec

from engine.functions.outcomes import NestedQuery, QueryRun
from engine.live.causes import reads_of
from engine.transaction.reading import ReadTransaction


class Explanation(msgspec.Struct, frozen=True, rename="camel"):
    """One run, for people; times in ms."""

    path: str
    duration_ms: float
    documents_read: int  # also those that a filter or a policy then dropped
    bytes_read: int
    documents_returned: int | None  # of a list or a page; None: the result is something else
    result_bytes: int
    reads: list[str]  # a write into one of these runs it again
    rerun_at_ms: float | None  # so does this moment
    shared_by: list[str]  # what it read of who asks: callers with the same values share one run; empty: all do
    failure: str | None  # how it failed


def explain_run(path: str, run: QueryRun, transaction: ReadTransaction) -> Explanation:
    """Say what a run did that has just ended."""
    value, failure = run.outcome.value, run.outcome.failure
    return Explanation(
        path=path,
        duration_ms=run.duration_seconds * 1000,
        documents_read=transaction.read_count,
        bytes_read=transaction.read_size_bytes,
        documents_returned=None if value is None else _count_of(msgspec.json.decode(value)),
        result_bytes=len(value or b""),
        reads=reads_of(run.read_set, transaction.catalog),
        rerun_at_ms=run.read_set.rerun_at_ms,
        shared_by=[
            f"what {part.call.function.path} returns" if isinstance(part, NestedQuery) else f"{part} = {value!r}"
            for part, value in run.parts.items()
        ],
        failure=None if failure is None else failure.message,
    )


def text_of(explanation: Explanation) -> str:
    """For people, a fact a line."""
    returned = "" if explanation.documents_returned is None else f", {explanation.documents_returned:,} returned"
    lines = [
        f"{explanation.path}: {explanation.duration_ms:.2f} ms",
        f"  read      {explanation.documents_read:,} documents, {explanation.bytes_read:,} bytes{returned}",
        f"  result    {explanation.result_bytes:,} bytes",
        f"  shared    {'by all' if not explanation.shared_by else 'by callers with the same'}",
        *(f"              {part}" for part in explanation.shared_by),
        "  runs again when a write falls into",
        *(f"              {read}" for read in explanation.reads or ["nothing"]),
    ]
    if explanation.rerun_at_ms is not None:
        lines.append(f"            or at {_time_text(explanation.rerun_at_ms)}")
    if explanation.failure is not None:
        lines.append(f"  failed    {explanation.failure}")
    return "\n".join(lines)


def _time_text(time_ms: float) -> str:
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):  # beyond the year 9999
        return f"{time_ms:g} ms since the epoch"


def _count_of(result: object) -> int | None:
    if isinstance(result, dict) and isinstance(result.get("page"), list):
        return len(result["page"])
    return len(result) if isinstance(result, list) else None
