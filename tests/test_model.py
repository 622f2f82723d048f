"""Subscribers are never stale, whatever is asked and whatever is written: the engine against a naive oracle.

Hypothesis makes up the history (`tests/model/machine.py`); `tests/model/world.py` runs it on a real engine and says
what must be true. Each of the negative controls breaks one thing in the engine and shows that the same machine finds
it. What features add to this is in `test_model_policies.py`, `test_model_rules.py` and `test_model_time.py`.
"""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from engine.functions.run import Run
from engine.live import invalidation
from engine.live.invalidation import InvalidationIndex
from engine.live.live_query import LiveQuery
from engine.live.view import View
from engine.ranges import IndexRange, after, before
from engine.transaction.ledger import Ledger
from engine.transaction.read_set import ReadSet
from engine.transaction.transaction import WriteTransaction
from tests.model.choices import made
from tests.model.machine import BreakEngine, SubscribersAreNeverStale, check_machine, check_that_it_finds
from tests.model.schemas import RICH, SchemaSpec, any_schema
from tests.model.world import World

EXAMPLE_COUNT = settings.default.max_examples // 2  # in the pull-request profile: 50


class OnAFewTables(SubscribersAreNeverStale):
    schema = RICH


class OnAnySchema(SubscribersAreNeverStale):
    """With any rules in it: those that have machines of their own, in any combination."""

    @initialize(data=st.data(), schema=made(any_schema))
    def open(self, data: st.DataObject, schema: SchemaSpec) -> None:
        self.begin(data, World(schema))


@pytest.mark.slow
def test_subscribers_hold_what_a_fresh_run_returns_and_nothing_else_runs() -> None:
    check_machine(OnAFewTables, EXAMPLE_COUNT)


@pytest.mark.slow
def test_the_same_holds_on_any_schema() -> None:
    check_machine(OnAnySchema, EXAMPLE_COUNT)


# -- negative controls: the machine finds what is broken on purpose


def _drop_invalidations(patch: pytest.MonkeyPatch) -> None:
    """One in twenty live queries is not told of a write."""
    affected = InvalidationIndex.affected

    def dropping(self: Any, writes: Any) -> Any:
        found = affected(self, writes)
        self.found_count = getattr(self, "found_count", 0) + len(found)
        if self.found_count >= 20:
            self.found_count = 0
            found.pop()
        return found

    patch.setattr(InvalidationIndex, "affected", dropping)


def _ignore_old_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(invalidation, "_keys_of", lambda key_of, write: (None, write.new and key_of(write.new)))


def _leave_ranges_uncut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(IndexRange, "cut_at", lambda self, last_key, *, descending: self)


def _cut_ranges_one_document_early(patch: pytest.MonkeyPatch) -> None:
    def cut(self: IndexRange, last_key: Any, *, descending: bool) -> IndexRange:
        if descending:
            return IndexRange(self.table, self.index, after(last_key[:-1]), max(after(last_key[:-1]), self.end))
        return IndexRange(self.table, self.index, self.start, max(self.start, before(last_key[:-1])))

    patch.setattr(IndexRange, "cut_at", cut)


def _count_documents_for_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadSet, "add_key_range", ReadSet.add_range)


def _forget_document_reads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadSet, "add_document", lambda self, table, document_id: None)


def _forget_identity_reads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_read_part", lambda self, part: None)


def _forget_journals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LiveQuery, "journal", None)


def _wait_for_no_long_query(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(View, "wait_for", lambda self, live_query: None)


def _tell_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(View, "mark", lambda self, query_ids: None)


def _forget_outcomes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "record", lambda *_: None)


def _keep_what_nested_mutations_wrote(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WriteTransaction, "undo_nested", lambda self, saved: self.end_nested(saved))


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_engine",
    [
        _drop_invalidations,
        _ignore_old_keys,
        _leave_ranges_uncut,
        _cut_ranges_one_document_early,
        _count_documents_for_keys,
        _forget_document_reads,
        _forget_identity_reads,
        _forget_journals,
        _wait_for_no_long_query,
        _tell_nobody,
        _forget_outcomes,
        _keep_what_nested_mutations_wrote,
    ],
)
def test_the_machine_finds_an_engine_that_is_broken(break_engine: BreakEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_it_finds(OnAFewTables, break_engine, monkeypatch)
