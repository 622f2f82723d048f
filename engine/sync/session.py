"""One client of the sync protocol: messages in, frames and requests to its door out. No socket, no clock of its own.

    expecting Connect ──Connect──> connected ──> closed: the client broke the protocol, a credential was refused or
           │                           │                 expired, or the door closed
           │                           └ Authenticate: `unverified` is set until `accept` or `refuse`; messages wait
           └──> closed: nothing was said in time, or something else

A door feeds `receive` with every message that it has, then calls `flush`; it calls `flush` again whenever the session
has called `wake`. After each it writes what is in `outbox`, and looks at `closing`, `unverified` and
`is_reading_paused`.

Invariants
  1. Messages take effect in the order they came. At most one mutation of a session runs at a time.
  2. Each Transition starts where the one before ended; no part of a version decreases, and none passes what the
     client announced.
  3. A mutation's response comes before any Transition at or past its commit timestamp, and one such Transition
     comes after it (also after a failure with data: the PyPI client waits for it).
  4. The first Transition answers every query of the client's first query set. Only successes go before it.
  5. After `closing` is set, nothing is taken in and nothing goes out.
  6. A frame goes out past the outbox only in step: the client has all that was said, and nothing waits to be said.
  7. What waits here is bounded: past `mutation_queue_count_max` reading pauses, and while the client lags no
     Transition is made and no request starts.

The results are the backend's (`live`); what goes over the wire is made in `protocol`, and `shared_frames` for those in
step. It is one class because each invariant ties all of its parts together: what is said depends on all that waits.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import assert_never

import msgspec

from engine.clock import Clock, TimerHandle
from engine.errors import (
    AuthenticationFailed,
    FunctionNotFound,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    RequestError,
)
from engine.identity import Identity
from engine.limits import Limits
from engine.sync import protocol
from engine.sync.backend import (
    ActionOutcome,
    AdminKey,
    Backend,
    Credential,
    MutationOutcome,
    Running,
    UserToken,
    Verified,
)
from engine.sync.protocol import Frame, Modification, Result, StateVersion
from engine.sync.shared_frames import SharedFrames

_log = logging.getLogger("engine.sync")

# The PyPI client says Authenticate without a query set; npm's query set is in the same burst. So an identity alone is
# confirmed only if no query set comes along within this time.
_QUERY_SET_WAIT_SECONDS = 0.25
_EXPIRY_CHECK_SECONDS_MAX = 3_600  # the wall clock may be set meanwhile
_TIMER_SECONDS_MIN = 0.001  # nearer times are now: the difference of two floats may come out a little short
_CLOCK_SKEW_MS_MAX = 2**53  # past it a client's clock says nothing
_REQUEST_ID_LENGTH_MAX = 10  # digits of a u32

_INTERNAL_SERVER_ERROR = "InternalServerError"  # official clients know this close reason: they come back soon


class Close(msgspec.Struct, frozen=True):
    """The door is to close the connection once the outbox is written."""

    code: int
    reason: str  # at most 123 bytes; official clients log it unless it is empty


class _Refusal(msgspec.Struct, frozen=True):
    """A failure of a request that the session itself refuses."""

    code: str
    message: str
    data: bytes | None = None


class _Request(msgspec.Struct, frozen=True, eq=False):
    """A mutation or action, with the identity that was current when it came (1)."""

    request_id: int
    path: str
    arguments: bytes
    identity: Identity | None


class _MutationAnswer(msgspec.Struct, frozen=True):
    request_id: int
    outcome: MutationOutcome


class _ActionAnswer(msgspec.Struct, frozen=True):
    request_id: int
    outcome: ActionOutcome


_Answer = _MutationAnswer | _ActionAnswer


class Session:
    """The state of one connection; the table above says how it moves."""

    __slots__ = (
        "_accepts_chunks",
        "_actions",
        "_answered_up_to",
        "_answers",
        "_backend",
        "_clock",
        "_clock_skew_ms",
        "_confirming_up_to",
        "_expiry",
        "_failures_held",
        "_has_sent_transition",
        "_identity",
        "_identity_wait",
        "_inbox",
        "_is_ending",
        "_is_in_step",
        "_is_lagging",
        "_is_starting",
        "_is_transition_owed",
        "_is_view_ready",
        "_limits",
        "_may_confirm_identity_alone",
        "_mutations",
        "_opened_at",
        "_owed_ts",
        "_peer_code",
        "_query_ids",
        "_received_identity",
        "_received_query_set",
        "_refusals",
        "_refused_ids",
        "_removed_ids",
        "_running_actions",
        "_running_mutation",
        "_sent",
        "_sent_at",
        "_shared",
        "_timer",
        "_view",
        "_wake_door",
        "_write",
        "closing",
        "outbox",
        "ping_payload",
        "session_id",
        "unverified",
    )

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        clock: Clock,
        *,
        wake: Callable[[], None],
        accepts_chunks: bool = False,
        write: Callable[[bytes], object] | None = None,
        shared: SharedFrames | None = None,
    ) -> None:
        self.outbox: list[Frame] = []  # in order; the door takes and clears
        self.ping_payload: bytes | None = None  # a WebSocket ping to send after the outbox; the door takes and clears
        self.closing: Close | None = None
        self.unverified: Credential | None = None  # the door is to have it verified, then to `accept` or `refuse`
        self.session_id: str | None = None  # None until Connect

        self._backend, self._limits, self._clock, self._wake_door = backend, limits, clock, wake
        self._accepts_chunks = accepts_chunks
        self._write, self._shared = write, shared  # how a ready frame goes out at once, and where it is from
        self._is_in_step = False  # the client has all there is, and nothing is under way to it: set by `flush` only
        self._view = backend.make_view(self._on_view_ready)
        self._clock_skew_ms: int | None = None

        # Versions: what the client announced, and where everything sent so far brings it.
        self._received_query_set = 0
        self._received_identity = 0
        self._sent = StateVersion(0, 0, 0)

        self._inbox: list[protocol.Message] = []  # what came while `unverified` was set
        self._identity: Identity | None = None
        self._expiry: TimerHandle | None = None

        self._query_ids: dict[int, None] = {}  # of the client's query set
        self._refused_ids: dict[int, None] = {}  # those of them that are not in the view
        self._refusals: dict[int, bytes] = {}  # their fragments, not sent yet
        self._removed_ids: dict[int, None] = {}  # not acknowledged yet

        self._mutations: list[_Request] = []
        self._running_mutation: _Request | None = None
        self._actions: list[_Request] = []
        self._running_actions: dict[_Request, Running | None] = {}  # None while it is being started
        self._is_starting = False
        self._answers: list[_Answer] = []  # not in the outbox yet, in the order they came about
        self._failures_held: list[_Answer] = []  # for after the first Transition (4)

        self._is_transition_owed = False  # after a response (3)
        self._owed_ts = 0  # at or past which that Transition is to be
        self._is_view_ready = False
        self._has_sent_transition = False
        self._may_confirm_identity_alone = False
        self._identity_wait: TimerHandle | None = None

        self._peer_code: int | None = None  # that the client closed with
        self._is_lagging = False
        self._is_ending = False
        self._answered_up_to = -1  # newest mutation that was answered
        self._confirming_up_to = -1  # newest whose answer a ping asks about

        self._opened_at = self._sent_at = clock.monotonic()
        self._timer = clock.call_later(limits.ping_interval_seconds, self._tick)

    # -- what a door calls --------------------------------------------------------------------------------------------

    def receive(self, text: str | bytes) -> None:
        """Take in one message; its effects show at the next `flush`."""
        if self.closing is not None:
            return  # 5
        self._is_in_step = False
        if self.session_id is None and len(text) > self._limits.message_before_connect_size_bytes_max:
            self.close(protocol.CLOSE_TOO_BIG, "MessageTooLargeBeforeConnect")
            return
        try:
            message = protocol.decode_message(text)
        except InvalidArgument as error:
            self._fail(str(error))
            return
        if self.unverified is not None:
            self._inbox.append(message)
        else:
            self._apply(message)

    def flush(self) -> None:
        """Put the responses that there are into the outbox, then at most one Transition."""
        if self.closing is not None:
            return  # 5
        if self._answers and not self._is_lagging:
            self._put_answers()
        if self._is_transition_due():
            self._put_transition()
        if self._is_ending and self._running_mutation is None:
            self.close(protocol.CLOSE_GOING_AWAY, "")
        self._is_in_step = self._write is not None and self._has_said_all()

    @property
    def is_reading_paused(self) -> bool:
        """Whether the door is to leave further messages in the socket for now."""
        waiting_count = len(self._mutations) + len(self._actions) + len(self._answers) + len(self._failures_held)
        return self.unverified is not None or waiting_count >= self._limits.mutation_queue_count_max

    def accept(self, verified: Verified) -> None:
        """What was `unverified` proves this; the messages that waited for it take effect."""
        if self.closing is not None:
            return
        assert self.unverified is not None, "the door verifies what it was given"
        self.unverified = None
        self._accept_identity(verified.identity, verified.expires_at_ms)
        while self._inbox and self.unverified is None:  # empty when something in it closed the session
            self._apply(self._inbox.pop(0))
        self._wake()

    def refuse(self, error: AuthenticationFailed) -> None:
        """What was `unverified` proves nothing."""
        if self.closing is None:
            self._end_identity(str(error), is_attempt=True)

    def set_lagging(self, is_lagging: bool) -> None:
        """Whether the client takes too long to read: it is skipped, and later gets the newest state only."""
        self._is_lagging = is_lagging
        self._is_in_step = False
        if not is_lagging and self.closing is None:
            self._start_requests()
            self._wake()

    def pong(self, payload: bytes) -> None:
        """The client answered the WebSocket ping with this payload: it has what was sent before."""
        if self.session_id is None or not payload.isdigit() or len(payload) > _REQUEST_ID_LENGTH_MAX:
            return  # a pong that nobody asked for
        request_id = int(payload)
        if request_id <= self._confirming_up_to:
            self._backend.client_saw(self.session_id, request_id)

    def end(self) -> None:
        """Start nothing more, and ask for a close (going away) as soon as no mutation runs; the server stops."""
        self._is_ending = True
        self._wake()

    def peer_closed(self, code: int) -> None:
        """The client has closed the connection with this code."""
        self._peer_code = code
        self.close(protocol.CLOSE_NORMAL, "")

    def close(self, code: int, reason: str) -> None:
        """Ask the door to close, and let go of everything. Actions that run are cancelled; a mutation commits."""
        if self.closing is not None:
            return
        self.closing = Close(code, reason)
        if self.session_id is not None:
            self._backend.session_gone(self.session_id, self._peer_code)
        self._timer.cancel()
        for timer in (self._expiry, self._identity_wait):
            if timer is not None:
                timer.cancel()
        for action in self._running_actions.values():
            if action is not None:
                action.cancel()
        for queue in (self._inbox, self._mutations, self._actions):
            queue.clear()
        self._view.close()
        self._wake()

    # -- messages -----------------------------------------------------------------------------------------------------

    def _apply(self, message: protocol.Message) -> None:
        if self.session_id is None and not isinstance(message, protocol.Connect):
            self._fail("the first message must be Connect")
            return
        match message:
            case protocol.Connect():
                self._connect(message)
            case protocol.ModifyQuerySet():
                self._modify_query_set(message)
            case protocol.Mutation():
                self._take_mutation(message)
            case protocol.Action():
                self._take_action(message)
            case protocol.Authenticate():
                self._authenticate(message)
            case protocol.Event():
                pass
            case _:
                assert_never(message)

    def _connect(self, message: protocol.Connect) -> None:
        if self.session_id is not None:
            self._fail("Connect was sent before")
            return
        self.session_id = message.session_id.lower()
        self._backend.session_connected(self.session_id)
        _log.debug(
            "session %s: connection %d, after %r", self.session_id, message.connection_count, message.last_close_reason
        )
        if message.client_ts is not None and abs(message.client_ts) < _CLOCK_SKEW_MS_MAX:
            self._clock_skew_ms = int(message.client_ts) - self._clock.wall_ns() // 1_000_000
        if message.max_observed_timestamp is None:
            return
        try:
            observed_ts = protocol.decode_timestamp(message.max_observed_timestamp)
        except InvalidArgument as error:
            self._fail(f"maxObservedTimestamp: {error}")
            return
        if observed_ts > self._backend.published_ts():
            _log.error(
                "session %s has seen commit timestamp %d, and the newest here is %d: this database lost commits, "
                "or the client was connected to another one",
                self.session_id,
                observed_ts,
                self._backend.published_ts(),
            )
            self.close(protocol.CLOSE_INTERNAL_ERROR, _INTERNAL_SERVER_ERROR)

    def _modify_query_set(self, message: protocol.ModifyQuerySet) -> None:
        if message.base_version != self._received_query_set or message.new_version <= message.base_version:
            self.close(protocol.CLOSE_PROTOCOL_ERROR, "QuerySetVersionMismatch")
            return
        for modification in message.modifications:
            match modification:
                case protocol.AddQuery():
                    if modification.query_id in self._query_ids:
                        self.close(protocol.CLOSE_PROTOCOL_ERROR, "DuplicateQueryId")
                        return
                    self._add_query(modification)
                case protocol.RemoveQuery():
                    self._remove_query(modification.query_id)
                case _:
                    assert_never(modification)
        self._received_query_set = message.new_version

    def _add_query(self, query: protocol.AddQuery) -> None:
        self._query_ids[query.query_id] = None
        self._removed_ids.pop(query.query_id, None)  # one modification for each query: its result says enough
        if len(self._refused_ids) >= self._limits.query_count_max:
            self.close(protocol.CLOSE_TRY_AGAIN_LATER, "TooManyRefusedQueries")  # 7
            return
        try:
            if len(self._query_ids) > self._limits.query_count_max:
                raise LimitExceeded(
                    "subscriptions of this connection",
                    used=len(self._query_ids),
                    allowed=self._limits.query_count_max,
                    remedy="Unsubscribe from what is not shown, or raise limits.query_count_max.",
                )
            arguments = self._arguments(query, "query")
        except RequestError as error:
            self._refused_ids[query.query_id] = None
            self._refusals[query.query_id] = protocol.refusal(_refusal(error))
        else:
            self._view.add(query.query_id, query.udf_path, arguments, query.journal)

    def _remove_query(self, query_id: int) -> None:
        if query_id not in self._query_ids:
            return
        del self._query_ids[query_id]
        self._removed_ids[query_id] = None
        if query_id in self._refused_ids:
            del self._refused_ids[query_id]
            self._refusals.pop(query_id, None)
        else:
            self._view.remove(query_id)

    def _take_mutation(self, message: protocol.Mutation) -> None:
        try:
            arguments = self._arguments(message, "mutation")
        except RequestError as error:
            outcome = MutationOutcome(ts=None, value=None, failure=_refusal(error))
            self._answers.append(_MutationAnswer(message.request_id, outcome))
            return
        assert self.session_id is not None
        request = _Request(message.request_id, message.udf_path, arguments, self._identity)
        if not self._has_sent_transition:  # it may be sent again: answer before the first Transition (4)
            recorded = self._backend.recorded_outcome(
                self.session_id, request.request_id, request.identity, request.path, request.arguments
            )
            if recorded is not None:
                self._answers.append(_MutationAnswer(request.request_id, recorded))
                return
        self._mutations.append(request)
        self._start_requests()

    def _take_action(self, message: protocol.Action) -> None:
        try:
            arguments = self._arguments(message, "action")
        except RequestError as error:
            outcome = ActionOutcome(value=None, failure=_refusal(error))
            self._answers.append(_ActionAnswer(message.request_id, outcome))
            return
        self._actions.append(_Request(message.request_id, message.udf_path, arguments, self._identity))
        self._start_requests()

    def _arguments(self, message: protocol.AddQuery | protocol.Mutation | protocol.Action, kind: str) -> bytes:
        """The arguments of a request that may be asked at all."""
        if message.component_path:  # components are for admins of the reference server; there are none here
            raise FunctionNotFound(f"{message.component_path}/{message.udf_path}", kind)
        arguments = protocol.unwrap_arguments(message.args)
        if len(arguments) > self._limits.arguments_size_bytes_max:
            raise LimitExceeded(
                "bytes of arguments",
                used=len(arguments),
                allowed=self._limits.arguments_size_bytes_max,
                remedy="Send less at once, or raise limits.arguments_size_bytes_max.",
            )
        return arguments

    # -- who asks -----------------------------------------------------------------------------------------------------

    def _authenticate(self, message: protocol.Authenticate) -> None:
        if message.base_version != self._received_identity:
            # npm counts on after it gave a token up, so this is no bug of the client: a new connection puts it right.
            self.close(protocol.CLOSE_PROTOCOL_ERROR, "IdentityVersionMismatch")
            return
        credential: Credential
        match message.token_type:
            case "None":
                self._accept_identity(None, None)
                return
            case "User":
                credential = UserToken(message.value or "")
            case "Admin":
                credential = AdminKey(message.value or "", message.impersonating or message.acting_as)
            case _:
                assert_never(message.token_type)
        self.unverified = credential

    def _accept_identity(self, identity: Identity | None, expires_at_ms: float | None) -> None:
        self._received_identity += 1
        self._identity = identity
        self._view.set_identity(identity)
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if expires_at_ms is not None:
            self._check_expiry(expires_at_ms)
        if self._received_query_set == 0 and self._identity_wait is None:
            self._identity_wait = self._clock.call_later(_QUERY_SET_WAIT_SECONDS, self._confirm_identity_alone)

    def _confirm_identity_alone(self) -> None:
        self._may_confirm_identity_alone = True
        self._wake()

    def _check_expiry(self, expires_at_ms: float) -> None:
        rest_seconds = expires_at_ms / 1000 - self._clock.wall_ns() / 1e9
        if rest_seconds >= _TIMER_SECONDS_MIN:
            delay_seconds = min(rest_seconds, _EXPIRY_CHECK_SECONDS_MAX)
            self._expiry = self._clock.call_later(delay_seconds, partial(self._check_expiry, expires_at_ms))
        elif self.unverified is None:  # else a newer token is on its way in
            self._end_identity("The token expired", is_attempt=False)

    def _end_identity(self, error: str, *, is_attempt: bool) -> None:
        """Tell, then close: an official client that gave up cannot use the connection any more."""
        self._put(protocol.auth_error(error, self._received_identity, is_attempt=is_attempt))
        self.close(protocol.CLOSE_NORMAL, "")

    # -- requests -----------------------------------------------------------------------------------------------------

    def _start_requests(self) -> None:
        """Start what may run now: one mutation, and actions up to their bound."""
        if self._is_starting:
            return  # an outcome came at once: the loop below goes on
        self._is_starting = True
        try:
            while self._mutations and self._running_mutation is None and self._may_start():
                self._start_mutation(self._mutations.pop(0))
            limit = self._limits.action_concurrent_count_max
            while self._actions and len(self._running_actions) < limit and self._may_start():
                self._start_action(self._actions.pop(0))
        finally:
            self._is_starting = False

    def _may_start(self) -> bool:
        return not (self._is_lagging or self._is_ending) and self.closing is None  # 7

    def _start_mutation(self, request: _Request) -> None:
        assert self.session_id is not None
        self._running_mutation = request
        done = partial(self._on_mutation_done, request)
        self._backend.start_mutation(
            request.path, request.arguments, request.identity, self.session_id, request.request_id, done
        )

    def _on_mutation_done(self, request: _Request, outcome: MutationOutcome) -> None:
        assert self._running_mutation is request, "invariant 1"
        self._running_mutation = None
        if self.closing is not None:
            return
        self._answers.append(_MutationAnswer(request.request_id, outcome))
        self._start_requests()
        self._wake()

    def _start_action(self, request: _Request) -> None:
        self._running_actions[request] = None
        running = self._backend.start_action(
            request.path, request.arguments, request.identity, partial(self._on_action_done, request)
        )
        if request in self._running_actions:  # else it ended at once
            self._running_actions[request] = running

    def _on_action_done(self, request: _Request, outcome: ActionOutcome) -> None:
        if self.closing is not None:
            return
        del self._running_actions[request]
        self._answers.append(_ActionAnswer(request.request_id, outcome))
        self._start_requests()
        self._wake()

    # -- frames -------------------------------------------------------------------------------------------------------

    def _put(self, frame: Frame) -> None:
        self.outbox.append(frame)
        self._sent_at = self._clock.monotonic()

    def _put_answers(self) -> None:
        answers, self._answers = self._answers, []
        for answer in answers:
            failure = answer.outcome.failure
            if failure is not None and failure.code == InternalError.code:
                self.close(protocol.CLOSE_INTERNAL_ERROR, _INTERNAL_SERVER_ERROR)
                return
            if failure is not None and self._received_query_set > 0 and not self._has_sent_transition:
                self._failures_held.append(answer)
            else:
                self._put_answer(answer)

    def _put_answer(self, answer: _Answer) -> None:
        match answer:
            case _MutationAnswer(request_id, outcome):
                if outcome.failure is not None:
                    self._put(protocol.mutation_failed(request_id, outcome.failure, outcome.log_lines))
                    self._is_transition_owed |= outcome.failure.data is not None
                    return
                assert outcome.ts is not None, "a mutation that succeeded has a timestamp"
                assert outcome.value is not None, "a mutation that succeeded has a value"
                self._put(protocol.mutation_succeeded(request_id, outcome.value, outcome.ts, outcome.log_lines))
                self._owed_ts = max(self._owed_ts, outcome.ts)
                self._answered_up_to = max(self._answered_up_to, request_id)
                self._is_transition_owed = True
            case _ActionAnswer(request_id, outcome):
                if outcome.failure is not None:
                    self._put(protocol.action_failed(request_id, outcome.failure, outcome.log_lines))
                    self._is_transition_owed |= outcome.failure.data is not None
                    return
                assert outcome.value is not None, "an action that succeeded has a value"
                self._put(protocol.action_succeeded(request_id, outcome.value, outcome.log_lines))
            case _:
                assert_never(answer)

    def _wake(self) -> None:
        """There is something to say: the door is to flush."""
        self._is_in_step = False
        self._wake_door()

    def _on_view_ready(self) -> None:
        """Nearly always it is one result that others are sent too: then it goes out at once, and ready made."""
        if self._is_in_step:
            only = self._view.take_only(self._sent.ts)
            if only is not None:
                self._send_shared(*only)
                return
        self._is_view_ready = True
        self._wake()

    def _send_shared(self, query_id: int, result: Result) -> None:
        assert self._shared is not None
        assert self._write is not None
        frame, self._sent, self._sent_at = self._shared.get(self._sent, query_id, result)
        self._write(frame)

    def _has_said_all(self) -> bool:
        return self._has_sent_transition and not (
            self._is_lagging
            or self._answers
            or self._is_transition_owed
            or self._failures_held
            or self._is_announcement_due
            or self.closing is not None
        )

    @property
    def _is_announcement_due(self) -> bool:
        """Whether the client announced something that no Transition has confirmed."""
        sent = self._sent
        return sent.query_set != self._received_query_set or sent.identity != self._received_identity

    def _is_transition_due(self) -> bool:
        if self._is_lagging or self.closing is not None:
            return False
        is_announced = self._is_announcement_due
        if not self._has_sent_transition and self._received_query_set == 0:
            return self._is_transition_owed or (
                is_announced and self._may_confirm_identity_alone and self.unverified is None
            )
        return self._is_view_ready or self._is_transition_owed or is_announced

    def _put_transition(self) -> None:
        change = self._view.take()
        self._is_view_ready = False  # `on_ready` comes again for whatever is newer, or not there yet
        if change is None:
            return
        modifications = self._modifications(change.results)
        if modifications is None:
            self.close(protocol.CLOSE_INTERNAL_ERROR, _INTERNAL_SERVER_ERROR)
            return
        end = StateVersion(self._received_query_set, self._received_identity, change.ts)
        start = self._sent
        is_same_set = not self._is_announcement_due
        is_late = change.ts < self._owed_ts  # the view was held at an older state, and is ready again soon
        if not modifications and is_same_set and (is_late or not self._is_transition_owed):
            return  # nothing to tell: the PyPI client would yield every value again
        assert end.ts >= start.ts, "invariant 2"
        frames = protocol.encode_transition(
            start,
            end,
            modifications,
            None if is_same_set else self._stamp(),
            frame_size_bytes_max=self._limits.transition_size_bytes_max,
            accepts_chunks=self._accepts_chunks,
        )
        self.outbox.extend(frames)
        self._sent_at = self._clock.monotonic()
        self._sent = end
        self._is_transition_owed = is_late
        self._has_sent_transition = True
        if self._failures_held:
            self._put_held_failures()

    def _modifications(self, results: Mapping[int, Result]) -> Sequence[Modification] | None:
        """One for each query that has news; None when the engine itself failed in one of them."""
        modifications = []
        for query_id, result in results.items():
            if result.failure is not None and result.failure.code == InternalError.code:
                return None
            modifications.append((query_id, protocol.fragment_of(result)))
        if self._refusals:
            modifications += self._refusals.items()
            self._refusals.clear()
        if self._removed_ids:
            modifications += [(query_id, protocol.REMOVED) for query_id in sorted(self._removed_ids)]
            self._removed_ids.clear()
        return modifications

    def _stamp(self) -> protocol.Stamp | None:
        if self._clock_skew_ms is None:
            return None
        return protocol.Stamp(self._clock_skew_ms, self._clock.wall_ns())

    def _put_held_failures(self) -> None:
        held, self._failures_held = self._failures_held, []
        for answer in held:
            self._put_answer(answer)
        self._wake()  # a Transition may be owed again

    # -- time, and the end --------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Ping a client that heard nothing for long, and ask whether it has what it was sent."""
        now = self._clock.monotonic()
        if self.session_id is None and now - self._opened_at >= self._limits.connect_wait_seconds_max:
            self.close(protocol.CLOSE_NORMAL, "")
            return
        interval_seconds = self._limits.ping_interval_seconds
        rest_seconds = self._sent_at + interval_seconds - now
        is_silent = rest_seconds < _TIMER_SECONDS_MIN
        if not self._is_lagging:  # else it has bytes of ours on their way
            if is_silent:
                self._put(protocol.PING)
                self._wake()
            answered_up_to = self._fully_answered_up_to()
            if answered_up_to > self._confirming_up_to:
                self._confirming_up_to = answered_up_to
                self.ping_payload = b"%d" % answered_up_to
                self._wake()
        self._timer = self._clock.call_later(interval_seconds if is_silent else rest_seconds, self._tick)

    def _fully_answered_up_to(self) -> int:
        """The newest mutation before which none waits."""
        waiting = [request.request_id for request in self._mutations]
        if self._running_mutation is not None:
            waiting.append(self._running_mutation.request_id)
        return min([self._answered_up_to, *(request_id - 1 for request_id in waiting)])

    def _fail(self, error: str) -> None:
        """The client broke the protocol; npm clients stop for good, so this is for what no official client sends."""
        _log.info("session %s: %s", self.session_id, error)
        self._put(protocol.fatal_error(error))
        self.close(protocol.CLOSE_NORMAL, "")


def _refusal(error: RequestError) -> _Refusal:
    return _Refusal(error.code, f"{error.code}: {error}")
