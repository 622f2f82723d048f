"""What was asked lately is resolved once."""

import pytest

from engine.errors import FunctionNotFound
from engine.functions.outcomes import Call
from engine.live import asks
from engine.live.asks import Asks
from tests.small_engine import small_engine


class Resolving:
    """Asks, and what they resolved."""

    def __init__(self) -> None:
        self.resolved: list[tuple[str, bytes]] = []
        self.asks = Asks(self._resolve)

    def _resolve(self, path: str, arguments: bytes) -> Call:
        self.resolved.append((path, arguments))
        if path == "no:such":
            raise FunctionNotFound(path, "query")
        return Call(None, None)  # type: ignore[arg-type]


def test_the_same_ask_is_one_object_and_resolved_once() -> None:
    resolving = Resolving()
    first = resolving.asks.ask("chat:list", b"{}", None)
    call = resolving.asks.call(first)
    again = resolving.asks.ask("chat:list", bytes(bytearray(b"{}")), None)
    assert again is first
    assert resolving.asks.call(again) is call
    assert resolving.asks.ask("chat:list", b"{}", "page") is not first
    assert resolving.resolved == [("chat:list", b"{}")]


def test_refusals_and_large_asks_are_not_kept() -> None:
    resolving = Resolving()
    refused = resolving.asks.ask("no:such", b"{}", None)
    large = resolving.asks.ask("chat:list", b"{" + b" " * 2_000 + b"}", None)
    for _ in range(2):
        with pytest.raises(FunctionNotFound):
            resolving.asks.call(refused)
        resolving.asks.call(large)
    assert len(resolving.resolved) == 4


def test_only_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asks, "_COUNT_MAX", 3)
    resolving = Resolving()
    for number in range(5):
        resolving.asks.call(resolving.asks.ask("chat:list", b"%d" % number, None))
    resolving.asks.call(resolving.asks.ask("chat:list", b"4", None))
    assert len(resolving.resolved) == 5
    resolving.asks.call(resolving.asks.ask("chat:list", b"0", None))
    assert len(resolving.resolved) == 6
    resolving.asks.clear()
    resolving.asks.call(resolving.asks.ask("chat:list", b"0", None))
    assert len(resolving.resolved) == 7


async def test_who_asks_the_same_shares_what_was_decoded() -> None:
    async with small_engine() as app:
        live_queries = []
        for _ in range(2):
            subscriber = app.subscriber()
            subscriber.ask(0, "notes:count", room="a")
            await subscriber.catch_up()
            live_queries.append(subscriber.view.held(0))
        assert live_queries[0] is live_queries[1]
        assert app.run_count("notes:count") == 1
