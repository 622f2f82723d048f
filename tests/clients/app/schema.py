"""The tables of the app that the official clients are tested with.

A *board* keeps the tests apart: each test writes to boards of its own, so they share one server and one database.
"""

from typing import Any

from engine import Id, Int64, StoredFile, Table, index, unique


class Note(Table, name="notes"):
    """One line of text on a board."""

    board: str
    text: str
    author: str | None = None  # token identifier of the signed-in caller
    by_board = index("board")


class Entry(Table, name="entries"):
    """A number in its place on a board: what the pages are cut from."""

    board: str
    number: float
    by_number = unique("board", "number")


class Picture(Table, name="pictures"):
    """An uploaded file on a board."""

    board: str
    file: Id[StoredFile]
    by_board = index("board")


class Sample(Table, name="samples"):
    """A document with a column for each kind of value that JSON does not have."""

    whole: Int64
    payload: bytes
    ratio: float
    anything: dict[str, Any]
