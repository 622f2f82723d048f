"""The snapshots that queries read.

Invariants
  1. `reader` is pinned at the published timestamp whenever a query runs; it moves only in `advance`, between commits.
  2. A snapshot that is lent stays as it is: `advance` leaves that connection behind and goes on with another one.
"""

from engine.clock import Clock
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
        self._retained: dict[int, tuple[SnapshotReader, float]] = {}  # by ts; and since when

    def advance(self) -> int:
        """Show the newest commit from now on; its timestamp. Only between two commits (invariant 1)."""
        if self.reader in self._lent_count:
            self.reader = self._idle.pop() if self._idle else self._database.open_reader()
        else:
            self.reader.unpin()
        self.ts = self.reader.pin()
        self._drop_old()
        return self.ts

    def lend(self) -> SnapshotReader:
        """The published snapshot, for work that outlives the next commit. Give it back with `give_back`."""
        self._lent_count[self.reader] = self._lent_count.get(self.reader, 0) + 1
        return self.reader

    def give_back(self, reader: SnapshotReader) -> None:
        self._lent_count[reader] -= 1
        if self._lent_count[reader] == 0:
            del self._lent_count[reader]
            if reader is not self.reader:
                reader.unpin()
                self._idle.append(reader)

    def retain(self) -> int:
        """Keep the published snapshot readable for `snapshot_retained_seconds`; its timestamp.

        A pinned snapshot makes the WAL grow, so few are kept: when there are as many as fit, the newest kept one that
        is younger than `snapshot_retained_interval_seconds` serves again.
        """
        if self.ts in self._retained:
            return self.ts
        now = self._clock.monotonic()
        count_max = self._limits.snapshot_retained_seconds // self._limits.snapshot_retained_interval_seconds
        if len(self._retained) >= count_max:
            newest_ts = max(self._retained)
            if now - self._retained[newest_ts][1] < self._limits.snapshot_retained_interval_seconds:
                return newest_ts
            self._release(min(self._retained))
        self._retained[self.ts] = (self.lend(), now)
        return self.ts

    def at(self, ts: int) -> SnapshotReader | None:
        """The reader of the published or a retained snapshot, or None when it is gone."""
        if ts == self.ts:
            return self.reader
        self._drop_old()
        kept = self._retained.get(ts)
        return kept[0] if kept is not None else None

    def _drop_old(self) -> None:
        if self._retained:
            oldest = self._clock.monotonic() - self._limits.snapshot_retained_seconds
            for ts in [ts for ts, (_, since) in self._retained.items() if since < oldest]:
                self._release(ts)

    def _release(self, ts: int) -> None:
        reader, _ = self._retained.pop(ts)
        self.give_back(reader)
