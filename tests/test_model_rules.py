"""The model test with rules: foreign keys, deleted documents that stay, triggers, totals and ranks.

What a cascade or a trigger writes is seen by whom it concerns, and by nobody else; what is refused has done nothing.
"""

from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import settings

from engine.functions.triggers import Triggers
from engine.transaction import totals
from engine.transaction.read_set import ReadSet
from engine.transaction.reading import ReadTransaction
from engine.transaction.rules import Deletion
from engine.transaction.transaction import WriteTransaction
from engine.transaction.write_set import WriteSet
from tests.model.machine import BreakEngine, SubscribersAreNeverStale, check_machine, check_that_it_finds
from tests.model.schemas import RULED


class UnderRules(SubscribersAreNeverStale):
    schema = RULED


@pytest.mark.slow
def test_subscribers_see_what_cascades_and_triggers_write() -> None:
    check_machine(UnderRules, settings.default.max_examples // 2)


# -- negative controls


def _keep_what_cascades_from_the_write_set(patch: pytest.MonkeyPatch) -> None:
    def of_one_deletion(self: WriteTransaction) -> WriteSet:
        write_set, deleted_count = WriteSet(), 0
        for write in self._writes:
            deleted_count += write.new is None
            if write.new is not None or deleted_count == 1:
                write_set.add(write)
        return write_set

    patch.setattr(WriteTransaction, "write_set", property(of_one_deletion))


def _restrict_nothing(patch: pytest.MonkeyPatch) -> None:
    children = Deletion._children
    patch.setattr(
        Deletion,
        "_children",
        lambda self, document_id, on_delete: () if on_delete == "restrict" else children(self, document_id, on_delete),
    )


def _let_nobody_go(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Deletion, "_let_go", lambda self: None)


def _show_what_is_deleted(patch: pytest.MonkeyPatch) -> None:
    read = ReadTransaction._read
    patch.setattr(
        ReadTransaction,
        "_read",
        lambda self, codec, document_id, *, with_deleted: read(self, codec, document_id, with_deleted=True),
    )


def _skip_the_triggers_of_deletes(patch: pytest.MonkeyPatch) -> None:
    fire = Triggers.fire
    patch.setattr(
        Triggers,
        "fire",
        lambda self, transaction, table, change: (
            None if change.operation == "delete" else fire(self, transaction, table, change)
        ),
    )


def _keep_what_a_trigger_refuses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WriteTransaction, "_as_one", lambda self, table: nullcontext())


def _forget_cells(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadSet, "add_cell", lambda self, entry: None)


def _depend_on_whole_cells(patch: pytest.MonkeyPatch) -> None:
    """A count on the sums, too."""
    entries = totals.CellChange.entries

    def all_entries(self: totals.CellChange, aggregate: Any) -> Any:
        return [None, *aggregate.sums] if list(entries(self, aggregate)) else []

    patch.setattr(totals.CellChange, "entries", all_entries)


def _leave_totals_as_they_are_when_a_document_goes(patch: pytest.MonkeyPatch) -> None:
    update = totals.update
    patch.setattr(
        totals, "update", lambda writer, table, old, new: None if new is None else update(writer, table, old, new)
    )


def _forget_the_keys_before_a_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadSet, "add_key_range", lambda self, index_range: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_engine",
    [
        _keep_what_cascades_from_the_write_set,
        _restrict_nothing,
        _let_nobody_go,
        _show_what_is_deleted,
        _skip_the_triggers_of_deletes,
        _keep_what_a_trigger_refuses,
        _forget_cells,
        _depend_on_whole_cells,
        _leave_totals_as_they_are_when_a_document_goes,
        _forget_the_keys_before_a_rank,
    ],
)
def test_the_machine_finds_rules_that_are_broken(break_engine: BreakEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_it_finds(UnderRules, break_engine, monkeypatch)
