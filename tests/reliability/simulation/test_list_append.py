"""The checker of histories finds what it is for, and nothing where there is nothing."""

from collections.abc import Sequence
from random import Random

import pytest

from tests.reliability.simulation.list_append import Append, Read, Status, Transaction, anomalies

A1, A2, A3 = (Append(1, value) for value in (1, 2, 3))
B1, B2 = (Append(2, value) for value in (11, 12))


def transaction(*operations: Append | Read, at: tuple[int, int] = (0, 100), status: Status = "ok") -> Transaction:
    """Under way together with all others, unless it says when."""
    return Transaction(operations, at[0], at[1] if status == "ok" else None, status)


def kinds(*history: Transaction) -> set[str]:
    return {anomaly.kind for anomaly in anomalies(history)}


def a(*values: int) -> Read:
    return Read(1, values)


def b(*values: int) -> Read:
    return Read(2, values)


def test_a_serial_history_is_fine() -> None:
    history = [
        transaction(A1, a(1), at=(0, 1)),
        transaction(a(1), B1, at=(2, 3)),
        transaction(A2, A3, b(11), at=(4, 5)),
        transaction(a(1, 2, 3), b(11), at=(6, 7)),
    ]
    assert kinds(*history) == set()
    assert kinds(*reversed(history)) == set(), "the order in which they are listed says nothing"


def test_what_nobody_knows_of_may_have_happened_or_not() -> None:
    assert kinds(transaction(A1, status="info"), transaction(a(1))) == set()
    assert kinds(transaction(A1, status="info"), transaction(a())) == set()
    assert kinds(transaction(A1, status="fail"), transaction(a())) == set()


def test_two_that_are_under_way_together_may_be_in_any_order() -> None:
    assert kinds(transaction(A1), transaction(a())) == kinds(transaction(A1), transaction(a(1))) == set()


@pytest.mark.parametrize(
    ("history", "found"),
    [
        ([transaction(A1), transaction(A1)], {"appended twice"}),
        ([transaction(A1), transaction(a(1, 1))], {"duplicate"}),
        ([transaction(A1), transaction(a(1, 5))], {"garbage"}),
        ([transaction(A1, status="fail"), transaction(a(1))], {"G1a"}),
        ([transaction(A1, A2), transaction(a(1)), transaction(a(1, 2))], {"G1b", "G2"}),
        ([transaction(A1), transaction(A2, a(1))], {"internal"}),
        ([transaction(A1), transaction(a(), a(1))], {"unrepeatable read", "G2"}),
        ([transaction(A1), transaction(A2), transaction(a(1, 2)), transaction(a(2))], {"incompatible order"}),
        ([transaction(A1, at=(0, 1)), transaction(a(), at=(2, 3))], {"lost"}),
        # each wrote over the other: 1 before 2 in one list, 2 before 1 in the other
        ([transaction(A1, B2), transaction(A2, B1), transaction(a(1, 2), b(11, 12))], {"G0"}),
        # each read what the other wrote
        ([transaction(A1, b(11)), transaction(B1, a(1))], {"G1c"}),
        # a lost update: both read the empty list and appended
        ([transaction(a(), A1), transaction(a(), A2), transaction(a(1, 2))], {"G2"}),
        # write skew: each read the list that the other one then wrote
        ([transaction(a(), b(), A1), transaction(a(), b(), B1), transaction(a(1), b(11))], {"G2"}),
        # a long fork: two see two writes in opposite orders
        ([transaction(A1), transaction(B1), transaction(a(1), b()), transaction(a(), b(11))], {"G2"}),
        # a stale read: acknowledged, seen by one, and then not by another
        (
            [transaction(A1, at=(0, 1)), transaction(a(1), at=(0, 9)), transaction(a(), at=(2, 3))],
            {"realtime"},
        ),
    ],
    ids=lambda value: " and ".join(sorted(value)) if isinstance(value, set) else "history",
)
def test_an_anomaly_is_found_and_named(history: Sequence[Transaction], found: set[str]) -> None:
    assert kinds(*history) == found


def test_a_circle_of_thousands_is_found() -> None:
    """Also where it goes through more transactions than Python's stack is deep."""
    count = 5_000
    history = [transaction(Append(key, key), Read((key + 1) % count, ((key + 1) % count,))) for key in range(count)]
    assert kinds(*history) == {"G1c"}


@pytest.mark.parametrize("seed", range(5))
def test_a_store_that_is_serial_has_no_anomaly_and_one_that_reads_its_past_has(seed: int) -> None:
    random_source = Random(seed)
    for stale_chance in (0, 1 / 500):
        history = _history_of_a_store(random_source, 6_000, stale_chance)
        assert bool(anomalies(history)) == bool(stale_chance)


def _history_of_a_store(random_source: Random, count: int, stale_chance: float) -> list[Transaction]:
    """16 clients of a store that commits at one moment within each transaction; some read what was there before."""
    lists: dict[int, tuple[int, ...]] = {}
    past = [dict(lists)]
    history = []
    for number in range(count):
        if number % 16 == 0:
            past = [*past[-1:], dict(lists)]
        seen = past[0] if random_source.random() < stale_chance else lists
        generation = number // 2_000 * 40  # so that lists stay short
        operations: list[Append | Read] = []
        own: dict[int, tuple[int, ...]] = {}
        for place in range(random_source.randint(1, 4)):
            key = generation + min(random_source.randrange(40), random_source.randrange(40))
            if random_source.random() < 0.5:
                operations.append(Append(key, number * 4 + place))
                own[key] = (*own.get(key, ()), number * 4 + place)
            else:
                operations.append(Read(key, seen.get(key, ()) + own.get(key, ())))
        for key, values in own.items():
            lists[key] = lists.get(key, ()) + values
        history.append(Transaction(operations, number * 10, (number + 16) * 10 + 5, "ok"))
    return history
