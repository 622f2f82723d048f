"""In development, queries are sometimes run twice on the same data: what differs depends on something else.

A result that depends on the hour, on chance or on what a module keeps is wrong for those who share it, and stays wrong:
nothing that is written runs the query again.
"""

from collections import Counter
from contextlib import suppress

from engine.events import ResultsDiffered
from engine.functions.outcomes import Call, QueryRun
from engine.functions.registry import Registry
from engine.functions.run import Known, RanLong, knows_nothing
from engine.functions.runner import Runner
from engine.identity import Caller
from engine.transaction.reading import ReadTransaction

_RUNS_PER_REPEAT = 16


class RepeatingRunner(Runner):
    """Repeats the first run of each query since its code was loaded, and every sixteenth after it."""

    _counted: Registry | None = None  # whose runs are counted
    _run_counts: Counter[str]  # by path

    def run_query(
        self,
        call: Call,
        caller: Caller,
        transaction: ReadTransaction,
        now: float,
        journal: str | None,
        known: Known = knows_nothing,
    ) -> QueryRun:
        run = super().run_query(call, caller, transaction, now, journal, known)
        if run.outcome.failure is None and self._is_to_repeat(call.function.path):
            with suppress(RanLong):
                again = super().run_query(call, caller, transaction.another(self.limits), now, journal, known)
                if again.outcome.token != run.outcome.token:
                    self.events.emit(ResultsDiffered(call.function.path))
        return run

    def _is_to_repeat(self, path: str) -> bool:
        if self._counted is not self.registry:
            self._counted, self._run_counts = self.registry, Counter()
        count = self._run_counts[path]
        self._run_counts[path] += 1
        return count % _RUNS_PER_REPEAT == 0
