from hypothesis import given
from hypothesis import strategies as st

from engine.limits import Limits
from engine.schema import Table, compile_schema
from engine.transaction.write_set import Write, WriteSet


class Thing(Table, name="things"):
    name: str


class Other(Table, name="others"):
    name: str


TABLES = compile_schema([Thing, Other], Limits()).tables_by_name
NAMES = ("a", "b", "c")
STATES = st.none() | st.sampled_from("xyz").map(lambda name: Thing(name=name))


def write(document_id: str, old: Thing | None, new: Thing | None) -> Write:
    return Write(TABLES["things"], document_id, old, new)


def test_a_document_has_its_first_old_state_and_its_last_new_one() -> None:
    x, y, z = Thing(name="x"), Thing(name="y"), Thing(name="z")
    write_set = WriteSet()
    write_set.add(write("a", x, y))
    write_set.add(write("a", y, z))
    assert list(write_set) == [write("a", x, z)]
    write_set.add(write("a", z, None))
    assert list(write_set) == [write("a", x, None)]


def test_a_document_that_one_mutation_made_and_deleted_is_absent() -> None:
    x = Thing(name="x")
    write_set = WriteSet()
    write_set.add(write("a", None, x))
    write_set.add(write("a", x, None))
    assert (len(write_set), list(write_set)) == (0, [])


def test_documents_of_two_tables_are_two_though_they_have_one_id() -> None:
    write_set = WriteSet()
    write_set.add(write("a", None, Thing(name="x")))
    write_set.add(Write(TABLES["others"], "a", None, Other(name="y")))
    assert len(write_set) == 2


@given(st.lists(st.lists(st.tuples(st.sampled_from(NAMES), STATES), max_size=6), max_size=4))
def test_a_group_changes_what_its_mutations_one_after_another_change(
    mutations: list[list[tuple[str, Thing | None]]],
) -> None:
    before: dict[str, Thing | None] = {"a": Thing(name="x"), "b": None, "c": Thing(name="y")}
    now = dict(before)
    group = WriteSet()
    for mutation in mutations:
        written = WriteSet()
        for name, new in mutation:
            if now[name] != new:
                written.add(write(name, now[name], new))
                now[name] = new
        group.merge(written)
    entries = {entry.document_id: entry for entry in group}
    assert len(entries) == len(group)
    for name in NAMES:
        if name in entries:
            assert (entries[name].old, entries[name].new) == (before[name], now[name])
        else:
            assert before[name] == now[name]
