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
  7. What waits here is bounded: past `mutation_queue_count_max` reading pauses, as it does after more new queries than
     the client may ask at once, and while the client lags no Transition is made and no request starts.

The results are the backend's (`live`); what the client asks is in its `query_set`; what goes over the wire is made in
`protocol`, and `shared_frames` for those in step. The rest is one class because each invariant ties all of its parts
together: what is said depends on all that waits.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import assert_never

import msgspec

from engine import faults
from engine.clock import Clock, TimerHandle
from engine.errors import AuthenticationFailed, InternalError, InvalidArgument, RequestError
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
from engine.sync.protocol import Frame, Result, StateVersion
from engine.sync.query_set import QuerySet
from engine.sync.refusals import Close, arguments_of, refusal_of
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
        "_pause",
        "_peer_code",
        "_query_set",
        "_received_identity",
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
        self._query_set = QuerySet(self._view, limits)
        self._received_identity = 0
        self._sent = StateVersion(0, 0, 0)

        self._inbox: list[protocol.Message] = []  # what came while `unverified` was set
        self._pause: TimerHandle | None = None  # until the newest queries are paid for (7)
        self._identity: Identity | None = None
        self._expiry: TimerHandle | None = None

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
        if faults.plan is not None:
            faults.plan.reach("session.received")
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
        if self.unverified is not None or self._pause is not None:
            return True
        waiting_count = len(self._mutations) + len(self._actions) + len(self._answers) + len(self._failures_held)
        return waiting_count >= self._limits.mutation_queue_count_max

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
        for timer in (self._expiry, self._identity_wait, self._pause):
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
        now = self._clock.monotonic()
        closing = self._query_set.modify(message, now)
        if closing is not None:
            self.close(closing.code, closing.reason)
            return
        rest_seconds = self._query_set.rest_seconds(now)
        if rest_seconds >= _TIMER_SECONDS_MIN:
            if self._pause is not None:  # one more message of the burst that began it
                self._pause.cancel()
            self._pause = self._clock.call_later(rest_seconds, self._end_pause)

    def _end_pause(self) -> None:
        self._pause = None
        self._wake()

    def _take_mutation(self, message: protocol.Mutation) -> None:
        try:
            arguments = arguments_of(message, "mutation", self._limits)
        except RequestError as error:
            outcome = MutationOutcome(ts=None, value=None, failure=refusal_of(error))
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
            arguments = arguments_of(message, "action", self._limits)
        except RequestError as error:
            outcome = ActionOutcome(value=None, failure=refusal_of(error))
            self._answers.append(_ActionAnswer(message.request_id, outcome))
            return
        self._actions.append(_Request(message.request_id, message.udf_path, arguments, self._identity))
        self._start_requests()

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
                try:
                    credential = AdminKey(message.value or "", protocol.attributes_of(message))
                except InvalidArgument as error:
                    self._fail(str(error))
                    return
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
        if self._query_set.version == 0 and self._identity_wait is None:
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
        if faults.plan is not None:
            faults.plan.reach("session.answered")
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
            if failure is not None and self._query_set.version > 0 and not self._has_sent_transition:
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
        return sent.query_set != self._query_set.version or sent.identity != self._received_identity

    def _is_transition_due(self) -> bool:
        if self._is_lagging or self.closing is not None:
            return False
        is_announced = self._is_announcement_due
        if not self._has_sent_transition and self._query_set.version == 0:
            return self._is_transition_owed or (
                is_announced and self._may_confirm_identity_alone and self.unverified is None
            )
        return self._is_view_ready or self._is_transition_owed or is_announced

    def _put_transition(self) -> None:
        change = self._view.take()
        self._is_view_ready = False  # `on_ready` comes again for whatever is newer, or not there yet
        if change is None:
            return
        modifications = self._query_set.take_news(change.results)
        if modifications is None:
            self.close(protocol.CLOSE_INTERNAL_ERROR, _INTERNAL_SERVER_ERROR)
            return
        end = StateVersion(self._query_set.version, self._received_identity, change.ts)
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
        if faults.plan is not None:
            faults.plan.reach("session.transition")
        self._sent_at = self._clock.monotonic()
        self._sent = end
        self._is_transition_owed = is_late
        self._has_sent_transition = True
        if self._failures_held:
            self._put_held_failures()

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
