import pytest

from engine.errors import LimitExceeded
from engine.ranges import IndexRange, after, before, key_prefix
from engine.transaction.read_set import ReadSet


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
