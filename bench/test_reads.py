"""What one read of `ctx.db` costs: seconds for one call on a pinned reader, rows in the page cache.

Fixed: 10,000 messages in 10 games. The decoding of rows and the read set are part of it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.tables import Chat, Message
from engine.ranges import IndexRange, after, before, key_prefix
from engine.storage.connections import SnapshotReader
from engine.transaction.reading import ReadTransaction

Benchmark = Callable[..., Any]


@pytest.fixture
def reader(chat: Chat) -> Iterator[SnapshotReader]:
    reader = chat.database.open_reader()
    reader.pin()
    yield reader
    reader.unpin()


def test_a_document_is_read_by_its_id(benchmark: Benchmark, chat: Chat, reader: SnapshotReader) -> None:
    document_id = chat.message_ids[5_000]
    document = benchmark(lambda: ReadTransaction(reader, chat.catalog, chat.limits).get(document_id))
    assert document.id == document_id


def test_the_newest_50_documents_of_a_range_are_read(benchmark: Benchmark, chat: Chat, reader: SnapshotReader) -> None:
    prefix = key_prefix([chat.game_ids[3]])
    index_range = IndexRange("messages", "by_game", before(prefix), after(prefix))
    index = chat.schema.table_of(Message).indexes_by_name["by_game"]

    def read() -> list[Any]:
        transaction = ReadTransaction(reader, chat.catalog, chat.limits)
        return transaction.scan(Message, index, index_range, descending=True, limit=50)

    documents = benchmark(read)
    assert [document.created_at for document in documents] == sorted((d.created_at for d in documents), reverse=True)
    assert len(documents) == 50
