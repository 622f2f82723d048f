"""The engine: wires the layers together, and is the API for programs in the same process.

    async with Engine.open(app=".", database="data/engine.db") as engine:
        await engine.mutation("chat:send_message", game_id=game, message="hi", identity=alice)
        async with engine.subscribe("chat:get_messages", game_id=game) as results:
            async for messages in results: ...

Invariants
  1. Of one commit: first the readers move, then mutations are settled, then live queries run and subscribers are told.
  2. After a fatal error nothing is answered any more; `failed` says why.
  3. A reload swaps schema and functions whole, or changes nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from engine.auth.admin import AdminKeys, Authenticator
from engine.auth.providers import AuthProvider
from engine.auth.tokens import TokenVerifier
from engine.backend import EngineBackend, caller_of
from engine.clock import Clock, SystemClock
from engine.config import Config, load_config, read_settings
from engine.errors import EngineClosed, EngineError, InternalError, Overloaded
from engine.events import CodeReloaded, Committed, Events, RoomEnded, RoomReturned
from engine.functions.calls import value_of
from engine.functions.disconnects import Disconnects
from engine.functions.files import Files
from engine.functions.loader import App, load_app
from engine.functions.outcomes import Outcome
from engine.functions.registry import Function, FunctionKind, Registry
from engine.functions.repeating import RepeatingRunner
from engine.functions.runner import Runner
from engine.functions.scheduler import JobScheduler
from engine.functions.settings import make_settings
from engine.functions.storage import FileAddresses, StoredFile, loosen
from engine.identity import Identity
from engine.live.live_query import Result
from engine.live.publisher import Publisher
from engine.live.view import View
from engine.storage.connections import Database
from engine.storage.ddl import apply_schema
from engine.storage.files import DiskFileStore, Staging, files_directory
from engine.storage.rows import RowCodec
from engine.storage.s3 import S3FileStore
from engine.storage.scans import forget_scan_statements
from engine.storage.totals import forget_total_statements
from engine.transaction.committer import Committer, Execution, Group, Submission
from engine.transaction.ledger import Ledger
from engine.transaction.reading import Catalog, ReadTransaction
from engine.transaction.snapshots import Snapshots
from engine.transaction.transaction import WriteTransaction


class Engine:
    """One app on one database. Open it with `Engine.open`."""

    def __init__(
        self,
        app: App,
        config: Config,
        database: Database,
        clock: Clock,
        events: Events,
        providers: tuple[AuthProvider, ...],
        admin_keys: tuple[str, ...],
        runner_class: type[Runner],
    ) -> None:
        self.config, self.clock, self.events, self.database = config, clock, events, database
        self._app = app
        self.failed: asyncio.Future[InternalError] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()  # failed or closed: why
        self._callers: dict[object, asyncio.Task[Any]] = {}  # by call, which waits in `_unless_failed`
        self._commits: asyncio.Task[None]  # made by `open`
        self._given_settings: Mapping[str, Any] = {}  # set by `open`
        limits = config.limits
        self.schema_changes = apply_schema(database.writer, app.schema)
        """What opening changed in the database, in words."""
        self._ledger = Ledger.open(database.writer, limits)
        self._snapshots = Snapshots(database, limits, clock)
        self._runner = runner_class(
            app.registry,
            limits,
            clock,
            events,
            cursor_secret=database.read_secret(),
            is_production=config.mode == "production",
        )
        catalog = _catalog_of(app, self._runner)
        self._publisher = Publisher(
            self._runner, self._snapshots, catalog, clock, events, self._fail, self._advance_time
        )
        self._committer = Committer(
            database.writer, catalog, self._ledger, limits, clock, self._publish, self._refresh, self._fail
        )
        self._committer.on_short = self._tell_short
        self._disconnects = Disconnects(self._runner, self._committer, self._read, clock, events)
        self._tokens = TokenVerifier((*config.providers, *providers), clock)
        digests = (*config.admin_key_digests, *admin_keys)
        self.backend = EngineBackend(
            self._runner,
            self._committer,
            self._publisher,
            self._snapshots,
            self._ledger,
            Authenticator(self._tokens, AdminKeys(digests)),
            self._disconnects,
            clock,
        )
        self._scheduler = JobScheduler(self._runner, self._committer, self.backend, self._read, clock, events)
        directory = files_directory(database.path)
        self.files = self._runner.files = Files(
            DiskFileStore(directory) if config.storage is None else S3FileStore(config.storage),
            Staging(directory, limits.free_size_bytes_min),
            FileAddresses(database.read_secret(), config.public_url or f"http://{config.host}:{config.port}"),
            self.backend,
            self._read,
            limits,
            clock,
        )

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        app: str | Path = ".",
        database: str | Path = "data/engine.db",
        *,
        config: Config | None = None,
        mode: str | None = None,
        clock: Clock | None = None,
        events: Events | None = None,
        providers: tuple[AuthProvider, ...] = (),
        admin_key_digests: tuple[str, ...] = (),
        settings: Mapping[str, Any] | None = None,
        keeps_modules: bool = False,
        repeats_queries: bool = False,
    ) -> "AsyncIterator[Engine]":
        """Open an app directory on a database file, which is made if it is not there (":memory:" for a temporary one).

        `config` stands for the app's `engine.toml`; `mode` ("development" or "production") over either. `providers` and
        `admin_key_digests` are accepted besides those of the config. `settings` stand over `[app]` and the variables
        `APP_*`. `keeps_modules`: what is imported of the app stays as it is, so that tests and functions have the same
        classes. `repeats_queries`: some are run twice, and `ResultsDiffered` tells of a difference. Raises SchemaError,
        RegistryError, ConfigError.
        """
        directory = Path(app)
        if config is None:
            config = load_config(directory, {"mode": mode} if mode is not None else None)
        clock = clock or SystemClock()
        loaded = load_app(
            directory, config.limits, config.rate_limits, keeps_modules=keeps_modules, denied=config.denied_tables
        )
        given = settings or {}
        app_settings = make_settings(loaded.registry.settings, read_settings(directory, given))
        async with AsyncExitStack() as stack:
            opened = Database.open(database, config.limits, entropy=clock.entropy)
            stack.callback(opened.close)
            runner_class = RepeatingRunner if repeats_queries else Runner
            engine = cls(loaded, config, opened, clock, events or Events(), providers, admin_key_digests, runner_class)
            stack.callback(engine._runner.close)
            stack.callback(engine._tokens.close)
            engine._commits = asyncio.create_task(engine._committer.run())
            stack.push_async_callback(engine._stop)
            engine._given_settings, engine._runner.settings = given, app_settings
            await engine._unless_failed(engine.files.start())
            await engine._unless_failed(engine._scheduler.start())
            engine._disconnects.start()
            yield engine

    # -- calling functions

    async def query(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Any:
        """What the query returns now, as Python values. Raises AppError and the errors of `errors.py`."""
        function, raw = self._prepare("query", path, arguments)
        result = await self._unless_failed(self.backend.http_query(path, raw, identity, is_admin=function.is_internal))
        return _value_of_result(function, result)

    async def mutation(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Any:
        """Run a mutation; it is durable when this returns."""
        call = self._runner.call_of(path, ("mutation",), arguments)
        caller = caller_of(identity, is_admin=call.function.is_internal)
        return value_of(call.function, await self._unless_failed(self.backend.run_mutation(call, caller)))

    async def session_mutation(
        self, session_id: str, request_id: int, path: str, /, *, identity: Identity | None = None, **arguments: Any
    ) -> Any:
        """Run a public mutation as a request of a session: one that comes again is not applied twice."""
        function, raw = self._prepare("mutation", path, arguments)
        work = self.backend.session_mutation(path, raw, identity, session_id, request_id)
        outcome = await self._unless_failed(work)
        return value_of(function, Outcome(outcome.value, outcome.failure, outcome.log_lines))

    async def action(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Any:
        """Run an action to its end."""
        function, raw = self._prepare("action", path, arguments)
        outcome = await self._unless_failed(
            self.backend.http_action(path, raw, identity, is_admin=function.is_internal)
        )
        return value_of(function, Outcome(outcome.value, outcome.failure, outcome.log_lines))

    def subscribe(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> "ResultStream":
        """The results of a query from now on: the newest one, then each that differs from the one before.

        A subscriber that is slower than the changes skips to the newest result.
        """
        function, raw = self._prepare("query", path, arguments)
        self.registry.public(path, "query")  # internal ones have no subscribers
        return ResultStream(self.backend, self._ended, function, path, raw, identity)

    @property
    def registry(self) -> Registry:
        """The app's functions."""
        return self._runner.registry

    async def reload(self) -> None:
        """Load the app's code again; data and subscribers stay, and subscribers get what the new code returns.

        Raises DeveloperError, and then the old code goes on (invariant 3).
        """
        app = load_app(
            self._app.directory, self.config.limits, self.config.rate_limits, denied=self.config.denied_tables
        )
        settings = make_settings(app.registry.settings, read_settings(app.directory, self._given_settings))
        async with self._committer.between_groups() as writer:
            self.schema_changes = apply_schema(writer, app.schema)
            self._snapshots.advance()
            catalog = _catalog_of(app, self._runner)
            self._app, self._runner.registry, self._runner.settings = app, app.registry, settings
            self._committer.catalog = catalog
            self._publisher.reload(catalog)
            forget_scan_statements()
            forget_total_statements()
        await self._scheduler.sync_crons()
        self.events.emit(CodeReloaded(len(app.registry.by_path)))

    async def wait_until_idle(self) -> None:
        """Until nothing is under way, for tests and scripts. Raises what ended the engine, if it has ended."""
        while self.under_way:  # noqa: ASYNC110 - it asks parts that know nothing of each other
            await asyncio.sleep(0)

    @property
    def under_way(self) -> list[str]:
        """What is being done: "mutations", "results", "jobs", "actions", "files". What waits for its time is not.

        Raises what ended the engine, if it has ended.
        """
        if self._ended.done():
            raise self._ended.result()
        is_idle_by_name = {
            "mutations": self._committer.is_idle,
            "results": self._publisher.is_idle,
            "jobs": self._scheduler.is_idle,
            "actions": self.backend.is_idle,
            "files": self.files.is_idle,
        }
        return [name for name, is_idle in is_idle_by_name.items() if not is_idle]

    def abandon(self) -> None:
        """Die as a process does, as far as a part of one can: nothing more is run, written or answered. For tests.

        A restart would find what is on disk now. Leaving `open` cleans up.
        """
        self._end(EngineClosed("the engine has died."))
        self._commits.cancel()

    def _prepare(self, kind: FunctionKind, path: str, arguments: dict[str, Any]) -> tuple[Function, bytes]:
        """The function, internal ones too (the caller is in this process), and its arguments in wire form."""
        call = self._runner.call_of(path, (kind,), arguments)
        return call.function, call.function.signature.to_wire_bytes(call.arguments)

    async def _unless_failed(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of some work, unless the engine ends first: what waits for a commit would wait for ever.

        The work is cancelled then as `asyncio.timeout` does it; of a mutation, that is only the waiting. (Waiting with
        a task of its own for each call, and its arguments as JSON: 1.2 × the instructions of a small mutation.)
        """
        if self._ended.done():
            work.close()
            raise self._ended.result()
        call, task = object(), asyncio.current_task()
        assert task is not None
        self._callers[call], cancel_count = task, task.cancelling()
        try:
            return await work
        except asyncio.CancelledError as error:
            # `_end` has cancelled it, and nobody else
            if call not in self._callers and task.uncancel() <= cancel_count:
                raise self._ended.result() from error
            raise
        finally:
            self._callers.pop(call, None)

    # -- the flow of a commit

    async def _publish(self, group: Group) -> None:
        has_committed = group.ts > self._publisher.ts
        if has_committed:
            ts = self._snapshots.advance()
            self._publisher.kept.follow(group.write_set)
            assert ts == group.ts, "readers show exactly what was committed"
        for submission, settled in group.settled:
            try:
                submission.settle(settled)
            except Exception as error:  # noqa: BLE001 - a door's own bug must not cost the others their answers
                context = {"message": "a mutation was committed, and telling so failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
        if not has_committed:
            return
        writers = [
            (submission.function, settled.write_set)
            for submission, settled in group.settled
            if settled.write_set is not None
        ]
        await self._publisher.publish(group.ts, group.write_set, writers)
        self._scheduler.committed(group.write_set)
        self._disconnects.committed(group.write_set)
        self.files.committed(group.write_set)
        if self.events.listeners:
            self.events.emit(Committed(group.ts, len(group.settled), len(group.write_set)))

    def _advance_time(self) -> bool:
        """Commit nothing, for a timestamp: time alone has changed what queries return."""

        def execute(transaction: WriteTransaction) -> Execution:
            transaction.has_hidden_writes = True
            return Execution(b"null", None)

        try:
            self._committer.submit(Submission(execute, lambda settled: None))
        except (Overloaded, EngineClosed):
            return False
        return True

    def _refresh(self) -> None:
        self._snapshots.advance()

    def _read(self) -> ReadTransaction:
        transaction = ReadTransaction(self._snapshots.reader, self._publisher.catalog, self.config.limits)
        transaction.lift_limits()
        return transaction

    def _tell_short(self, is_short: bool) -> None:
        if self.events.listeners:
            self.events.emit(RoomEnded() if is_short else RoomReturned())

    def _fail(self, error: InternalError) -> None:
        if not self.failed.done():
            self.failed.set_result(error)
        self._end(error)

    def _end(self, reason: EngineError) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)
            callers, self._callers = self._callers, {}
            for task in set(callers.values()):  # one may wait inside of another call of its own
                task.cancel()

    async def _stop(self) -> None:
        self._disconnects.close()
        await self._scheduler.close()
        await self.backend.close()
        await self.files.close()
        self._committer.close()
        await asyncio.wait((self._commits,))
        self._end(EngineClosed("the engine was closed."))
        await self._publisher.close()


class ResultStream:
    """The results of one subscription: `async with engine.subscribe(…) as results: async for result in results`."""

    def __init__(
        self,
        backend: EngineBackend,
        ended: "asyncio.Future[EngineError]",
        function: Function,
        path: str,
        arguments: bytes,
        identity: Identity | None,
    ) -> None:
        self._backend, self._ended, self._function = backend, ended, function
        self._path, self._arguments, self._identity = path, arguments, identity
        self._ready = asyncio.Event()
        self._view: View | None = None

    async def __aenter__(self) -> "ResultStream":
        self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Ask the query."""
        self._view = self._backend.make_view(self._ready.set)
        self._view.set_identity(self._identity)
        self._view.add(0, self._path, self._arguments, None)
        self._ended.add_done_callback(self._wake)

    def close(self) -> None:
        """Ask it no more; closing twice is no error."""
        self._ended.remove_done_callback(self._wake)
        if self._view is not None:
            self._view.close()
            self._view = None

    def __aiter__(self) -> "ResultStream":
        return self

    async def __anext__(self) -> Any:
        """The next result that differs. Raises what the query raises; the stream goes on after that."""
        while (result := self.take()) is None:
            await self._ready.wait()
        return self.value_of(result)

    def take(self) -> Result | None:
        """The newest result if it differs from the one taken before; None if it does not, or is being made."""
        if self._view is None:
            raise EngineClosed("the subscription is not open: `async with engine.subscribe(…) as results`.")
        if self._ended.done():
            raise self._ended.result()
        self._ready.clear()
        change = self._view.take()
        return change.results.get(0) if change is not None else None

    @property
    def is_ready(self) -> bool:
        """Whether `take` may have something."""
        return self._ready.is_set()

    def value_of(self, result: Result) -> Any:
        """The result as a Python value. Raises what the query raised."""
        return _value_of_result(self._function, result)

    def _wake(self, _: object) -> None:
        self._ready.set()


def _catalog_of(app: App, runner: Runner) -> Catalog:
    codecs: list[RowCodec[Any]] = [RowCodec(table) for table in app.schema.tables_by_name.values()]
    triggered = app.registry.triggers
    return Catalog(codecs, on_delete={StoredFile: loosen}, triggered=triggered, fire=runner.triggers.fire)


def _value_of_result(function: Function, result: Result) -> Any:
    return value_of(function, Outcome(result.value, result.failure, result.log_lines))
