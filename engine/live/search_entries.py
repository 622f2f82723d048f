"""Which searches a written document answers. Pure.

Searches are told apart by the filter fields that they fix, then by the values there (a hash look-up), and then lie in
a tree: each word of a search, in order, is a step down. The words of a document lead to exactly the searches that it
holds all words of; those of other words, or under other values, are never looked at.

Invariants
  1. `find` gives the entries of exactly the searches that the document matches (`values/words.py`, invariant 1).
  2. Nothing is left of what was removed.
"""

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from engine.ranges import Scalar
from engine.schema import SearchIndexSchema
from engine.transaction.read_set import SearchRead
from engine.transaction.write_set import Write
from engine.values.words import Terms, words_of

E = TypeVar("E", bound=Hashable)


class SearchEntries(Generic[E]):
    """Entries (live queries) by what they searched in one search index."""

    def __init__(self) -> None:
        # by the names of the fixed fields, then by their values
        self._trees: dict[tuple[str, ...], dict[tuple[Scalar, ...], _Node[E]]] = {}

    def __bool__(self) -> bool:
        return bool(self._trees)

    def add(self, entry: E, search: SearchRead) -> None:
        names, values = _place_of(search)
        tree = self._trees.setdefault(names, {}).setdefault(values, _Node())
        for word in search.terms.words:
            tree = tree.by_word.setdefault(word, _Node())
        tree.add(entry, search.terms.prefix)

    def remove(self, entry: E, search: SearchRead) -> None:
        """Nothing happens if it is not there: a query that searched twice for the same is there once."""
        names, values = _place_of(search)
        trees = self._trees.get(names, {})
        tree = trees.get(values)
        if tree is None:
            return
        tree.remove(entry, search.terms)
        if not tree:
            del trees[values]
            if not trees:
                del self._trees[names]

    def find(self, index: SearchIndexSchema, write: Write, found: set[E]) -> None:
        """Add the entries of all searches that the document matches, or did before it was written."""
        words_by_text: dict[str, _Words] = {}  # it is often the same before and after
        for document in (write.old, write.new):
            text = index.text_of(document) if document is not None else None
            if text is None:
                continue
            for names, trees in self._trees.items():
                tree = trees.get(tuple([getattr(document, name) for name in names]))
                if tree is not None:
                    words = words_by_text.get(text)
                    if words is None:
                        words = words_by_text[text] = _Words(text)
                    tree.find(words, found)


class _Words:
    """The words of a document, and their beginnings of those lengths that are asked for."""

    def __init__(self, text: str) -> None:
        self.all = frozenset(words_of(text))
        self._beginnings_by_length: dict[int, frozenset[str]] = {}

    def beginnings(self, length: int) -> frozenset[str]:
        found = self._beginnings_by_length.get(length)
        if found is None:
            found = frozenset([word[:length] for word in self.all if len(word) >= length])
            self._beginnings_by_length[length] = found
        return found


class _Node(Generic[E]):
    """The searches that begin with the words which lead here."""

    __slots__ = ("by_prefix", "by_word", "entries")

    def __init__(self) -> None:
        self.entries: set[E] = set()  # that ask for no more
        self.by_prefix: dict[int, dict[str, set[E]]] = {}  # that ask for this beginning besides; by its length
        self.by_word: dict[str, _Node[E]] = {}

    def __bool__(self) -> bool:
        return bool(self.entries or self.by_prefix or self.by_word)

    def add(self, entry: E, prefix: str | None) -> None:
        if prefix is None:
            self.entries.add(entry)
        else:
            self.by_prefix.setdefault(len(prefix), {}).setdefault(prefix, set()).add(entry)

    def remove(self, entry: E, terms: Terms, place: int = 0) -> None:
        if place < len(terms.words):
            word = terms.words[place]
            node = self.by_word.get(word)
            if node is not None:
                node.remove(entry, terms, place + 1)
                if not node:
                    del self.by_word[word]
        elif terms.prefix is None:
            self.entries.discard(entry)
        else:
            of_length = self.by_prefix.get(len(terms.prefix), {})
            entries = of_length.get(terms.prefix, set())
            entries.discard(entry)
            if not entries and of_length.pop(terms.prefix, None) is not None and not of_length:
                del self.by_prefix[len(terms.prefix)]

    def find(self, words: _Words, found: set[E]) -> None:
        found |= self.entries
        for length, by_prefix in self.by_prefix.items():
            for prefix in by_prefix.keys() & words.beginnings(length):  # looks up the fewer of the two
                found |= by_prefix[prefix]
        for word in self.by_word.keys() & words.all:
            self.by_word[word].find(words, found)


def _place_of(search: SearchRead) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    return tuple([name for name, _ in search.filters]), tuple([value for _, value in search.filters])
