"""`SearchEntries` against matching every search with every document."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.limits import Limits
from engine.live.invalidation import InvalidationIndex
from engine.live.search_entries import SearchEntries
from engine.schema import DeletedAt, Table, compile_schema, search_index
from engine.transaction.read_set import ReadSet, SearchRead
from engine.transaction.write_set import Write
from engine.values.words import relevance, terms_of, words_of


class Note(Table, name="notes"):
    body: str | None
    kind: str | None = None
    level: float = 0.0
    deleted_at: DeletedAt = None
    search = search_index("body", filter=("kind", "level"))


NOTES = compile_schema([Note], Limits()).table_of(Note)
INDEX = NOTES.search_indexes_by_name["search"]

texts = st.lists(st.sampled_from(["go", "goal", "goals", "oka", "okay", "東京", "京都", "👍"]), max_size=4).map(
    " ".join
)
kinds, levels = st.sampled_from([None, "a", "b"]), st.sampled_from([0.0, 1.0])


@st.composite
def searches(draw: st.DrawFn) -> SearchRead:
    fixed = draw(st.fixed_dictionaries({}, optional={"kind": kinds, "level": levels}))
    filters = tuple((name, fixed[name]) for name in INDEX.filters if name in fixed)
    return SearchRead("notes", "search", filters, terms_of(draw(texts.filter(bool))))


@st.composite
def writes(draw: st.DrawFn) -> Write:
    notes = st.builds(
        Note,
        id=st.just("1"),
        body=st.none() | texts,
        kind=kinds,
        level=levels | st.just(1),
        deleted_at=st.sampled_from([None, None, 1.0]),
    )
    old, new = draw(st.tuples(st.none() | notes, st.none() | notes).filter(any))
    return Write(NOTES, "1", old, new)


def matches(search: SearchRead, document: Any) -> bool:
    return (
        document is not None
        and document.body is not None
        and document.deleted_at is None
        and all(getattr(document, name) == value for name, value in search.filters)
        and relevance(search.terms, words_of(document.body)) is not None
    )


class FindsWhatMatches(RuleBasedStateMachine):
    """Both invariants."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: SearchEntries[str] = SearchEntries()
        self.searches: set[tuple[str, SearchRead]] = set()

    @rule(entry=st.sampled_from("abcd"), search=searches())
    def add(self, entry: str, search: SearchRead) -> None:
        self.entries.add(entry, search)
        self.searches.add((entry, search))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        known = sorted(self.searches, key=repr)
        entry, search = data.draw(
            st.tuples(st.sampled_from("abcd"), searches()) | (st.sampled_from(known) if known else st.nothing())
        )
        self.entries.remove(entry, search)
        self.searches.discard((entry, search))

    @rule(write=writes())
    def write(self, write: Write) -> None:
        found: set[str] = set()
        self.entries.find(INDEX, write, found)
        assert found == {
            entry for entry, search in self.searches if matches(search, write.old) or matches(search, write.new)
        }

    @invariant()
    def nothing_is_left_of_what_was_removed(self) -> None:
        assert bool(self.entries) == bool(self.searches)
        for entry, search in list(self.searches) if len(self.searches) == 1 else []:
            self.entries.remove(entry, search)
            assert not self.entries._trees
            self.entries.add(entry, search)


@pytest.mark.slow
class TestFindsWhatMatches(FindsWhatMatches.TestCase):  # type: ignore[misc]  # made at run time
    settings = settings(stateful_step_count=15)


def listed(**filters: Any) -> ReadSet:
    read_set = ReadSet(10)
    read_set.add_search(SearchRead("notes", "search", tuple(filters.items()), terms_of("goal oka")))
    return read_set


@pytest.mark.slow
@given(writes())
def test_a_live_query_is_found_by_all_that_it_searched_for(write: Write) -> None:
    index: InvalidationIndex[str] = InvalidationIndex()
    read_set = listed(kind="a")
    other = SearchRead("notes", "search", (("level", 1.0),), terms_of("東京"))
    for search in (other, other, SearchRead("others", "search", (), terms_of("g"))):
        read_set.add_search(search)
    index.put("entry", read_set)
    searched = read_set.searches[:2]
    expected = any(matches(search, write.old) or matches(search, write.new) for search in searched)
    assert index.affected([write]) == ({"entry"} if expected else set())
    index.put("entry", listed(kind="a"))
    expected = matches(searched[0], write.old) or matches(searched[0], write.new)
    assert index.affected([write]) == ({"entry"} if expected else set())
    index.remove("entry")
    assert not index.affected([write])
    assert not index._by_search_index


def test_a_write_looks_only_at_the_searches_that_its_own_words_lead_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """By counting the places in the tree that are looked at, of thousands."""
    entries: SearchEntries[str] = SearchEntries()
    for number in range(1_000):
        for kind, text in (("a", f"word{number} oka"), ("a", f"goal {number}"), (f"kind{number}", "goal oka")):
            search = SearchRead("notes", "search", (("kind", kind),), terms_of(text))
            entries.add(f"{kind}: {text}", search)
    node_type = type(entries._trees["kind",]["a",])
    visits, find = 0, node_type.find

    def counted(*arguments: Any) -> None:
        nonlocal visits
        visits += 1
        find(*arguments)

    monkeypatch.setattr(node_type, "find", counted)
    found: set[str] = set()
    entries.find(INDEX, Write(NOTES, "1", None, Note(id="1", body="What a goal, 77 okay!", kind="a")), found)
    assert found == {"a: goal 77", "a: goal 7"}
    assert visits == 2  # where no word is asked yet, and after "goal"
