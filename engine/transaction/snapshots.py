"""The snapshots that queries read.

Invariants
  1. `reader` is pinned at the published timestamp whenever a query runs; it moves only in `advance`, between commits.
  2. A snapshot that is lent stays as it is: `advance` leaves that connection behind and goes on with another one.
  3. What is left behind holds back the checkpoint. A run that still reads it after `snapshot_old_seconds_max`, or when
     the WAL passes `wal_pinned_size_bytes_max`, is told so by its next read; what `retain` keeps has its own bounds.
"""

from engine.clock import Clock
from engine.errors import LimitExceeded, Overloaded
from engine.limits import Limits
from engine.storage.connections import Database, SnapshotReader


class Snapshots:
    """The pinned readers of one database."""

    def __init__(self, database: Database, limits: Limits, clock: Clock) -> None:
        self._database, self._limits, self._clock = database, limits, clock
        self.reader = database.open_reader()
        self.ts = self.reader.pin()
        self._lent_count: dict[SnapshotReader, int] = {}
        self._idle: list[SnapshotReader] = []
        self._left_at: dict[SnapshotReader, float] = {}  # when each that is lent was left behind
        self._retained: dict[int, tuple[SnapshotReader, float]] = {}  # by ts; and when it was last asked for
        self._made_at: dict[int, float] = {}  # by ts, of those

    def advance(self) -> int:
        """Show the newest commit from now on; its timestamp. Only between two commits (invariant 1)."""
        if self.reader in self._lent_count:
            self._left_at[self.reader] = self._clock.monotonic()
            self.reader = self._idle.pop() if self._idle else self._database.open_reader()
        else:
            self.reader.unpin()
        self.ts = self.reader.pin()
        self._drop_old()
        if self._left_at:
            self._cut_old()
        return self.ts

    def lend(self, ts: int) -> SnapshotReader | None:
        """The published or a retained snapshot, for work that outlives the next commit; None when it is gone.

        Give it back with `give_back`.
        """
        if ts == self.ts:
            reader = self.reader
        elif ts in self._retained:
            reader, _ = self._retained[ts]
        else:
            return None
        self._lent_count[reader] = self._lent_count.get(reader, 0) + 1
        return reader

    def give_back(self, reader: SnapshotReader) -> None:
        self._lent_count[reader] -= 1
        if self._lent_count[reader] == 0:
            del self._lent_count[reader]
            if reader is not self.reader:
                self._left_at.pop(reader, None)
                if reader.is_cut:
                    self._database.close_reader(reader)
                else:
                    reader.unpin()
                    self._idle.append(reader)

    def retain(self) -> int:
        """Keep the published snapshot readable for `snapshot_retained_seconds`; its timestamp.

        A pinned snapshot makes the WAL grow, so few are kept: when there are as many as fit, the newest one that is
        younger than `snapshot_retained_interval_seconds` serves again. Raises Overloaded when the WAL is at its bound.
        """
        now = self._clock.monotonic()
        self._drop_old()
        ts = self.ts
        if ts not in self._retained:
            self._check_wal()
            interval_seconds = self._limits.snapshot_retained_interval_seconds
            if len(self._retained) >= max(1, self._limits.snapshot_retained_seconds // interval_seconds):
                newest_ts = max(self._retained)
                if now - self._made_at[newest_ts] < interval_seconds:
                    ts = newest_ts
                else:
                    self._release(min(self._retained))
        if ts in self._retained:
            self._retained[ts] = (self._retained[ts][0], now)
            return ts
        reader = self.lend(ts)
        assert reader is not None, "the published snapshot is always there"
        self._retained[ts], self._made_at[ts] = (reader, now), now
        return ts

    def _check_wal(self) -> None:
        size = self._database.writer.wal_size_bytes()
        if size > self._limits.wal_size_bytes_max:
            raise Overloaded(
                f"the write-ahead log has {size:,} bytes, {self._limits.wal_size_bytes_max:,} allowed while snapshots "
                "are kept. Query without a timestamp, try again later, or raise limits.wal_size_bytes_max."
            )

    def _cut_old(self) -> None:
        """Invariant 3."""
        limits, now = self._limits, self._clock.monotonic()
        wal_size_bytes = self._database.writer.wal_size_bytes()
        is_full = wal_size_bytes > limits.wal_pinned_size_bytes_max
        retained = {reader for reader, _ in self._retained.values()}
        for reader, left_at in list(self._left_at.items()):
            if reader in retained or not (is_full or now - left_at > limits.snapshot_old_seconds_max):
                continue
            del self._left_at[reader]
            what, name = "seconds that a run reads a snapshot which is not the newest", "snapshot_old_seconds_max"
            used: float = round(now - left_at, 1)
            if is_full:
                what, name = "bytes of WAL while this run reads an old snapshot", "wal_pinned_size_bytes_max"
                used = wal_size_bytes
            allowed = getattr(limits, name)
            remedy = f"Read less in one run, or raise limits.{name}."
            reader.cut(LimitExceeded(what, used=used, allowed=allowed, remedy=remedy))

    def _drop_old(self) -> None:
        """Let go of snapshots that were not asked for lately; of all when the WAL is at its bound."""
        if not self._retained:
            return
        oldest = self._clock.monotonic() - self._limits.snapshot_retained_seconds
        is_full = self._database.writer.wal_size_bytes() > self._limits.wal_size_bytes_max
        for ts in [ts for ts, (_, asked_at) in self._retained.items() if is_full or asked_at < oldest]:
            self._release(ts)

    def _release(self, ts: int) -> None:
        reader, _ = self._retained.pop(ts)
        del self._made_at[ts]
        if reader in self._left_at:
            self._left_at[reader] = self._clock.monotonic()  # a run that reads it has time from now on
        self.give_back(reader)
