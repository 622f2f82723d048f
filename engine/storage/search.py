"""Search indexes: the words of documents in FTS5, a virtual table for each search index.

A document is one row of it, under its creation tick: its words and one token for each filter field, with a space
between them. Splitting texts into words is ours (`values/words.py`); FTS5 keeps for each token, and for each beginning
of one, which ticks have it. Texts are not stored again, so removing a row takes the tokens that it was stored with.

Invariants
  1. The index holds every document that `text_of` gives a text with words for, under exactly `words_of` that text.
  2. `fetch` gives the matching rows, newest first; it costs what the rarest term has, not what the table holds.
  3. A user's text is never FTS5 syntax: words have no quotes, and stand in quotes.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from engine.ids import tick_of
from engine.ranges import Scalar
from engine.schema import SearchIndexSchema, Table, TableSchema
from engine.storage.connections import Connection, Row, WriterConnection
from engine.storage.rows import TICK, RowCodec, live_sql, quoted
from engine.values.words import WORDS_VERSION, Terms, words_of

# A token of each beginning of a word up to this length: longer ones begin few words, which are looked through.
_PREFIX_LENGTH_MAX = 8
_FILTER_MARK = "\ue000"  # begins the tokens of filter fields; no letter, so no word has it
_TICK_END = 1 << 62  # after every tick
_PAGE_ROW_COUNT = 1_000

# Statements are made of names that the schema has checked: hence `noqa: S608`.


class SearchIndexDescription(msgspec.Struct, frozen=True):
    """What is in an index; an index of another description is made anew."""

    field: str
    filters: list[str]
    deleted_field: str | None
    words_version: str


def describe(table: TableSchema) -> dict[str, SearchIndexDescription]:
    return {
        index.name: SearchIndexDescription(index.field, list(index.filters), table.deleted_field, WORDS_VERSION)
        for index in table.search_indexes_by_name.values()
    }


def migrate(
    writer: WriterConnection,
    table: TableSchema,
    stored: dict[str, SearchIndexDescription],
    restored_columns: set[str],
) -> list[str]:
    """Make the indexes of a table match its schema, when the table itself does; says what was done.

    `restored_columns` hold other values than they did. Ticks never change: the copy of a table keeps its indexes.
    """
    wanted, done = describe(table), []
    for name, description in stored.items():
        is_changed = wanted.get(name) != description or not restored_columns.isdisjoint(
            (description.field, *description.filters)
        )
        if is_changed:
            writer.execute(f"DROP TABLE {search_sql_name(table.name, name)}")
            done.append(f"{table.name}.{name}: search index {'changed' if name in wanted else 'dropped'}")
        if is_changed and name in wanted:
            _create(writer, table, table.search_indexes_by_name[name])
    for index in table.search_indexes_by_name.values():
        if index.name not in stored:
            _create(writer, table, index)
            done.append(f"{table.name}.{index.name}: search index added")
    return done


def _create(writer: WriterConnection, table: TableSchema, index: SearchIndexSchema) -> None:
    """Make the index and fill it from the rows that are there."""
    name = _sql_name(table, index)
    prefixes = " ".join(map(str, range(1, _PREFIX_LENGTH_MAX + 1)))
    # `ascii`: a token is a run of ASCII letters, digits and anything beyond ASCII, as our words are
    writer.execute(
        f"CREATE VIRTUAL TABLE {name} USING fts5("
        f"tokens, content='', columnsize=0, detail=none, prefix='{prefixes}', tokenize='ascii')"
    )
    columns = ", ".join(map(quoted, (TICK, index.field, *index.filters)))
    live = "" if table.deleted_field is None else f" AND {live_sql(table.deleted_field)}"
    sql = f'SELECT {columns} FROM {quoted(table.name)} WHERE "{TICK}" > ?{live} ORDER BY "{TICK}" LIMIT ?'  # noqa: S608
    tick = -1
    while page := writer.fetch_all(sql, (tick, _PAGE_ROW_COUNT)):
        for tick, text, *values in page:
            if tokens := _tokens(text, zip(index.filters, values, strict=True)):
                writer.execute(_insert_sql(name), (tick, tokens))


def update(
    writer: WriterConnection, table: TableSchema, index: SearchIndexSchema, old: Table | None, new: Table | None
) -> None:
    """A document was written (invariant 1)."""
    document = old if old is not None else new
    assert document is not None
    old_content, new_content = _content(index, old), _content(index, new)
    if old_content == new_content:
        return
    name, tick = _sql_name(table, index), tick_of(document.id)
    old_tokens, new_tokens = _tokens(*old_content), _tokens(*new_content)
    if old_tokens:
        sql = f"INSERT INTO {name}({name}, rowid, tokens) VALUES ('delete', ?, ?)"  # noqa: S608
        writer.execute(sql, (tick, old_tokens))
    if new_tokens:
        writer.execute(_insert_sql(name), (tick, new_tokens))


def fetch(
    connection: Connection,
    codec: RowCodec[Any],
    index: SearchIndexSchema,
    filters: Iterable[tuple[str, Scalar]],
    terms: Terms,
    *,
    before_tick: int | None,
    limit: int,
) -> list[Row]:
    """The newest rows that match every term and every filter, of those that are older than `before_tick`."""
    name = _sql_name(codec.table, index)
    asked = [f'"{word}"' for word in terms.words]
    if terms.prefix is not None:
        asked.append(f'"{terms.prefix}"*')
    assert asked, "a search without words matches nothing, and is not asked"
    asked += [f'"{_filter_token(field, value)}"' for field, value in filters]
    # in a subquery: a field may have the name of a column of FTS5
    sql = (
        f'SELECT {codec.columns_sql} FROM {quoted(codec.table.name)} WHERE "{TICK}" IN '  # noqa: S608
        f"(SELECT rowid FROM {name} WHERE {name} MATCH ? AND rowid < ? ORDER BY rowid DESC LIMIT ?) "
        f'ORDER BY "{TICK}" DESC'
    )
    return connection.fetch_all(sql, (" AND ".join(asked), _TICK_END if before_tick is None else before_tick, limit))


def search_sql_name(table: str, index: str) -> str:
    """The name of a search index in SQLite, quoted: with two dots it is nobody else's."""
    return quoted(f"{table}.{index}.words")


def _sql_name(table: TableSchema, index: SearchIndexSchema) -> str:
    return search_sql_name(table.name, index.name)


def _insert_sql(name: str) -> str:
    return f"INSERT INTO {name}(rowid, tokens) VALUES (?, ?)"  # noqa: S608


_Content = tuple[str | None, list[tuple[str, Any]]]


def _content(index: SearchIndexSchema, document: Table | None) -> _Content:
    """What of a document is in the index."""
    text = None if document is None else index.text_of(document)
    return (None, []) if text is None else (text, [(name, getattr(document, name)) for name in index.filters])


def _tokens(text: str | None, filters: Iterable[tuple[str, Any]]) -> str:
    """What FTS5 is given for a document; empty for one that no search can find."""
    words = dict.fromkeys(words_of(text or ""))
    return " ".join([*words, *(_filter_token(field, value) for field, value in filters)]) if words else ""


def _filter_token(field: str, value: Any) -> str:
    """The same for values that are equal, as 1 and 1.0 are."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    content = f"{field}={int(value) if isinstance(value, bool) else value!r}"
    return _FILTER_MARK + hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
