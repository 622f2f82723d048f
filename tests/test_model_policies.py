"""The model test with policies: nobody is ever shown a row that the policies hide, not for one push.

Subscribers hold what a fresh run by the same identity returns, while roles change, and end at their time; people sign
in and out, lag, and page; the query that policies judge by refuses some, and may run long; the code is loaded again
with other policies.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from engine.functions.calls import Apart
from engine.functions.outcomes import NestedQuery
from engine.functions.policies import Guard
from engine.live.publisher import Publisher
from engine.live.sharing import Sharing
from engine.live.view import View
from tests.model.machine import BreakEngine, SubscribersAreNeverStale, check_machine, check_that_it_finds
from tests.model.schemas import OTHER_POLICIES, POLICED, PolicySpec
from tests.model.world import World


class UnderPolicies(SubscribersAreNeverStale):
    schema = POLICED
    other_policies: Mapping[str, PolicySpec] | None = OTHER_POLICIES
    time_steps = (0, 0, 1, 1_000, 10_000, None)


class WithALongRole(UnderPolicies):
    """What policies judge by is known after a round."""

    @initialize(data=st.data(), has_small_cache=st.booleans())
    def open(self, data: st.DataObject, has_small_cache: bool) -> None:
        self.begin(data, World(self.schema._replace(has_slow_role=True), has_small_cache=has_small_cache))


@pytest.mark.slow
def test_nobody_is_shown_a_row_that_the_policies_hide() -> None:
    check_machine(UnderPolicies, settings.default.max_examples // 2)


@pytest.mark.slow
def test_nobody_is_shown_one_while_it_is_not_known_who_may_see_it() -> None:
    check_machine(WithALongRole, settings.default.max_examples // 4)


# -- negative controls


def _let_one_hidden_row_in_eight_through(patch: pytest.MonkeyPatch) -> None:
    may_read = Guard.may_read
    patch.setattr(Guard, "may_read", lambda self, row: may_read(self, row) or row.id[-1] in "0123")


def _let_counts_see_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "reads_alike", lambda self, table, values: True)


def _let_everybody_update(patch: pytest.MonkeyPatch) -> None:
    check = Guard.check
    patch.setattr(
        Guard, "check", lambda self, operation, *rows: None if operation == "update" else check(self, operation, *rows)
    )


def _ask_a_mutation_for_its_viewer_once(patch: pytest.MonkeyPatch) -> None:
    viewer = Guard.viewer

    def once(self: Guard, call: Any) -> Any:
        known = self._viewers.get(call.function.path)
        return viewer(self, call) if known is None else known[0]

    patch.setattr(Guard, "viewer", once)


def _share_whatever_nested_queries_returned(patch: pytest.MonkeyPatch) -> None:
    end = Apart.end

    def forgetting(self: Apart, query: NestedQuery, outcome: Any) -> None:
        end(self, query, outcome)
        del self._outer[1][query]

    patch.setattr(Apart, "end", forgetting)


def _share_by_what_nested_queries_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Apart, "asks_who_asks", False)


def _take_restricted_for_unrestricted(patch: pytest.MonkeyPatch) -> None:
    init = NestedQuery.__init__

    def forgetting(self: NestedQuery, call: Any, *, is_restricted: bool) -> None:
        init(self, call, is_restricted=True)

    patch.setattr(NestedQuery, "__init__", forgetting)


def _tell_no_dependents(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "_tell_dependents", lambda *_: None)


def _depend_on_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sharing, "depend", lambda self, view, query_id, live_query: None)


def _let_everybody_keep_what_they_hold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "suits", lambda self, live_query, identity: True)
    patch.setattr(View, "set_identity", lambda self, identity: setattr(self, "identity", identity))


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_engine",
    [
        _let_one_hidden_row_in_eight_through,
        _let_counts_see_everything,
        _let_everybody_update,
        _ask_a_mutation_for_its_viewer_once,
        _share_whatever_nested_queries_returned,
        _share_by_what_nested_queries_read,
        _take_restricted_for_unrestricted,
        _tell_no_dependents,
        _depend_on_nothing,
        _let_everybody_keep_what_they_hold,
    ],
)
def test_the_machine_finds_policies_that_are_broken(break_engine: BreakEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_it_finds(UnderPolicies, break_engine, monkeypatch)
