"""One filled database for all module benchmarks that read."""

from collections.abc import Iterator

import pytest

from bench.tables import Chat


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    chat = Chat(tmp_path_factory.mktemp("chat"))
    yield chat
    chat.database.close()
