"""The demo app, open: what every test of it needs."""

from collections.abc import AsyncIterator

import pytest

from tests.app.demo_app import DemoApp, open_demo_app


@pytest.fixture
async def app() -> AsyncIterator[DemoApp]:
    """The demo app of this repository with its demo data, on a clock that the test turns."""
    async with open_demo_app() as app:
        yield app
