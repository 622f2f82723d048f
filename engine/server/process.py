"""One serving process: from an app directory to an address, and to its end.

    starting ──> serving ──SIGTERM, SIGINT──> stopping: nobody is taken in, what was accepted is answered ──> ended
                    │                             └─ a second signal: ended at once
                    └─ the engine failed: ended at once

Invariants
  1. While it serves, `DATABASE.lock` says where, with a key that lives as long as the process; commands act through it.
  2. Other machines reach it only if an admin key is configured.
  3. When storage is in an unknown state nothing more is done, not even closing it (closing would write): the process
     ends, and the next one finds what was committed (`design.md`, "When a statement or the commit fails").
"""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from engine.auth.admin import digest_of, make_admin_key
from engine.auth.providers import AuthProvider
from engine.clock import Clock
from engine.config import Config
from engine.engine import Engine
from engine.errors import ConfigError, InternalError, Overloaded
from engine.events import Events
from engine.observe.log import log_events
from engine.observe.profile import profile_text, recording
from engine.server.app import serving
from engine.server.development import Routes
from engine.storage.connections import sqlite_warning
from engine.storage.lock import lock_holder

T = TypeVar("T")

_ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - listened on → where this machine finds it
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PROFILE_VARIABLE = "ENGINE_PROFILE"
_log = logging.getLogger("engine")


@asynccontextmanager
async def serving_process(
    app: Path,
    database: Path,
    config: Config,
    clock: Clock,
    *,
    providers: Sequence[AuthProvider] = (),
    extra_routes: Routes = (),
    events: Events | None = None,
    repeats_queries: bool = False,
) -> AsyncIterator[tuple[Engine, str]]:
    """The engine and the address where it serves; stops gracefully on the way out.

    Raises ConfigError and SchemaError before anything is changed, Overloaded if database or port are taken.
    """
    check_exposure(config)
    check_free(database)
    key = make_admin_key(clock)
    async with (
        Engine.open(
            app,
            database,
            config=config,
            clock=clock,
            events=events,
            providers=tuple(providers),
            admin_key_digests=(digest_of(key),),
            repeats_queries=repeats_queries,
        ) as engine,
        AsyncExitStack() as stack,
    ):
        log_events(engine.events)
        _collect_garbage_rarely()
        if (warning := sqlite_warning()) is not None:
            _log.warning(warning)
        for change in engine.schema_changes:
            _log.info("schema: %s", change)
        try:
            address = await stack.enter_async_context(
                serving(engine, config.host, config.port, extra_routes=extra_routes)
            )
        except OSError as cause:
            raise Overloaded(f"{config.host}:{config.port} cannot be used: {cause.strerror or cause}.") from cause
        address = local_address(address)
        engine.database.announce(address=address, key=key)  # 1
        if config.public_url is None:
            engine.files.addresses.base = address
        stack.callback(engine.database.announce, address=None, key=None)
        if os.environ.get(_PROFILE_VARIABLE, "0") != "0":
            stack.enter_context(_profiled())
        yield engine, address


@contextmanager
def _profiled() -> Iterator[None]:
    """Tell at the end where the time went."""
    with recording() as recorded:
        yield
    sys.stderr.write(f"{profile_text(recorded.profile())}\n")


def _collect_garbage_rarely() -> None:
    """Keep the collector from stopping everybody: a look at all objects of 1,000 sessions takes 60 ms.

    What is there after the start stays for good, so it need not be looked at; what comes later is freed by reference
    counts but for few cycles, so it is looked at less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)


def check_exposure(config: Config) -> None:
    """Refuses what an operator would not want by mistake (2), and warns of what he may."""
    if not config.is_public:
        return
    if not config.admin_key_digests:
        raise ConfigError(
            f"host = {config.host!r}: other machines can reach it, and there is no [admin] key_sha256. "
            f"Make one with `engine admin-key`, or listen on 127.0.0.1 behind a proxy."
        )
    if not config.allowed_origins:
        _log.warning("any web page may connect: set allowed_origins in engine.toml to those of your app")
    if config.public_url is None:
        _log.warning("addresses of uploaded files will name this machine: set public_url to where clients reach it")


def check_free(database: Path) -> None:
    """Refuses a database that another process has open."""
    holder = lock_holder(database)
    if holder is not None:
        raise Overloaded(
            f"{database} is in use by process {holder.pid or '(starting)'}"
            f"{'' if holder.address is None else f', which serves at {holder.address}'}. "
            f"Stop that process, or use another --database."
        )


def local_address(address: str) -> str:
    """The address as this machine reaches it."""
    for any_host, host in _ANY_HOSTS.items():
        address = address.replace(f"//{any_host}:", f"//{host}:")
    return address


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGTERM or SIGINT sets; the second one ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def receive(number: signal.Signals) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _log.info("%s: stopping; once more ends it at once", number.name)
        stop.set()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, receive, number)
    try:
        yield stop
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)


def end_on_failure(engine: Engine, exit_code_of: Callable[[InternalError], int]) -> None:
    """If the engine fails, also while it stops, the process ends here and now (3)."""

    def end(failed: "asyncio.Future[InternalError]") -> None:
        error = failed.result()
        _log.critical("the process ends: %s", error, exc_info=error)
        logging.shutdown()
        os._exit(exit_code_of(error))

    engine.failed.add_done_callback(end)
