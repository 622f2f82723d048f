"""The engine as its doors and its actions see it: functions by path or call, outcomes as wire-ready bytes.

Invariants
  1. Each request ends in exactly one outcome; refusals of the engine itself (overload, unknown function) are failures
     of that request like any other.
  2. A mutation with a session id and a request id is applied once, however often it comes (`transaction/ledger.py`).
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from engine.auth.admin import Authenticator, parse_authorization
from engine.auth.tokens import Verified
from engine.clock import Clock
from engine.errors import AppError, AppFault, ConfigError, FunctionNotFound, RequestError, RequestIdReused
from engine.functions.disconnects import Disconnects
from engine.functions.files import Files
from engine.functions.outcomes import Call, Outcome, QueryRun
from engine.functions.registry import FunctionKind, Registry
from engine.functions.requests import Answer, Request, answer_of
from engine.functions.routes import Route
from engine.functions.runner import Runner
from engine.functions.settings import secret_named
from engine.functions.webhooks import Deliveries
from engine.identity import Caller, Identity
from engine.live.live_query import Result
from engine.live.publisher import Publisher
from engine.live.view import View
from engine.observe.explain import Explanation, explain_run
from engine.observe.profile import Profile, recording
from engine.sync.backend import ActionOutcome, Credential, MutationOutcome
from engine.transaction.committer import Committer, Execution, Settled, Submission
from engine.transaction.ledger import Ledger, LedgerKey
from engine.transaction.reading import ReadTransaction
from engine.transaction.snapshots import Snapshots
from engine.transaction.transaction import WriteTransaction

T = TypeVar("T")


class EngineBackend:
    """What sessions, HTTP requests, actions and the in-process API ask of the engine."""

    def __init__(
        self,
        runner: Runner,
        committer: Committer,
        publisher: Publisher,
        snapshots: Snapshots,
        ledger: Ledger,
        authenticator: Authenticator,
        disconnects: Disconnects,
        clock: Clock,
    ) -> None:
        self._disconnects = disconnects
        self._runner, self._committer, self._publisher = runner, committer, publisher
        self._snapshots, self._ledger, self._authenticator, self._clock = snapshots, ledger, authenticator, clock
        self._tasks: set[asyncio.Task[None]] = set()  # actions of sessions
        self._action_count = 0  # under way, of sessions and others
        self._deliveries = Deliveries(self, runner.limits)

    @property
    def files(self) -> Files:
        """For the door of files."""
        return self._runner.files

    # -- of a session

    def published_ts(self) -> int:
        return self._publisher.ts

    def make_view(self, on_ready: Callable[[], None]) -> View:
        return View(self._publisher, on_ready)

    def recorded_outcome(
        self, session_id: str, request_id: int, identity: Identity | None, path: str, arguments: bytes
    ) -> MutationOutcome | None:
        """How this mutation ended when it came before; None if it did not, or has not committed yet."""
        key = _ledger_key(session_id, request_id, identity, path, arguments)
        try:
            recorded = self._ledger.lookup(self._snapshots.reader, key)
        except RequestIdReused as error:
            return MutationOutcome(None, None, self._runner.failures.of(error, path))
        return None if recorded is None else MutationOutcome(recorded.ts, recorded.value)

    def start_mutation(
        self,
        path: str,
        arguments: bytes,
        identity: Identity | None,
        session_id: str,
        request_id: int,
        done: Callable[[MutationOutcome], None],
    ) -> None:
        key = _ledger_key(session_id, request_id, identity, path, arguments)
        self._submit(path, arguments, Caller(identity, session_id=session_id), key, done)

    async def session_mutation(
        self, path: str, arguments: bytes, identity: Identity | None, session_id: str, request_id: int
    ) -> MutationOutcome:
        """The same, awaited."""
        done: asyncio.Future[MutationOutcome] = asyncio.get_running_loop().create_future()
        self.start_mutation(path, arguments, identity, session_id, request_id, _into(done))
        return await done

    def start_action(
        self, path: str, arguments: bytes, identity: Identity | None, done: Callable[[ActionOutcome], None]
    ) -> "asyncio.Task[None]":
        async def run() -> None:
            done(await self.http_action(path, arguments, identity))

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def authenticate(self, credential: Credential) -> Verified:
        return await self._authenticator.authenticate(credential)

    def session_connected(self, session_id: str) -> None:
        self._disconnects.connected(session_id)

    def session_gone(self, session_id: str, close_code: int | None) -> None:
        self._disconnects.disconnected(session_id, close_code)

    def client_saw(self, session_id: str, up_to_request_id: int) -> None:
        """The client has the answers up to this one: after a while their ledger rows may go."""
        self._ledger.saw(session_id, up_to_request_id, self._clock.monotonic())

    # -- of an HTTP request

    async def http_query(
        self,
        path: str,
        arguments: bytes,
        identity: Identity | None,
        at_ts: int | None = None,
        *,
        is_admin: bool = False,
    ) -> Result:
        """The result now, shared with whoever watches the same; or at a snapshot that was retained."""
        if at_ts is None and not is_admin:
            return await self._publisher.ask_once(path, arguments, identity)
        ts = self._publisher.ts if at_ts is None else at_ts
        try:
            call = self._resolve("query", path, arguments, is_admin=is_admin)
        except RequestError as error:
            failure = self._runner.failures.of(error, path)
            return Result(ts, Outcome(None, failure, ()), None)
        run = await self._run_at(ts, call, caller_of(identity, is_admin=is_admin))
        return Result(ts, run.outcome, None)

    async def http_mutation(
        self, path: str, arguments: bytes, identity: Identity | None, *, is_admin: bool = False
    ) -> MutationOutcome:
        done: asyncio.Future[MutationOutcome] = asyncio.get_running_loop().create_future()
        self._submit(path, arguments, caller_of(identity, is_admin=is_admin), None, _into(done), is_admin=is_admin)
        return await done

    async def http_action(
        self, path: str, arguments: bytes, identity: Identity | None, *, is_admin: bool = False
    ) -> ActionOutcome:
        try:
            call = self._resolve("action", path, arguments, is_admin=is_admin)
        except RequestError as error:
            return ActionOutcome(None, self._runner.failures.of(error, path))
        self._action_count += 1
        try:
            outcome = await self._runner.run_action(call, caller_of(identity, is_admin=is_admin), self)
        finally:
            self._action_count -= 1
        return ActionOutcome(outcome.value, outcome.failure, outcome.log_lines)

    async def explain(self, path: str, arguments: bytes, identity: Identity | None) -> Explanation:
        """Run a query for an operator, and say what it did. Without an identity it runs as for nobody signed in."""
        call = self._runner.resolve_any(("query",), path, arguments)
        reader = self._snapshots.lend(self._publisher.ts)
        assert reader is not None, "the published snapshot is always there"
        try:
            transaction = ReadTransaction(reader, self._publisher.catalog, self._runner.limits)
            run = await self._runner.run_long_query(call, Caller(identity), transaction, self._now_ms(), None)
            return explain_run(call.function.path, run, transaction)
        finally:
            self._snapshots.give_back(reader)

    async def profile(self, seconds: float) -> Profile:
        """Where the loop's time goes, from now on for so long. Raises Overloaded when that cannot be told."""
        with recording() as recorded:
            await self._clock.sleep(seconds)
        return await asyncio.to_thread(recorded.profile)  # putting thousands of stacks into words takes its time

    def function_kind(self, path: str, *, is_admin: bool = False) -> FunctionKind | None:
        """The kind of a function that this caller may call; None if there is none of this path."""
        try:
            function = self._runner.registry.any(path, ("query", "mutation", "action"))
        except FunctionNotFound:
            return None
        return function.kind if is_admin or not function.is_internal else None

    def retain_snapshot(self) -> int:
        return self._snapshots.retain()

    @property
    def registry(self) -> Registry:
        """The functions and routes of the newest code."""
        return self._runner.registry

    async def run_route(
        self, route: Route, path_texts: Mapping[str, str], request: Request, identity: Identity | None
    ) -> Answer:
        """How a route of the app answers. Raises RequestError."""
        self._action_count += 1
        try:
            if route.webhook is None:
                return await self._answer(route, path_texts, request, identity)
            try:
                secret = secret_named(self._runner.settings, route.webhook.secret)
                delivery = route.webhook.delivery_of(request, secret, self._now_ms() / 1000)
            except ConfigError as error:
                return answer_of(Outcome(None, self._runner.failures.of(error, route.function.path), ()))
            return await self._deliveries.answer_once(
                f"{route.method} {route.path}", delivery, lambda: self._answer(route, path_texts, request, identity)
            )
        finally:
            self._action_count -= 1

    async def authenticate_header(self, authorization: str) -> Verified:
        known = self._authenticator.known(authorization)
        return known or await self._authenticator.authenticate(parse_authorization(authorization))

    # -- of an action (`functions/calls.py`, Transactions)

    async def run_query(self, call: Call, caller: Caller) -> Outcome:
        run = await self._run_at(self._publisher.ts, call, caller)
        return run.outcome

    async def run_mutation(self, call: Call, caller: Caller) -> Outcome:
        settled = await self._commit(self._execution_of(call, caller, is_admin=True), call.function.path)
        if settled.error is not None:
            return Outcome(None, self._runner.failures.of(settled.error, call.function.path), ())
        assert settled.execution is not None
        outcome: Outcome = settled.execution.detail
        return outcome

    async def write(self, work: Callable[[WriteTransaction, float], T]) -> T:
        """Do the engine's own writes as a mutation; durable on return."""
        results: list[T] = []

        def execute(transaction: WriteTransaction) -> Execution:
            transaction.lift_limits()
            try:
                results.append(work(transaction, transaction.now))
            except (RequestError, AppError, AppFault) as error:  # it cannot be written, or a trigger refuses it
                return Execution(None, error)
            return Execution(b"null", None)

        settled = await self._commit(execute)
        if settled.error is not None:
            raise settled.error
        assert settled.execution is not None
        if settled.execution.value is None:
            raise settled.execution.detail
        return results[-1]  # it runs again when storage undid its group

    @property
    def is_idle(self) -> bool:
        """Whether no action is under way that a client or the program asked for."""
        return self._action_count == 0

    async def close(self) -> None:
        """Cancel the actions that are under way."""
        await self._deliveries.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- inside

    async def _answer(
        self, route: Route, path_texts: Mapping[str, str], request: Request, identity: Identity | None
    ) -> Answer:
        call = self._runner.call_of_route(route, path_texts, request)
        return answer_of(await self._runner.run_action(call, Caller(identity), self, request))

    async def _run_at(self, ts: int, call: Call, caller: Caller) -> QueryRun:
        """Run a query on a snapshot that stays while the run pauses. Raises RequestError when it is gone."""
        reader = self._snapshots.lend(ts)
        if reader is None:
            raise RequestError(
                f"the snapshot at {ts} is not kept any more (it is for "
                f"{self._runner.limits.snapshot_retained_seconds} s). Ask /api/query_ts for a new one."
            )
        try:
            transaction = ReadTransaction(reader, self._publisher.catalog, self._runner.limits)
            return await self._runner.run_long_query(call, caller, transaction, self._now_ms(), None)
        finally:
            self._snapshots.give_back(reader)

    async def _commit(self, execute: Callable[[WriteTransaction], Execution], function: str = "") -> Settled:
        done: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        self._committer.submit(Submission(execute, _into(done), function=function))
        return await done

    def _submit(
        self,
        path: str,
        arguments: bytes,
        caller: Caller,
        key: LedgerKey | None,
        done: Callable[[MutationOutcome], None],
        *,
        is_admin: bool = False,
    ) -> None:
        def settle(settled: Settled) -> None:
            if settled.error is not None:
                done(MutationOutcome(None, None, self._runner.failures.of(settled.error, path)))
            elif settled.recorded is not None:
                done(MutationOutcome(settled.ts, settled.recorded))
            else:
                assert settled.execution is not None
                outcome: Outcome = settled.execution.detail
                ts = settled.ts if outcome.failure is None else None
                done(MutationOutcome(ts, outcome.value, outcome.failure, outcome.log_lines))

        try:
            call = self._resolve("mutation", path, arguments, is_admin=is_admin)
            execute = self._execution_of(call, caller, is_admin=is_admin)
            function = call.function
            self._committer.submit(Submission(execute, settle, key, function.path, is_admin, function.linger_seconds))
        except RequestError as error:
            done(MutationOutcome(None, None, self._runner.failures.of(error, path)))

    def _execution_of(self, call: Call, caller: Caller, *, is_admin: bool) -> Callable[[WriteTransaction], Execution]:
        """Runs a mutation by the code that is the newest then."""
        function, runner = call.function, self._runner

        def execute(transaction: WriteTransaction) -> Execution:
            current = call
            if runner.registry.by_path.get(function.path) is not function:  # reloaded since
                arguments = function.signature.to_wire_bytes(call.arguments)
                try:
                    current = self._resolve("mutation", function.path, arguments, is_admin=is_admin)
                except RequestError as error:
                    return Execution(None, Outcome(None, runner.failures.of(error, function.path), ()))
            return runner.execute_mutation(current, caller, transaction)

        return execute

    def _resolve(self, kind: FunctionKind, path: str, arguments: bytes, *, is_admin: bool) -> Call:
        if is_admin:
            return self._runner.resolve_any((kind,), path, arguments)
        return self._runner.resolve(kind, path, arguments)

    def _now_ms(self) -> float:
        return self._clock.wall_ns() / 1_000_000


def _ledger_key(session_id: str, request_id: int, identity: Identity | None, path: str, arguments: bytes) -> LedgerKey:
    token_identifier = identity.token_identifier if identity is not None else None
    return LedgerKey.of(session_id, request_id, token_identifier, path, arguments)


def caller_of(identity: Identity | None, *, is_admin: bool) -> Caller:
    """An operator who acts as nobody is restricted by no policy."""
    return Caller(identity, is_restricted=identity is not None or not is_admin)


def _into(future: "asyncio.Future[T]") -> Callable[[T], None]:
    """Give a future its result, unless whoever waited for it is gone."""

    def done(result: T) -> None:
        if not future.done():
            future.set_result(result)

    return done
