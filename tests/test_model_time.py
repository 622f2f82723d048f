"""The model test with time: after each step of the clock, held results are what a fresh run returns.

The clock comes to moments exactly, stops just before them, and goes far beyond; nothing runs before its moment.
"""

from typing import Any

import pytest
from hypothesis import settings

from engine.functions import calls, runner
from engine.live.moments import Moments
from engine.transaction.moments import MovingBound
from engine.transaction.read_set import ReadSet
from tests.model.machine import BreakEngine, SubscribersAreNeverStale, check_machine, check_that_it_finds
from tests.model.schemas import TIMED


class AsTimePasses(SubscribersAreNeverStale):
    schema = TIMED
    time_steps = (0, 0, 0.25, 1, 999.75, 1_000, 10_000, 3_600_000, None, None, None, None)


@pytest.mark.slow
def test_held_results_follow_time() -> None:
    check_machine(AsTimePasses, settings.default.max_examples // 2)


# -- negative controls


def _wake_late(patch: pytest.MonkeyPatch) -> None:
    moment_for = MovingBound.moment_for

    def late(self: MovingBound, value: Any) -> float | None:
        moment = moment_for(self, value)
        return moment and moment + 0.5

    patch.setattr(MovingBound, "moment_for", late)


def _wake_early_and_often(patch: pytest.MonkeyPatch) -> None:
    put = Moments.put
    patch.setattr(
        Moments, "put", lambda self, live_query, ms: put(self, live_query, ms and min(ms, self.now_ms() + 100))
    )


def _wake_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Moments, "put", lambda self, live_query, moment_ms: None)


def _let_nothing_move(patch: pytest.MonkeyPatch) -> None:
    for module in (runner, calls):
        patch.setattr(module, "depend_on_time", lambda transaction: None)


def _forget_the_moments_of_nested_queries(patch: pytest.MonkeyPatch) -> None:
    merge = ReadSet.merge

    def forgetting(self: ReadSet, other: ReadSet) -> None:
        other.moving.clear()
        merge(self, other)

    patch.setattr(ReadSet, "merge", forgetting)


def _let_no_time_come_by_itself(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Moments, "_fire", lambda self: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_engine",
    [
        _wake_late,
        _wake_early_and_often,
        _wake_nobody,
        _let_nothing_move,
        _forget_the_moments_of_nested_queries,
        _let_no_time_come_by_itself,
    ],
)
def test_the_machine_finds_clocks_that_are_broken(break_engine: BreakEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_it_finds(AsTimePasses, break_engine, monkeypatch)
