"""`UpdatedAt` and `DeletedAt`: how they are declared, and the indexes of a table where deleted documents stay."""

from typing import Annotated, Any

import msgspec
import pytest

from engine.errors import SchemaError
from engine.ids import creation_time_of, make_id
from engine.limits import Limits
from engine.ranges import BY_CREATION_TIME, full_key
from engine.schema import DeletedAt, Table, UpdatedAt, compile_schema, index


class Note(Table, name="notes"):
    text: str
    changed: UpdatedAt = 0.0
    gone: DeletedAt = None
    by_text = index("text")


class Plain(Table, name="plains"):
    text: str
    by_text = index("text")


SCHEMA = compile_schema([Note, Plain], Limits())
NOTES, PLAINS = SCHEMA.table_of(Note), SCHEMA.table_of(Plain)


def test_a_table_knows_the_fields_that_the_engine_keeps() -> None:
    assert (NOTES.updated_field, NOTES.deleted_field) == ("changed", "gone")
    assert (PLAINS.updated_field, PLAINS.deleted_field) == (None, None)
    assert [NOTES.is_deleted(Note(text="a", gone=gone)) for gone in (None, 0.0, 5.0)] == [False, True, True]
    assert not PLAINS.is_deleted(Plain(text="a"))


def test_a_deleted_document_lies_only_in_the_ranges_that_hold_deleted_ones() -> None:
    document_id = make_id(NOTES.id_tag, 7, b"123456789")
    there = Note(id=document_id, creation_time=creation_time_of(7), text="a")
    deleted = msgspec.structs.replace(there, gone=5.0)
    key = full_key(["a"], 7)
    keys = {name: (key_of(there), key_of(deleted)) for name, key_of in NOTES.key_places}
    assert keys == {
        BY_CREATION_TIME: (full_key([], 7), None),
        "by_text": (key, None),
        f"{BY_CREATION_TIME}+deleted": (full_key([], 7), full_key([], 7)),
        "by_text+deleted": (key, key),
    }
    assert [name for name, _ in PLAINS.key_places] == [BY_CREATION_TIME, "by_text"]


@pytest.mark.parametrize(
    ("annotation", "default", "told"),
    [
        (UpdatedAt, 1.0, "things.at: the engine sets this field. Declare it with the default 0.0."),
        (DeletedAt, 0.0, "things.at: the engine sets this field. Declare it with the default None."),
        (UpdatedAt, msgspec.NODEFAULT, "things.at: the engine sets this field. Declare it with the default 0.0."),
        (UpdatedAt | None, None, "things.at: UpdatedAt and DeletedAt stand alone, not in a union or a list."),
        (list[DeletedAt], [], "things.at: UpdatedAt and DeletedAt stand alone, not in a union or a list."),
    ],
)
def test_a_field_that_the_engine_keeps_is_declared_in_one_way(annotation: Any, default: Any, told: str) -> None:
    body: dict[str, Any] = {"__annotations__": {"at": annotation}}
    if default is not msgspec.NODEFAULT:
        body["at"] = default
    with pytest.raises(SchemaError) as refused:
        compile_schema([type(Table)("Thing", (Table,), body, name="things")], Limits())
    assert str(refused.value) == told


@pytest.mark.parametrize(("annotation", "default"), [(UpdatedAt, 0.0), (DeletedAt, None)])
def test_a_table_has_one_field_of_each_kind(annotation: Any, default: Any) -> None:
    body = {"__annotations__": {"a": annotation, "b": annotation}, "a": default, "b": default}
    with pytest.raises(SchemaError, match=r"things: 'a' and 'b' are both (Updated|Deleted)At. Keep one of them."):
        compile_schema([type(Table)("Thing", (Table,), body, name="things")], Limits())


def test_other_marks_may_stand_beside_it() -> None:
    class Marked(Table):
        at: Annotated[UpdatedAt, "as the reports want it"] = 0.0

    assert compile_schema([Marked], Limits()).table_of(Marked).updated_field == "at"
