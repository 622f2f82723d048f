"""For tests of apps and of the engine: the real engine on a database that goes away, and time that is turned by hand.

    async with open_test_engine(app=".") as engine:
        alice = engine.as_user("alice", role="admin")
        messages = alice.subscribe("chat:get_messages", game_id=game)
        await alice.mutation("chat:send_message", game_id=game, message="hello")
        assert [message.message for message in await messages.settled()] == ["hello"]
        await engine.advance(minutes=2)

With pytest the fixtures `engine`, `clock` and `as_user` are these (`pytest_plugin.py`).
"""

from engine.testing.clients import Client, Subscription
from engine.testing.clock import ManualClock
from engine.testing.harness import TestEngine, open_test_engine

__all__ = ["Client", "ManualClock", "Subscription", "TestEngine", "open_test_engine"]
