"""Who shares which result.

A live query is listed under what was asked, and under what its run read of who asks. That is parts of the identity, and
*nested queries* that themselves ask who asks: those count by what they returned. So each caller has a live query of its
own behind such a part (a *dependency*), kept true like any other, and shares the big result with all for whom it
returns the same.

Invariants
  1. A live query that has run and is not dirty is listed under its variant, for every journal that leads to it.
  2. A view that holds a live query is a dependent of all live queries behind its nested parts, for its own identity.
  3. Two live queries are never listed in one place: the later one gives its views to the earlier; but where that waits
     to run it gives up its place, so that nobody waits for a result that is there.
"""

from collections.abc import Callable, Iterator
from typing import Any

from engine.functions.outcomes import Call, NestedQuery, Outcome
from engine.identity import Identity, part_of
from engine.live.live_query import Ask, LiveQuery, SharedPart, Variant
from engine.live.view import View

# function path, canonical arguments, journal that it starts from, whether policies apply
_Key = tuple[str, bytes, str | None, bool]


class Sharing:
    """The live queries of one engine, by what was asked and by whom."""

    def __init__(
        self,
        run: Callable[[LiveQuery], None],
        use: Callable[[LiveQuery], None],
        release: Callable[[LiveQuery], None],
    ) -> None:
        self._run = run  # now, if that is possible
        self._use = use  # somebody needs it
        self._release = release  # nobody needs it for the moment
        self._listed: dict[_Key, dict[tuple[SharedPart, ...], dict[Variant, LiveQuery]]] = {}
        self._new: dict[tuple[Any, ...], LiveQuery] = {}  # those that never ran: what they read is not known

    def find(self, ask: Ask, call: Call, identity: Identity | None, *, is_restricted: bool) -> LiveQuery:
        """One that the asker may share, else a new one."""
        key = (call.function.path, call.arguments.canonical, ask.journal, is_restricted)
        variants = []
        for parts, by_variant in list(self._listed.get(key, {}).items()):
            variant = self._variant(identity, parts)
            found = by_variant.get(variant) if variant is not None else None
            if found is not None:
                return found
            variants.append(variant)
        # as far as is known they can share what has not run yet; if not, the run splits them
        new_key = (*key, tuple(variants))
        waiting = self._new.get(new_key)
        if waiting is not None:
            return waiting
        live_query = self._new[new_key] = LiveQuery(ask, call, identity, is_restricted=is_restricted)
        live_query.new_key = new_key
        return live_query

    def look_up(self, nested: NestedQuery, identity: Identity | None) -> LiveQuery | None:
        """The one behind a nested query, if it is there; runs nothing."""
        path, canonical, is_restricted = nested.key
        for parts, by_variant in self._listed.get((path, canonical, None, is_restricted), {}).items():
            variant = self._variant(identity, parts, runs=False)
            found = by_variant.get(variant) if variant is not None else None
            if found is not None:
                return found
        return None

    def known(self, nested: NestedQuery, identity: Identity | None, ts: int) -> Outcome | None:
        """What a nested query would return at `ts`, if that is known."""
        live_query = self.look_up(nested, identity)
        if live_query is None or live_query.is_dirty or not live_query.variant:  # one that asks nobody is run inline
            return None
        result = live_query.result
        if result is None or result.is_evicted or result.ts > ts or not result.is_repeatable:
            return None
        if result.journal is not None:  # a page inside of another query ends where that one remembers
            return None
        return result.outcome

    def suits(self, live_query: LiveQuery, identity: Identity | None) -> bool:
        """Whether the result is right for this caller too."""
        variant = self._variant(identity, tuple(part for part, _ in live_query.variant))
        return variant is not None and variant == live_query.variant

    def list(self, live_query: LiveQuery, journals: set[str | None]) -> LiveQuery:
        """List it under these starting journals; gives itself, or another that gives its callers the same already."""
        assert live_query.call is not None
        self.unlist(live_query)
        path, canonical = live_query.call.function.path, live_query.call.arguments.canonical
        parts, variant = tuple(part for part, _ in live_query.variant), live_query.variant
        is_restricted = live_query.is_restricted
        at_journal = self._listed.get((path, canonical, live_query.journal, is_restricted), {})
        serving = at_journal.get(parts, {}).get(variant, live_query)
        if serving.is_dirty:
            serving = live_query
        for journal in journals:
            key = (path, canonical, journal, is_restricted)
            by_variant = self._listed.setdefault(key, {}).setdefault(parts, {})
            listed = by_variant.get(variant)
            if listed is not None and listed.is_dirty:  # it is about to change: once it has run it looks for its place
                listed.keys.discard((key, parts, variant))
                listed = None
            if listed is None:
                by_variant[variant] = serving
                serving.keys.add((key, parts, variant))
        return serving

    def unlist(self, live_query: LiveQuery) -> None:
        """It is found no more."""
        for key, parts, variant in live_query.keys:
            by_parts = self._listed.get(key, {})
            by_variant = by_parts.get(parts, {})
            if by_variant.get(variant) is live_query:
                del by_variant[variant]
                if not by_variant:
                    del by_parts[parts]
                    if not by_parts:
                        del self._listed[key]
        live_query.keys.clear()
        if self._new.get(live_query.new_key) is live_query:
            del self._new[live_query.new_key]

    def depend(self, view: View, query_id: int, live_query: LiveQuery) -> None:
        """The view holds this one under this id: what it shares it by is watched from now on (invariant 2)."""
        before = view.dependencies_of(query_id)
        if not live_query.variant and not before:
            return
        wanted = dict.fromkeys(self._behind(live_query, view.identity))
        dropped = [other for other in before if other not in wanted]
        view.depend_on(query_id, tuple(wanted))
        for dependency in wanted:
            query_ids = dependency.dependents.get(view, ())
            if query_id not in query_ids:
                dependency.dependents[view] = (*query_ids, query_id)
            self._use(dependency)
            if dependency.is_dirty:
                self._run(dependency)
            if dependency.is_dirty:
                view.wait_for(dependency)
        for dependency in dropped:
            self._let_go(view, query_id, dependency)

    def forget(self, view: View, query_id: int) -> None:
        """The view holds nothing under this id any more."""
        dependencies = view.dependencies_of(query_id)
        view.depend_on(query_id, ())
        for dependency in dependencies:
            self._let_go(view, query_id, dependency)

    def clear(self) -> None:
        self._listed.clear()
        self._new.clear()

    def _let_go(self, view: View, query_id: int, dependency: LiveQuery) -> None:
        query_ids = dependency.dependents.get(view)
        if query_ids is None:
            return
        left = tuple(each for each in query_ids if each != query_id)
        if left:
            dependency.dependents[view] = left
        else:
            del dependency.dependents[view]
            view.no_longer_waits_for(dependency)
            if not dependency.is_watched:
                self._release(dependency)

    def _behind(self, live_query: LiveQuery, identity: Identity | None) -> Iterator[LiveQuery]:
        for nested in live_query.nested:
            dependency = self._dependency(nested, identity)
            yield dependency
            yield from self._behind(dependency, identity)

    def _dependency(self, nested: NestedQuery, identity: Identity | None) -> LiveQuery:
        ask = Ask(nested.call.function.path, nested.wire_arguments, None)
        return self.find(ask, nested.call, identity, is_restricted=nested.is_restricted)

    def _variant(
        self, identity: Identity | None, parts: tuple[SharedPart, ...], *, runs: bool = True
    ) -> Variant | None:
        """These parts for this caller, comparable; None if what a nested query returns is not known now."""
        variant: list[tuple[SharedPart, object]] = []
        for part in parts:
            if not isinstance(part, NestedQuery):
                variant.append((part, repr(part_of(identity, part))))
                continue
            dependency = self._dependency(part, identity) if runs else self.look_up(part, identity)
            if dependency is not None and dependency.is_dirty and runs:
                self._run(dependency)
                # its run may have shown that it is another one's: then that one is listed
                dependency = self.look_up(part, identity)
            if dependency is None or dependency.is_dirty or dependency.result is None:
                return None
            variant.append((part, dependency.result.token))
        return tuple(variant)
