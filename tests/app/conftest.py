"""The demo app of this repository with its demo data, and those who use it."""

from collections.abc import Callable

import pytest

from engine.testing import Client, ManualClock, TestEngine
from tests.app.demo_app import Demo


@pytest.fixture
async def demo(engine: TestEngine, clock: ManualClock) -> Demo:
    """What the demo data has; a second has passed since, so that nothing else was at the test's own milliseconds."""
    demo = await Demo.seeded(engine)
    clock.advance(1)
    return demo


@pytest.fixture
def guest(as_user: Callable[..., Client]) -> Client:
    """Somebody who is not signed in."""
    return as_user()


@pytest.fixture
def maya(as_user: Callable[..., Client]) -> Client:
    """An admin."""
    return as_user("maya")


@pytest.fixture
def sam(as_user: Callable[..., Client]) -> Client:
    """A moderator of the chat."""
    return as_user("sam")


@pytest.fixture
def tomas(as_user: Callable[..., Client]) -> Client:
    return as_user("tomas")


@pytest.fixture
def aiko(as_user: Callable[..., Client]) -> Client:
    return as_user("aiko")


@pytest.fixture
def zoe(as_user: Callable[..., Client]) -> Client:
    """Somebody who has signed in, and is not in the demo data."""
    return as_user("zoe")
