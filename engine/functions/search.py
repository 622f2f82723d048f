"""`ctx.db.search`: the documents that have the words which a user typed, the most relevant first.

A search is built (`filter`) and then ended (`take`, `first`, `collect`, `paginate`). It ranks the newest
`search_match_count_max` documents of those that match and are kept by the filters; older ones are as if they were not
there. Documents that are equally relevant come newest first.

Invariants
  1. A search depends on the documents that match, and on nothing else: neither on how often its words are in other
     documents (`values/words.py`), nor on the cut, as only a newer document that matches moves it.
  2. Every document that a search hands out went through `_keep`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from engine.errors import FunctionMisuse, LimitExceeded
from engine.functions.pages import Page, PaginationOptions, cut_page
from engine.ids import tick_of
from engine.limits import Limits
from engine.ranges import OrderKey
from engine.schema import SearchIndexSchema, Table
from engine.transaction.read_set import SearchRead
from engine.transaction.reading import ReadTransaction
from engine.values.words import Terms, relevance, terms_of, words_of

if TYPE_CHECKING:
    from engine.functions.run import Run

T = TypeVar("T", bound=Table)

_CHUNK = 512  # documents read before the loop gets a turn: 3 ms


class Search(Generic[T]):
    """A search that was not run yet. Each step gives a new one."""

    def __init__(
        self,
        transaction: ReadTransaction,
        run: "Run",
        document_type: type[T],
        index: SearchIndexSchema,
        read: SearchRead,
        filters: tuple[Callable[[T], bool], ...] = (),
    ) -> None:
        self._transaction, self._run = transaction, run
        self._document_type, self._index, self._read, self._filters = document_type, index, read, filters

    def filter(self, predicate: Callable[[T], bool]) -> "Search[T]":
        """Keep only documents for which the predicate is true. It costs a read for each one that it drops."""
        filters = (*self._filters, predicate)
        return Search(self._transaction, self._run, self._document_type, self._index, self._read, filters)

    async def take(self, n: int) -> list[T]:
        """The `n` most relevant documents, or all if there are fewer. It costs a read for each that is ranked."""
        if type(n) is not int or n < 0:
            raise FunctionMisuse(f"take: {n!r} documents; a whole number from 0 on can be taken.")
        return (await self.collect())[:n]

    async def first(self) -> T | None:
        """The most relevant document, or None."""
        taken = await self.take(1)
        return taken[0] if taken else None

    async def collect(self) -> list[T]:
        """All documents that are ranked."""
        return [document for _, document in await self._ranked()]

    async def paginate(self, options: PaginationOptions) -> Page[T]:
        """One page. How relevant a document is follows from itself, so pages stay gapless while others are written."""
        journal = self._run.begin_page()
        read = self._read
        source = (read.table, read.index, read.filters, read.terms.words, read.terms.prefix)
        page = cut_page(options, journal, self._run.cursor_seal("search", *source), await self._ranked())
        self._run.end_page(page.continue_cursor)
        return page

    async def _ranked(self) -> list[tuple[OrderKey, T]]:
        """The documents with their positions, in order."""
        if self._run.wants_pause:
            await self._run.pause()
        if not self._read.terms:
            return []  # it stays so, whatever is written
        self._transaction.read_set.add_search(self._read)  # before the predicates, which may raise
        count_max = self._run.limits.search_match_count_max
        ranked: list[tuple[OrderKey, T]] = []
        before_tick = None
        while True:
            documents: list[T] = self._transaction.search(
                self._document_type, self._read, before_tick=before_tick, limit=_CHUNK
            )
            ranked += [(self._position_of(document), document) for document in self._keep(documents)]
            if len(documents) < _CHUNK or len(ranked) >= count_max:
                return sorted(ranked[:count_max], key=lambda placed: placed[0])
            before_tick = tick_of(documents[-1].id)
            if self._run.wants_pause:
                await self._run.pause()

    def _keep(self, documents: list[T]) -> list[T]:
        return [d for d in documents if all(predicate(d) for predicate in self._filters)]

    def _position_of(self, document: T) -> OrderKey:
        text = self._index.text_of(document)
        assert text is not None, f"{document.id} has no text, and was found"
        found = relevance(self._read.terms, words_of(text))
        assert found is not None, f"{document.id} does not match, and was found"
        is_whole, score = found
        return not is_whole, -score, -tick_of(document.id)


def read_terms(text: Any, where: str, limits: Limits) -> Terms:
    """The terms of what a user typed, within the limits."""
    if type(text) is not str:
        raise FunctionMisuse(f"{where}: {text!r} is no text.")
    if len(text) > limits.search_text_length_max:
        raise LimitExceeded(
            f"{where}: characters",
            used=len(text),
            allowed=limits.search_text_length_max,
            remedy="Ask for less, or raise limits.search_text_length_max.",
        )
    terms = terms_of(text)
    if len(terms) > limits.search_word_count_max:
        raise LimitExceeded(
            f"{where}: words",
            used=len(terms),
            allowed=limits.search_word_count_max,
            remedy="Ask for fewer, or raise limits.search_word_count_max.",
        )
    return terms
