"""What finding the live queries of a commit costs: seconds for one inserted message that one of them reads.

Varies: how many others are listed, and whether they read other games or other times of the same game.
"""

from collections.abc import Callable
from typing import Any

import pytest

from bench.tables import Chat, Message
from engine.live.invalidation import InvalidationIndex
from engine.ranges import IndexRange, after, before, key_prefix
from engine.transaction.read_set import ReadSet
from engine.transaction.write_set import Write

Benchmark = Callable[..., Any]
READ = "reads the message"


def _read_set(game_id: str, from_ms: float, until_ms: float) -> ReadSet:
    start, end = before(key_prefix([game_id, from_ms])), after(key_prefix([game_id, until_ms]))
    read_set = ReadSet(1)
    read_set.add_range(IndexRange("messages", "by_game", start, end))
    return read_set


@pytest.mark.parametrize("where", ["in_other_games", "at_other_times"])
@pytest.mark.parametrize("unrelated_count", [10, 1_000, 100_000])
def test_finding_affected_queries_does_not_cost_more_with_unrelated_ones(
    benchmark: Benchmark, chat: Chat, unrelated_count: int, where: str
) -> None:
    game_id, invalidation = chat.game_ids[0], InvalidationIndex[str]()
    for number in range(unrelated_count):
        other_game_id, from_ms = (f"game-{number}", 0.0) if where == "in_other_games" else (game_id, 10.0 * number)
        invalidation.put(f"unrelated {number}", _read_set(other_game_id, from_ms, from_ms + 5.0))
    now = 10.0 * unrelated_count + 100.0
    invalidation.put(READ, _read_set(game_id, now - 1.0, now + 1.0))

    message = Message(id=chat.message_ids[0], game_id=game_id, user_id="u", message="", user_name="", created_at=now)
    writes = [Write(chat.schema.table_of(Message), message.id, None, message)]
    assert benchmark(invalidation.affected, writes) == {READ}
