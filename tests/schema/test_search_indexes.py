"""What a search index may be declared over."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from engine.errors import SchemaError
from engine.ids import Id
from engine.limits import Limits
from engine.schema import DeletedAt, SearchIndex, Table, compile_schema, search_index

ROOT = Path(__file__).parents[2]


def declare(**body: Any) -> type[Table]:
    """A table with a text and other fields, and these."""
    annotations = {name: body.pop(name) for name in list(body) if not hasattr(body[name], "__set_name__")}
    cls: type[Table] = type(Table)("Thing", (Table,), {"__annotations__": {"body": str, **annotations}, **body})
    return cls


def test_a_search_index_knows_its_documents() -> None:
    class Note(Table):
        body: str
        kind: str
        search = search_index("body", filter=["kind"])

    class Special(Note):
        other: str | None = None
        by_other = search_index("other")

    assert Note.search == SearchIndex(Note, "search", "body", ("kind",))
    assert Special.search.document_type is Special
    table = compile_schema([Note, Special], Limits()).table_of(Special)
    assert {name: (i.field, i.filters) for name, i in table.search_indexes_by_name.items()} == {
        "search": ("body", ("kind",)),
        "by_other": ("other", ()),
    }


@pytest.mark.parametrize("annotation", [str, str | None, Annotated[str, msgspec.Meta(max_length=9)], Literal["a", "b"]])
def test_a_text_field_of_any_kind_can_be_searched(annotation: Any) -> None:
    compile_schema([declare(text=annotation, search=search_index("text"))], Limits())


def test_a_document_without_text_or_deleted_has_none() -> None:
    class Note(Table):
        body: str | None
        deleted_at: DeletedAt = None
        search = search_index("body")

    text_of = compile_schema([Note], Limits()).table_of(Note).search_indexes_by_name["search"].text_of
    assert [text_of(n) for n in (Note(body="a"), Note(body=None), Note(body="a", deleted_at=1.0))] == ["a", None, None]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"search": search_index("text")}, r"thing\.search: there is no field 'text'\. The fields are body\."),
        ({"search": search_index("body", filter=["x"])}, r"thing\.search: there is no field 'x'"),
        ({"search": search_index("body", filter=["id"])}, r"thing\.search: there is no field 'id'"),
        ({"search": search_index("body", filter=["body"])}, r"thing\.search: a field is named twice"),
        ({"n": int, "search": search_index("n")}, r"thing\.search: 'n' cannot be searched: it is int\."),
        ({"n": list[str], "search": search_index("n")}, r"thing\.search: 'n' cannot be searched: it is list\[str\]"),
        ({"n": Id["Thing"], "search": search_index("n")}, r"thing\.search: 'n' cannot be searched: it is Id\[Thing\]"),
        ({"n": str | int, "search": search_index("n")}, r"thing\.search: 'n' cannot be searched"),
        (
            {"n": list[str], "search": search_index("body", filter=["n"])},
            r"thing\.search: 'n' cannot be a filter: it is list\[str\]\. Filter by bool, numbers, text, ids and bytes",
        ),
        (
            {**{f"n{i}": int for i in range(9)}, "search": search_index("body", filter=[f"n{i}" for i in range(9)])},
            r"thing\.search: 9 filter fields, 8 allowed",
        ),
        ({f"s{i}": search_index("body") for i in range(5)}, r"thing: 5 search indexes, 4 allowed"),
        (
            {"Search": search_index("body"), "search": search_index("body")},
            r"thing\.search: no name for a search index",
        ),
        ({"_search": search_index("body")}, r"thing\._search: no name for a search index"),
    ],
)
def test_a_wrong_declaration_is_refused_with_its_place(body: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        compile_schema([declare(**body)], Limits())


def test_mistakes_of_writing_are_refused() -> None:
    with pytest.raises(
        SchemaError, match=r"filter='game_id' is a text\. Give the names of fields: filter=\('game_id',\)"
    ):
        search_index("body", filter="game_id")

    class Note(Table):
        body: str
        search: Any = search_index("body")

    with pytest.raises(SchemaError, match=r"note\.search: write a search index without an annotation"):
        compile_schema([Note], Limits())


@pytest.mark.slow
def test_a_type_checker_knows_the_document_of_a_search(tmp_path: Path) -> None:
    module = tmp_path / "app.py"
    module.write_text(
        "from engine import QueryCtx, Table, search_index\n"
        "class User(Table, name='users'):\n"
        "    name: str\n"
        "    search = search_index('name')\n"
        "async def find(ctx: QueryCtx) -> None:\n"
        "    reveal_type(await ctx.db.search(User.search, 'a').filter(lambda user: user.name > '').take(1))\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path), str(module)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    notes = [line.partition("app.py:")[2] for line in done.stdout.splitlines() if "app.py" in line]
    assert notes == ['6: note: Revealed type is "list[app.User]"']
