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
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from engine.auth.admin import AdminKeys, Authenticator
from engine.auth.providers import AuthProvider
from engine.auth.tokens import TokenVerifier
from engine.backend import EngineBackend
from engine.clock import Clock, SystemClock
from engine.config import Config, load_config
from engine.errors import EngineClosed, EngineError, InternalError
from engine.events import CodeReloaded, Committed, Events
from engine.functions.calls import Outcome, value_of
from engine.functions.loader import App, load_app
from engine.functions.registry import Function, FunctionKind, Registry
from engine.functions.runner import Runner
from engine.functions.scheduler import JobScheduler
from engine.identity import Identity
from engine.live.live_query import Result
from engine.live.publisher import Publisher
from engine.live.view import View
from engine.storage.connections import Database
from engine.storage.ddl import apply_schema
from engine.storage.rows import RowCodec
from engine.transaction.committer import Committer, Group
from engine.transaction.ledger import Ledger
from engine.transaction.snapshots import Snapshots
from engine.transaction.transaction import Catalog, ReadTransaction


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
    ) -> None:
        self.config, self.clock, self.events, self.database = config, clock, events, database
        self._app = app
        self.failed: asyncio.Future[InternalError] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()  # failed or closed: why
        limits = config.limits
        self.schema_changes = apply_schema(database.writer, app.schema)
        """What opening changed in the database, in words."""
        catalog = _catalog_of(app)
        self._ledger = Ledger.open(database.writer, limits)
        self._snapshots = Snapshots(database, limits, clock)
        self._runner = Runner(
            app.registry,
            limits,
            clock,
            events,
            cursor_secret=database.read_secret(),
            is_production=config.mode == "production",
        )
        self._publisher = Publisher(self._runner, self._snapshots, catalog, clock, events, self._fail)
        self._committer = Committer(
            database.writer, catalog, self._ledger, limits, clock, self._publish, self._refresh, self._fail
        )
        self._tokens = TokenVerifier((*config.providers, *providers), clock)
        digests = (*config.admin_key_digests, *admin_keys)
        self.backend = EngineBackend(
            self._runner,
            self._committer,
            self._publisher,
            self._snapshots,
            self._ledger,
            Authenticator(self._tokens, AdminKeys(digests)),
            clock,
        )
        self._scheduler = JobScheduler(self._runner, self._committer, self.backend, self._read, clock, events)

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
    ) -> "AsyncIterator[Engine]":
        """Open an app directory on a database file, which is made if it is not there (":memory:" for a temporary one).

        `config` stands for the app's `engine.toml`; `mode` ("development" or "production") over either. `providers` and
        `admin_key_digests` are accepted besides those of the config. Raises SchemaError, RegistryError, ConfigError.
        """
        directory = Path(app)
        if config is None:
            config = load_config(directory, {"mode": mode} if mode is not None else None)
        clock = clock or SystemClock()
        loaded = load_app(directory, config.limits)
        async with AsyncExitStack() as stack:
            opened = Database.open(database, config.limits, entropy=clock.entropy)
            stack.callback(opened.close)
            engine = cls(loaded, config, opened, clock, events or Events(), providers, admin_key_digests)
            stack.callback(engine._runner.close)
            stack.callback(engine._tokens.close)
            run = asyncio.create_task(engine._committer.run())
            stack.push_async_callback(engine._stop, run)
            await engine._unless_failed(engine._scheduler.start())
            yield engine

    # -- calling functions

    async def query(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Any:
        """What the query returns now, as Python values. Raises AppError and the errors of `errors.py`."""
        function, raw = self._prepare("query", path, arguments)
        result = await self._unless_failed(self.backend.http_query(path, raw, identity, is_admin=function.is_internal))
        return _value_of_result(function, result)

    async def mutation(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Any:
        """Run a mutation; it is durable when this returns."""
        function, raw = self._prepare("mutation", path, arguments)
        outcome = await self._unless_failed(
            self.backend.http_mutation(path, raw, identity, is_admin=function.is_internal)
        )
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
        app = load_app(self._app.directory, self.config.limits)
        async with self._committer.between_groups() as writer:
            self.schema_changes = apply_schema(writer, app.schema)
            self._snapshots.advance()
            catalog = _catalog_of(app)
            self._app, self._runner.registry = app, app.registry
            self._committer.catalog = catalog
            self._publisher.reload(catalog)
        await self._scheduler.sync_crons()
        self.events.emit(CodeReloaded(len(app.registry.by_path)))

    async def wait_until_idle(self) -> None:
        """Until nothing is under way: no mutation, no long query, no due job. For tests and scripts."""
        while not self._is_idle():  # noqa: ASYNC110 - it asks three parts that know nothing of each other
            await asyncio.sleep(0)

    def _is_idle(self) -> bool:
        return self._committer.is_idle and self._publisher.is_idle and self._scheduler.is_idle

    def _prepare(self, kind: FunctionKind, path: str, arguments: dict[str, Any]) -> tuple[Function, bytes]:
        """The function, internal ones too (the caller is in this process), and its arguments in wire form."""
        call = self._runner.call_of(path, (kind,), arguments)
        return call.function, call.function.signature.to_wire_bytes(call.arguments)

    async def _unless_failed(self, work: Any) -> Any:
        """The result of some work, unless the engine ends first: what waits for a commit would wait for ever."""
        if self._ended.done():
            work.close()
            raise self._ended.result()
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._ended.result()
            return task.result()
        finally:
            task.cancel()  # of a mutation only the waiting

    # -- the flow of a commit

    async def _publish(self, group: Group) -> None:
        has_committed = group.ts > self._publisher.ts
        if has_committed:
            ts = self._snapshots.advance()
            assert ts == group.ts, "readers show exactly what was committed"
        for submission, settled in group.settled:
            try:
                submission.settle(settled)
            except Exception as error:  # noqa: BLE001 - a door's own bug must not cost the others their answers
                context = {"message": "a mutation was committed, and telling so failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
        if not has_committed:
            return
        await self._publisher.publish(group.ts, group.write_set)
        self._scheduler.committed(group.write_set)
        if self.events.listeners:
            self.events.emit(Committed(group.ts, len(group.settled), len(group.write_set)))

    def _refresh(self) -> None:
        self._snapshots.advance()

    def _read(self) -> ReadTransaction:
        transaction = ReadTransaction(self._snapshots.reader, self._publisher.catalog, self.config.limits)
        transaction.lift_limits()
        return transaction

    def _fail(self, error: InternalError) -> None:
        if not self.failed.done():
            self.failed.set_result(error)
        self._end(error)

    def _end(self, reason: EngineError) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)

    async def _stop(self, run: "asyncio.Task[None]") -> None:
        await self._scheduler.close()
        await self.backend.close()
        self._committer.close()
        await run
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
        self._view = self._backend.make_view(self._ready.set)
        self._view.set_identity(self._identity)
        self._view.add(0, self._path, self._arguments, None)
        self._ended.add_done_callback(self._wake)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended.remove_done_callback(self._wake)
        if self._view is not None:
            self._view.close()
            self._view = None

    def __aiter__(self) -> "ResultStream":
        return self

    async def __anext__(self) -> Any:
        """The next result that differs. Raises what the query raises; the stream goes on after that."""
        while self._view is not None:
            if self._ended.done():
                raise self._ended.result()
            self._ready.clear()
            change = self._view.take()
            if change is not None and 0 in change.results:
                return _value_of_result(self._function, change.results[0])
            await self._ready.wait()
        raise EngineClosed("the subscription is not open: `async with engine.subscribe(…) as results`.")

    def _wake(self, _: object) -> None:
        self._ready.set()


def _catalog_of(app: App) -> Catalog:
    return Catalog([RowCodec(table) for table in app.schema.tables_by_name.values()])


def _value_of_result(function: Function, result: Result) -> Any:
    return value_of(function, Outcome(result.value, result.failure, result.log_lines))
