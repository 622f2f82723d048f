"""What is to happen when a client goes away: `ctx.session.on_disconnect(leave, session_id=…)`.

    registered ──its session is gone for the grace──> the mutation runs and the row goes, one commit
        │ ├── the session is back in time: it stays registered
        │ └── another session has registered the same call for the same caller: only the row goes
        └── cancel_on_disconnect: the row goes

The grace begins when the session's last connection is gone; after a crash it begins with the server's start, so that
clients have the time to come back.

Invariants
  1. A registered mutation runs at most once, and once its session is gone for good exactly once, over crashes too: the
     run and the end of the row are one commit.
  2. It runs as the caller who registered it: policies, identity and claims are those of that moment.
  3. Of equal calls of one caller the last one that is registered runs: nobody leaves who still has another tab.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.clock import Clock, TimerHandle
from engine.errors import EngineClosed, LimitExceeded, Overloaded, SessionRequired
from engine.events import DisconnectRan, Events
from engine.identity import Caller, Identity
from engine.ranges import IndexRange, after, key_prefix
from engine.schema import Table, index, unique
from engine.transaction.committer import Committer, Execution, Settled, Submission
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction
from engine.transaction.write_set import WriteSet

if TYPE_CHECKING:
    from engine.functions.context import FunctionReference
    from engine.functions.failures import Failure
    from engine.functions.run import Run
    from engine.functions.runner import Runner

_TAB_CLOSED = 1001  # "going away": what browsers close with when a page is left (RFC 6455, section 7.4.1)
_RETRY_SECONDS = 1.0  # after an overload
_DONE = Execution(b"null", None)


class OnDisconnect(Table, name="_disconnects", system=True):
    """One call that a session has registered for its end."""

    session_id: str
    path: str
    arguments: bytes  # JSON, in wire form
    call_digest: bytes  # equal for equal calls
    caller: str  # the token identifier; empty: nobody
    identity: str | None  # JSON, whole
    by_session = unique("session_id", "caller", "call_digest")
    by_call = index("call_digest", "caller")


class MutationSession:
    """`ctx.session` of one mutation."""

    def __init__(self, runner: "Runner", run: "Run", transaction: WriteTransaction) -> None:
        self._runner, self._run, self._transaction = runner, run, transaction

    @property
    def is_open(self) -> bool:
        return self._run.caller.session_id is not None

    async def on_disconnect(self, function: "FunctionReference", /, **arguments: Any) -> None:
        row = self._row("on_disconnect", function, arguments)
        registered = self._registered(row)
        if registered is not None:
            self._transaction.replace(registered.id, row)  # the newest claims; no write if nothing differs
            return
        transaction = self._transaction
        count = transaction.count(*transaction.range_of(OnDisconnect, "by_session", row.session_id))
        allowed = self._run.limits.disconnect_count_max
        if count >= allowed:
            raise LimitExceeded(
                "mutations registered for the end of one session",
                used=count + 1,
                allowed=allowed,
                remedy="Register one that does it all, or raise limits.disconnect_count_max.",
            )
        self._transaction.insert(row)

    async def cancel_on_disconnect(self, function: "FunctionReference", /, **arguments: Any) -> None:
        registered = self._registered(self._row("cancel_on_disconnect", function, arguments))
        if registered is not None:
            self._transaction.delete(registered.id)

    def _row(self, asked: str, function: "FunctionReference", arguments: dict[str, Any]) -> OnDisconnect:
        self._run.check_open()
        caller, path = self._run.caller, self._run.function.path
        if caller.session_id is None:
            raise SessionRequired(
                f"{path} uses ctx.session.{asked}, and nobody who stays connected called it. Call it over a WebSocket "
                "(ConvexClient, ConvexReactClient), not over HTTP, from an action or as a job; "
                "ctx.session.is_open says whether somebody did."
            )
        call = self._runner.call_of(function, ("mutation",), arguments)
        signature = call.function.signature
        return OnDisconnect(
            session_id=caller.session_id,
            path=call.function.path,
            arguments=signature.to_wire_bytes(call.arguments),
            call_digest=_digest_of(call.function.path, call.arguments.canonical),
            caller="" if caller.identity is None else caller.identity.token_identifier,
            identity=None if caller.identity is None else _encode_identity(caller.identity),
        )

    def _registered(self, row: OnDisconnect) -> OnDisconnect | None:
        found = self._transaction.find(OnDisconnect, "by_session", row.session_id, row.caller, row.call_digest)
        return found[0] if found else None


class Disconnects:
    """Knows who is connected, and runs what is registered of those who are gone."""

    def __init__(
        self,
        runner: "Runner",
        committer: Committer,
        read: Callable[[], ReadTransaction],
        clock: Clock,
        events: Events,
    ) -> None:
        self._runner, self._committer, self._read = runner, committer, read
        self._clock, self._events = clock, events
        self._connection_counts: Counter[str] = Counter()  # of sessions that have one; two while they reconnect
        self._graces: dict[str, TimerHandle] = {}  # of sessions that are gone and have something registered
        self._due: deque[str] = deque()  # sessions whose grace is over
        self._under_way_count = 0  # submitted, not settled
        self._is_closed = False

    def start(self) -> None:
        """Give all sessions that the last run of the server left behind the time to come back."""
        transaction = self._read()
        document_type, index, rest = transaction.range_of(OnDisconnect, "by_session")
        while rows := transaction.scan(document_type, index, rest, descending=False, limit=1):
            session_id = rows[0].session_id
            self._begin_grace(session_id, self._runner.limits.disconnect_grace_ms / 1000)
            rest = IndexRange(rest.table, rest.index, after(key_prefix([session_id])), rest.end)

    def connected(self, session_id: str) -> None:
        """A connection says that it belongs to this session."""
        self._connection_counts[session_id] += 1
        if (grace := self._graces.pop(session_id, None)) is not None:
            grace.cancel()

    def disconnected(self, session_id: str, close_code: int | None) -> None:
        """A connection of this session is gone; the code is that of the client's close frame, if there was one."""
        self._connection_counts[session_id] -= 1
        if self._connection_counts[session_id] > 0:
            return
        del self._connection_counts[session_id]
        if not self._is_closed and self._read().find(OnDisconnect, "by_session", session_id, limit=1):
            limits = self._runner.limits
            is_closed_tab = close_code == _TAB_CLOSED
            grace_ms = limits.disconnect_grace_closed_ms if is_closed_tab else limits.disconnect_grace_ms
            self._begin_grace(session_id, grace_ms / 1000)

    def committed(self, write_set: WriteSet) -> None:
        """A commit was published: if somebody registered who has gone meanwhile, the grace begins now."""
        for write in write_set:
            if isinstance(write.new, OnDisconnect) and not self._is_here(write.new.session_id):
                self._begin_grace(write.new.session_id, self._runner.limits.disconnect_grace_ms / 1000)

    def close(self) -> None:
        """Run nothing more: the rows stay for the next start."""
        self._is_closed = True
        self._due.clear()
        for grace in self._graces.values():
            grace.cancel()

    # -- when it is over

    def _begin_grace(self, session_id: str, seconds: float) -> None:
        if not self._is_closed:
            self._graces[session_id] = self._clock.call_later(seconds, partial(self._end_grace, session_id))

    def _end_grace(self, session_id: str) -> None:
        del self._graces[session_id]
        self._due.append(session_id)
        self._run_due()

    def _is_here(self, session_id: str) -> bool:
        """Whether it is connected, or may still come back."""
        return session_id in self._connection_counts or session_id in self._graces

    def _run_due(self) -> None:
        """As with jobs, a bounded number at a time, so that a crowd that leaves starves nobody."""
        while self._due and self._under_way_count < self._runner.limits.scheduler_batch_count:
            rows = self._read().find(OnDisconnect, "by_session", self._due.popleft())
            for row in sorted(rows, key=lambda row: row.creation_time):
                self._submit(row)

    def _submit(self, found: OnDisconnect) -> None:
        failures: list[Failure | None] = []  # of each time that it ran: again, if storage undid its group

        def execute(transaction: WriteTransaction) -> Execution:
            transaction.lift_limits()
            row = transaction.get(found.id)
            if not isinstance(row, OnDisconnect) or self._is_here(row.session_id):
                return _DONE
            transaction.delete(row.id)
            if transaction.find(OnDisconnect, "by_call", row.call_digest, row.caller, limit=1):
                return _DONE  # invariant 3
            failures.append(self._run(row, transaction))
            return _DONE

        def settle(settled: Settled) -> None:
            self._under_way_count -= 1
            if settled.error is not None:
                self._retry(found.session_id)
            elif failures and self._events.listeners:
                self._events.emit(DisconnectRan(found.path, failures[-1] is None))
            self._run_due()

        try:
            self._committer.submit(Submission(execute, settle, function=found.path))
            self._under_way_count += 1
        except (Overloaded, EngineClosed):
            self._retry(found.session_id)

    def _run(self, row: OnDisconnect, transaction: WriteTransaction) -> "Failure | None":
        caller = Caller(None if row.identity is None else _decode_identity(row.identity))
        return self._runner.execute_stored(row.path, row.arguments, caller, transaction)

    def _retry(self, session_id: str) -> None:
        if not self._is_here(session_id):
            self._begin_grace(session_id, _RETRY_SECONDS)


def _digest_of(path: str, canonical_arguments: bytes) -> bytes:
    return hashlib.blake2b(b"%b\0%b" % (path.encode(), canonical_arguments), digest_size=16).digest()


def _encode_identity(identity: Identity) -> str:
    return json.dumps([identity.subject, identity.issuer, dict(identity.claims)])


def _decode_identity(text: str) -> Identity:
    subject, issuer, claims = json.loads(text)
    return Identity(subject=subject, issuer=issuer, claims=claims)
