import pytest

from engine.errors import LimitExceeded
from engine.ranges import IndexRange, after, before, key_prefix
from engine.transaction.read_set import CellEntry, ReadSet, SearchRead
from engine.values.words import terms_of


def range_of(text: str) -> IndexRange:
    prefix = key_prefix([text])
    return IndexRange("things", "by_name", before(prefix), after(prefix))


def test_a_document_is_there_once_however_often_it_is_read() -> None:
    read_set = ReadSet(1)
    for _ in range(3):
        read_set.add_document("things", "a")
    read_set.add_document("others", "a")
    assert read_set.documents == {("things", "a"), ("others", "a")}


def test_a_scan_cuts_its_own_range_to_what_it_consumed() -> None:
    read_set = ReadSet(10)
    first, second = read_set.add_range(range_of("a")), read_set.add_range(range_of("b"))
    read_set.replace_range(first, range_of("c"))
    assert read_set.ranges == [range_of("c"), range_of("b")]
    read_set.replace_range(second, range_of("d"))
    assert read_set.ranges == [range_of("c"), range_of("d")]


def test_ranges_of_which_only_keys_were_read_are_told_apart() -> None:
    read_set = ReadSet(10)
    read_set.add_key_range(range_of("a"))
    assert (read_set.ranges, read_set.key_ranges) == ([], [range_of("a")])


def test_ranges_of_both_kinds_are_bounded_together_and_documents_are_not() -> None:
    read_set = ReadSet(2)
    read_set.add_range(range_of("a"))
    read_set.add_key_range(range_of("b"))
    for add in (read_set.add_range, read_set.add_key_range):
        with pytest.raises(LimitExceeded, match=r"index ranges read: 3 used, 2 allowed\. Read one wider range"):
            add(range_of("c"))
    read_set.add_document("things", "a")
    assert (read_set.ranges, read_set.key_ranges) == ([range_of("a")], [range_of("b")])


def test_read_sets_are_equal_when_the_same_writes_touch_them() -> None:
    one, other = ReadSet(10), ReadSet(20)
    for read_set in (one, other):
        read_set.add_range(range_of("a"))
        read_set.add_document("things", "a")
    assert one.equals(other)
    other.add_key_range(range_of("b"))
    assert not one.equals(other)
    one.add_range(range_of("b"))
    assert not one.equals(other)


def test_searches_are_bounded_with_ranges_and_compared_like_them() -> None:
    def search_for(text: str) -> SearchRead:
        return SearchRead("things", "search", (("kind", "a"),), terms_of(text))

    def searched(*texts: str) -> ReadSet:
        read_set = ReadSet(2)
        for text in texts:
            read_set.add_search(search_for(text))
        return read_set

    assert searched("goal oka").equals(searched("GOAL, oka"))
    assert not searched("goal").equals(searched("goal", "oka"))
    read_set = searched("goal")
    nested = read_set.fresh()
    nested.add_search(search_for("oka"))
    read_set.merge(nested)
    assert read_set.equals(searched("goal", "oka"))
    with pytest.raises(LimitExceeded, match="3 used, 2 allowed"):
        read_set.add_range(range_of("a"))


def test_each_number_of_a_cell_is_a_dependency_of_its_own() -> None:
    count, total = (CellEntry("things", "by_kind", key_prefix(["a"]), field) for field in (None, "seconds"))
    one, other = ReadSet(1), ReadSet(1)
    one.add_cell(count)
    other.add_cell(total)
    assert not one.equals(other)
    one.merge(other)
    assert one.cells == {count, total}


def test_what_a_nested_query_reads_is_bounded_with_what_its_caller_read_and_is_all_there_afterwards() -> None:
    caller = ReadSet(3)
    caller.add_range(range_of("a"))
    nested = caller.fresh()
    nested.add_range(range_of("b"))
    nested.add_key_range(range_of("c"))
    with pytest.raises(LimitExceeded, match="index ranges read: 4 used, 3 allowed"):
        nested.add_range(range_of("d"))
    caller.merge(nested)
    assert (caller.ranges, caller.key_ranges) == ([range_of("a"), range_of("b")], [range_of("c")])
    with pytest.raises(LimitExceeded, match="index ranges read: 4 used, 3 allowed"):
        caller.add_range(range_of("d"))
