"""Rate limits: how often something may be done, counted for each key in the commit of what was done.

    SEND = token_bucket("chat:send", count=5, per=timedelta(seconds=10))

    @mutation
    async def send(ctx: MutationCtx, …) -> None:
        await ctx.limit(SEND, key=user.id)

    token bucket   holds `count` tokens and fills up evenly, from empty to full in `per`
    fixed window   begins with the first use after the one before has ended; `count` uses until `per` is over

Invariants
  1. A use is written in the savepoint of its mutation: one that fails, for whatever reason, has used nothing.
  2. Counting is exact: in integers, and in whole milliseconds of `ctx.now`. Whoever waits for `retry_after_ms` gets
     through, unless somebody else with the same key came first.
  3. Nobody is woken: the table is hidden.
  4. A new row removes up to two that say nothing any more, so there are never more rows than keys were in use at one
     time, and two.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING, Literal, assert_never

import msgspec

from engine.errors import ConfigError, FunctionMisuse, LimitExceeded, RateLimited, RegistryError
from engine.schema import Table, index, unique
from engine.transaction.transaction import WriteTransaction

if TYPE_CHECKING:
    from engine.functions.run import Run
    from engine.functions.runner import Runner

_NAME = re.compile(r"[A-Za-z0-9_:/-]{1,64}")
_COUNT_MAX = 100_000_000  # with the longest time it still fits 64 bits
_PER_MAX = timedelta(days=366)


class RateLimitUse(Table, name="_rate_limits", system=True, hidden=True):
    """What is used of one rate limit by one key."""

    name: str
    key: str
    used: int  # at `since`, in tokens × `per_ms`: a bucket gets `count` of it back in each ms
    since: int  # ms since the epoch: of the newest use of a bucket, of the beginning of a window
    until: int  # ms since the epoch: from then on it is as if never used
    by_name_key = unique("name", "key")
    by_until = index("until")


class RateLimit(msgspec.Struct, frozen=True):
    """One declared limit; made by `token_bucket` and `fixed_window`."""

    name: str
    kind: Literal["token_bucket", "fixed_window"]
    count: int
    per_ms: int

    def use(self, found: RateLimitUse | None, key: str, cost: int, now_ms: int) -> RateLimitUse | int:
        """What is used when `cost` more is; or how many ms from now there will be room for that."""
        match self.kind:
            case "token_bucket":
                return self._use_bucket(found, key, cost, now_ms)
            case "fixed_window":
                return self._use_window(found, key, cost, now_ms)
            case _:
                assert_never(self.kind)

    def _use_bucket(self, found: RateLimitUse | None, key: str, cost: int, now_ms: int) -> RateLimitUse | int:
        full = self.count * self.per_ms
        # more than full: the limit was another one then
        before = 0 if found is None else max(0, min(full, found.used) - (now_ms - found.since) * self.count)
        used = before + cost * self.per_ms
        if used > full:
            return -((full - used) // self.count)  # rounded up
        until = now_ms - (-used // self.count)
        return RateLimitUse(name=self.name, key=key, used=used, since=now_ms, until=until)

    def _use_window(self, found: RateLimitUse | None, key: str, cost: int, now_ms: int) -> RateLimitUse | int:
        if found is None or now_ms >= found.since + self.per_ms:
            since, before = now_ms, 0
        else:
            since, before = found.since, found.used
        until, used = since + self.per_ms, before + cost * self.per_ms
        if used > self.count * self.per_ms:
            return until - now_ms
        return RateLimitUse(name=self.name, key=key, used=used, since=since, until=until)


def token_bucket(name: str, *, count: int, per: timedelta) -> RateLimit:
    """At most `count` at once, and over time `count` in each `per`: `token_bucket("chat:send", count=5, per=…)`."""
    return _declare(name, "token_bucket", count, per)


def fixed_window(name: str, *, count: int, per: timedelta) -> RateLimit:
    """At most `count` from the first use on, until `per` is over; then a new window begins with the next use."""
    return _declare(name, "fixed_window", count, per)


def _declare(name: str, kind: Literal["token_bucket", "fixed_window"], count: int, per: timedelta) -> RateLimit:
    where = f"{kind}({name!r})"
    if type(name) is not str or _NAME.fullmatch(name) is None:
        raise RegistryError(f"{where}: a name has 1 to 64 ASCII letters, digits and any of `_ : / -`.")
    if type(count) is not int or not 1 <= count <= _COUNT_MAX:
        raise RegistryError(f"{where}: count={count!r}; a whole number from 1 to {_COUNT_MAX:,} is needed.")
    if type(per) is not timedelta or not timedelta(milliseconds=1) <= per <= _PER_MAX:
        raise RegistryError(f"{where}: per={per!r}; a timedelta from 1 ms to 366 days is needed.")
    return RateLimit(name, kind, count, round(per / timedelta(milliseconds=1)))


class RateOverride(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[rate_limits."chat:send"]` of `engine.toml`: what it says stands over what is declared."""

    count: int | None = None
    seconds: float | None = None


def rate_limits_of(
    modules: Mapping[str, ModuleType], overrides: Mapping[str, RateOverride] | None = None
) -> list[RateLimit]:
    """The rate limits of the app's modules, as configured. RegistryError for two of one name."""
    declared: dict[str, tuple[RateLimit, str]] = {}
    for module_path, module in modules.items():
        for value in vars(module).values():
            if isinstance(value, RateLimit):
                first, where = declared.setdefault(value.name, (value, module_path))
                if first is not value:  # else a module that imports it
                    raise RegistryError(
                        f"{module_path}: there is a rate limit {value.name!r} in {where} already. "
                        "Import that one, or give this one another name."
                    )
    return list(_overridden([limit for limit, _ in declared.values()], overrides or {}))


def _overridden(limits: Iterable[RateLimit], overrides: Mapping[str, RateOverride]) -> Iterable[RateLimit]:
    by_name = {limit.name: limit for limit in limits}
    for name, override in overrides.items():
        where = f'rate_limits."{name}"'
        if name not in by_name:
            near = get_close_matches(name, by_name, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"declared are: {', '.join(by_name) or 'none'}"
            raise ConfigError(f"{where}: no module of functions/ declares it; {hint}")
        declared = by_name[name]
        count = declared.count if override.count is None else override.count
        seconds = declared.per_ms / 1000 if override.seconds is None else override.seconds
        try:
            by_name[name] = _declare(name, declared.kind, count, timedelta(seconds=seconds))
        except (RegistryError, OverflowError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
    return by_name.values()


class Limiter:
    """`ctx.limit` of one mutation."""

    def __init__(self, runner: "Runner", run: "Run", transaction: WriteTransaction) -> None:
        self._runner, self._run, self._transaction = runner, run, transaction

    def use(self, rate: RateLimit, key: str, cost: int) -> None:
        """Use `cost` of what the key has, or raise RateLimited."""
        self._run.check_open()
        rate = self._checked(rate, key, cost)
        transaction = self._transaction
        now_ms = int(transaction.now)
        rows = transaction.find(RateLimitUse, "by_name_key", rate.name, key)
        found = rows[0] if rows else None
        use = rate.use(found, key, cost, now_ms)
        if isinstance(use, int):
            raise RateLimited(rate.name, count=rate.count, per_ms=rate.per_ms, retry_after_ms=use)
        if found is not None:
            transaction.replace(found.id, use)
            return
        for old in transaction.find(RateLimitUse, "by_until", limit=2):
            if old.until <= now_ms:
                transaction.delete(old.id)  # invariant 4
        transaction.insert(use)

    def _checked(self, rate: RateLimit, key: str, cost: int) -> RateLimit:
        """The limit as it is configured."""
        path, key_length_max = self._run.function.path, self._run.limits.rate_limit_key_length_max
        found = self._runner.registry.rate_limits.get(rate.name) if type(rate) is RateLimit else None
        if found is None:
            raise FunctionMisuse(
                f"{path}: ctx.limit({rate!r}): no such rate limit. Declare it once, at the top of a module of "
                'functions/: SEND = token_bucket("chat:send", count=5, per=timedelta(seconds=10)).'
            )
        if type(key) is not str:
            raise FunctionMisuse(f"{path}: ctx.limit: key={key!r}; a str is needed.")
        if len(key) > key_length_max:
            raise LimitExceeded(
                f"characters of a key of the rate limit {rate.name}",
                used=len(key),
                allowed=key_length_max,
                remedy="Use a shorter key (an id, a digest), or raise limits.rate_limit_key_length_max.",
            )
        if type(cost) is not int or not 1 <= cost <= found.count:
            raise FunctionMisuse(f"{path}: ctx.limit({rate.name!r}): cost={cost!r}; 1 to {found.count:,} can be had.")
        return found
