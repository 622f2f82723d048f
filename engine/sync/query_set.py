"""The query set of one session: what its client asks, and what it is still to be told of that.

Invariants
  1. Each query id of the set is either in the view, or refused: then its refusal is told once.
  2. What is told at one time has one modification for each query id.
  3. The set is bounded, and so is how fast it may change: after `subscription_burst_count` queries at once, each
     further one is paid for with time, in which nothing more is read of the client (`rest_seconds`). The set that a
     client comes with costs nothing: after a restart it is asked again by everybody.
"""

from collections.abc import Mapping
from typing import assert_never

from engine.errors import InternalError, LimitExceeded, RequestError
from engine.limits import Limits
from engine.sync import protocol
from engine.sync.backend import View
from engine.sync.protocol import Modification, Result
from engine.sync.refusals import Close, arguments_of, refusal_of

_MODIFICATIONS_PER_QUERY = 4  # of one message: one that adds and removes without end holds the loop


class QuerySet:
    """All that one client asks."""

    __slots__ = ("_ids", "_limits", "_paid_until", "_refusals", "_refused_ids", "_removed_ids", "_view", "version")

    def __init__(self, view: View, limits: Limits) -> None:
        self.version = 0  # that the client announced
        self._view, self._limits = view, limits
        self._ids: dict[int, None] = {}
        # what few sessions have is made when it is needed
        self._refused_ids: dict[int, None] | None = None  # those of them that are not in the view (1)
        self._refusals: dict[int, bytes] | None = None  # their fragments, not told yet
        self._removed_ids: dict[int, None] | None = None  # not acknowledged yet
        self._paid_until = 0.0  # when all queries so far are paid for, in seconds of the session's clock (3)

    def modify(self, message: protocol.ModifyQuerySet, now: float) -> Close | None:
        """Take over what the client changed; or how the connection is to end, as the client is to start over."""
        if message.base_version != self.version or message.new_version <= message.base_version:
            return Close(protocol.CLOSE_PROTOCOL_ERROR, "QuerySetVersionMismatch")
        if len(message.modifications) > _MODIFICATIONS_PER_QUERY * self._limits.query_count_max:
            return Close(protocol.CLOSE_TRY_AGAIN_LATER, "TooManyQueries")  # 3
        added_count = 0
        for modification in message.modifications:
            match modification:
                case protocol.AddQuery():
                    if modification.query_id in self._ids:
                        return Close(protocol.CLOSE_PROTOCOL_ERROR, "DuplicateQueryId")
                    if self._refused_ids and len(self._refused_ids) >= self._limits.query_count_max:
                        return Close(protocol.CLOSE_TRY_AGAIN_LATER, "TooManyRefusedQueries")  # 3
                    self._add(modification)
                    added_count += 1
                case protocol.RemoveQuery():
                    self._remove(modification.query_id)
                case _:
                    assert_never(modification)
        if self.version:  # else it is what the client comes with (3)
            self._paid_until = max(self._paid_until, now) + added_count / self._limits.subscription_rate_per_second
        self.version = message.new_version
        return None

    def rest_seconds(self, now: float) -> float:
        """How long nothing more is to be read, so that what was asked is paid for (3); at most 0: it is."""
        burst_seconds = self._limits.subscription_burst_count / self._limits.subscription_rate_per_second
        return self._paid_until - now - burst_seconds

    def take_news(self, results: Mapping[int, Result]) -> list[Modification] | None:
        """One for each query with news (2); None when the engine itself failed in one of them."""
        modifications: list[Modification] = []
        for query_id, result in results.items():
            if result.failure is not None and result.failure.code == InternalError.code:
                return None
            modifications.append((query_id, protocol.fragment_of(result)))
        if self._refusals:
            modifications += self._refusals.items()
            self._refusals = None
        if self._removed_ids:
            modifications += [(query_id, protocol.REMOVED) for query_id in sorted(self._removed_ids)]
            self._removed_ids = None
        return modifications

    def _add(self, query: protocol.AddQuery) -> None:
        query_id, limits = query.query_id, self._limits
        self._ids[query_id] = None
        if self._removed_ids:
            self._removed_ids.pop(query_id, None)  # 2: its result says enough
        try:
            if len(self._ids) > limits.query_count_max:
                raise LimitExceeded(
                    "subscriptions of this connection",
                    used=len(self._ids),
                    allowed=limits.query_count_max,
                    remedy="Unsubscribe from what is not shown, or raise limits.query_count_max.",
                )
            arguments = arguments_of(query, "query", limits)
        except RequestError as error:
            if self._refused_ids is None:
                self._refused_ids = {}
            self._refused_ids[query_id] = None
            if self._refusals is None:
                self._refusals = {}
            self._refusals[query_id] = protocol.refusal(refusal_of(error))
        else:
            self._view.add(query_id, query.udf_path, arguments, query.journal)

    def _remove(self, query_id: int) -> None:
        if query_id not in self._ids:
            return
        del self._ids[query_id]
        if self._removed_ids is None:
            self._removed_ids = {}
        self._removed_ids[query_id] = None
        if self._refused_ids and query_id in self._refused_ids:
            del self._refused_ids[query_id]
            if self._refusals:
                self._refusals.pop(query_id, None)
        else:
            self._view.remove(query_id)
