"""Rate limits: exact to the millisecond, spent by what is committed and by nothing else, and nobody is woken."""

import asyncio
from collections.abc import Iterable
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Config, load_config
from engine.engine import Engine
from engine.errors import ConfigError, FunctionMisuse, LimitExceeded, RateLimited, RegistryError
from engine.events import Committed, FunctionFaulted
from engine.functions.rate_limits import RateLimit, RateLimitUse, RateOverride, fixed_window, token_bucket
from engine.sync.backend import MutationOutcome
from engine.testing import ManualClock
from tests.functions.apps import UNHURRIED, OpenApp, open_app, write_app

FUNCTIONS = """
from datetime import timedelta

SEND = token_bucket("chat:send", count=5, per=timedelta(seconds=10))
SIGN_UP = fixed_window("sign_up", count=3, per=timedelta(minutes=1))

@mutation
async def send(ctx, key: str = "maya", cost: int = 1, fail: bool = False) -> None:
    await ctx.limit(SEND, key=key, cost=cost)
    if fail:
        raise ValueError("after all not")

@mutation
async def sign_up(ctx) -> None: await ctx.limit(SIGN_UP)

@mutation
async def write(ctx) -> None:
    await ctx.limit(SEND, key="maya")
    await ctx.db.insert(Item(key="k"))

@query
async def items(ctx) -> int: return await ctx.db.query(Item).count()
"""


# -- the algorithms


class NaiveBucket:
    """Tokens as a fraction, filled up as time goes by."""

    def __init__(self, rate: RateLimit) -> None:
        self.rate, self.tokens, self.at_ms = rate, Fraction(rate.count), 0

    def tokens_at(self, now_ms: int) -> Fraction:
        gained = Fraction((now_ms - self.at_ms) * self.rate.count, self.rate.per_ms)
        return min(Fraction(self.rate.count), self.tokens + gained)

    def has_room(self, now_ms: int, cost: int) -> bool:
        return self.tokens_at(now_ms) >= cost

    def use(self, now_ms: int, cost: int) -> None:
        self.tokens, self.at_ms = self.tokens_at(now_ms) - cost, now_ms


class NaiveWindow:
    """Every use, and when the window that it is in began."""

    def __init__(self, rate: RateLimit) -> None:
        self.rate = rate
        self.uses: list[tuple[int, int]] = []  # when its window began, its cost

    def _began(self, now_ms: int) -> int:
        last = self.uses[-1][0] if self.uses else None
        return now_ms if last is None or now_ms - last >= self.rate.per_ms else last

    def has_room(self, now_ms: int, cost: int) -> bool:
        began = self._began(now_ms)
        return sum(used for at, used in self.uses if at == began) + cost <= self.rate.count

    def use(self, now_ms: int, cost: int) -> None:
        self.uses.append((self._began(now_ms), cost))


NAIVE: dict[str, type[NaiveBucket] | type[NaiveWindow]] = {"token_bucket": NaiveBucket, "fixed_window": NaiveWindow}
rates = st.builds(RateLimit, st.just("r"), st.sampled_from(sorted(NAIVE)), st.integers(1, 7), st.integers(1, 50))
big_rates = st.builds(
    RateLimit, st.just("r"), st.sampled_from(sorted(NAIVE)), st.integers(1, 10**8), st.integers(1, 31 * 10**9)
)


@given(st.data(), rates | big_rates)
def test_a_limit_lets_through_exactly_what_a_naive_count_does(data: st.DataObject, rate: RateLimit) -> None:
    naive = NAIVE[rate.kind](rate)
    found, now = None, 1_790_812_800_000
    spans = st.integers(0, 3) | st.integers(0, 2 * rate.per_ms)
    for _ in range(data.draw(st.integers(1, 12))):
        now += data.draw(spans)
        cost = data.draw(st.integers(1, rate.count))
        use = rate.use(found, "k", cost, now)
        assert isinstance(use, RateLimitUse) == naive.has_room(now, cost)
        if isinstance(use, RateLimitUse):
            naive.use(now, cost)
            found = use
            assert 0 < use.used <= rate.count * rate.per_ms < 2**63, "it fits its column"
        else:
            assert use > 0
            assert naive.has_room(now + use, cost), "who waits that long gets through"
            assert not naive.has_room(now + use - 1, cost), "and it is no longer than needed"


@given(st.data(), rates)
def test_a_row_that_says_nothing_any_more_can_go(data: st.DataObject, rate: RateLimit) -> None:
    found, now = None, 0
    for _ in range(data.draw(st.integers(1, 6))):
        now += data.draw(st.integers(0, 5))
        use = rate.use(found, "k", data.draw(st.integers(1, rate.count)), now)
        found = use if isinstance(use, RateLimitUse) else found
    assert found is not None
    for later in (0, data.draw(st.integers(0, 100))):
        assert rate.use(found, "k", rate.count, found.until + later) == rate.use(
            None, "k", rate.count, found.until + later
        )


@pytest.mark.parametrize(
    ("name", "count", "per", "message"),
    [
        ("", 1, timedelta(1), "a name has 1 to 64"),
        ("chat send", 1, timedelta(1), "a name has 1 to 64"),
        ("x" * 65, 1, timedelta(1), "a name has 1 to 64"),
        (7, 1, timedelta(1), "a name has 1 to 64"),
        ("r", 0, timedelta(1), "count=0; a whole number from 1"),
        ("r", 1.5, timedelta(1), "count=1.5; a whole number"),
        ("r", True, timedelta(1), "count=True"),
        ("r", 10**9, timedelta(1), "count=1000000000; a whole number from 1 to 100,000,000"),
        ("r", 1, 10, "per=10; a timedelta from 1 ms"),
        ("r", 1, timedelta(0), "a timedelta from 1 ms"),
        ("r", 1, timedelta(days=400), "to 366 days"),
    ],
)
@pytest.mark.parametrize("declare", [token_bucket, fixed_window])
def test_a_declaration_that_cannot_be_is_refused(declare: Any, name: Any, count: Any, per: Any, message: str) -> None:
    with pytest.raises(RegistryError) as refusal:
        declare(name, count=count, per=per)
    assert message in str(refusal.value)


# -- in mutations


async def spend(app: OpenApp, path: str = "m:send", count: int = 1, **arguments: Any) -> None:
    for _ in range(count):
        await app.call(path, **arguments)


def row_count(engine: Engine) -> int:
    ((count,),) = engine.database.writer.fetch_all("SELECT count(*) FROM _rate_limits")
    return int(count)


async def test_a_bucket_fills_up_evenly(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        await spend(app, count=5)
        with pytest.raises(
            RateLimited, match=r"chat:send: 5 in 10,000 ms allowed\. Try again in 2,000 ms\."
        ) as refusal:
            await spend(app)
        assert (refusal.value.name, refusal.value.retry_after_ms) == ("chat:send", 2_000)
        await app.turn(1.998)
        with pytest.raises(RateLimited) as refusal:
            await spend(app)
        await app.turn(refusal.value.retry_after_ms / 1000)
        await spend(app)
        await app.turn(4)
        await spend(app, count=2)
        with pytest.raises(RateLimited):
            await spend(app)


async def test_a_window_begins_with_the_first_use_and_ends_after_its_time(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        await app.turn(17)
        await spend(app, "m:sign_up")
        await app.turn(40)
        await spend(app, "m:sign_up", count=2)
        with pytest.raises(RateLimited) as refusal:
            await spend(app, "m:sign_up")
        assert refusal.value.retry_after_ms == 20_000
        await app.turn(20)
        await spend(app, "m:sign_up", count=3)


async def test_keys_and_limits_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        for key in ("maya", "sam", "", "chat:send", "é👋"):
            await spend(app, count=5, key=key)
            with pytest.raises(RateLimited):
                await spend(app, key=key)
        await spend(app, "m:sign_up", count=3)


async def test_a_use_may_cost_more_than_one(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        await spend(app, cost=3)
        with pytest.raises(RateLimited) as refusal:
            await spend(app, cost=3)
        assert refusal.value.retry_after_ms == 2_000
        await spend(app, cost=2)


async def test_a_mutation_that_fails_has_used_nothing(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        for _ in range(20):
            await app.failure("m:send", fail=True)
        await spend(app, count=5)
        for _ in range(20):
            assert (await app.failure("m:send")).code == "RateLimited"
        await app.turn(2)
        await spend(app)


async def test_a_nested_mutation_that_fails_has_used_nothing_either(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@mutation
async def outer(ctx) -> None:
    for _ in range(9):
        try:
            await ctx.run_mutation(send, fail=True)
        except ValueError:
            pass
    for _ in range(4):
        await ctx.run_mutation(send)
    await ctx.limit(SEND, key="maya")
"""
    )
    async with open_app(tmp_path, functions) as app:
        await app.call("m:outer")
        assert (await app.failure("m:send")).code == "RateLimited"


async def test_what_is_used_wakes_no_query_and_outlives_the_server(tmp_path: Path) -> None:
    clock = ManualClock()
    async with open_app(tmp_path, FUNCTIONS, clock=clock) as app, app.watched("m:items"):
        await spend(app, count=4)
        await app.idle()
        assert app.run_count("m:items") == 0
        assert [event.write_count for event in app.events if isinstance(event, Committed)] == [0] * 4
        await app.call("m:write")
        await app.idle()
        assert app.run_count("m:items") == 1
    async with open_app(tmp_path, clock=clock) as app:
        assert (await app.failure("m:send")).code == "RateLimited"


async def test_a_mutation_that_only_uses_a_limit_is_applied_once_however_often_it_is_sent(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        outcomes: list[MutationOutcome] = []
        for _ in range(5):
            app.engine.backend.start_mutation("m:send", b"{}", None, "session", 1, outcomes.append)
            await app.idle()
        assert [outcome.failure for outcome in outcomes] == [None] * 5
        assert len({outcome.ts for outcome in outcomes}) == 1
        await spend(app, count=4)
        with pytest.raises(RateLimited):
            await spend(app)


async def test_mutations_that_come_at_once_share_what_there_is(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        outcomes = await asyncio.gather(*(app.outcome("m:send") for _ in range(20)))
        assert sum(outcome.failure is None for outcome in outcomes) == 5


@pytest.mark.parametrize("mode", ["development", "production"])
async def test_clients_are_told_when_to_try_again(tmp_path: Path, mode: Any) -> None:
    async with open_app(tmp_path, FUNCTIONS, mode=mode) as app:
        await spend(app, count=5)
        failure = await app.failure("m:send")
        assert failure.code == "RateLimited"
        assert failure.data is not None
        assert msgspec.json.decode(failure.data) == {
            "code": "RateLimited",
            "name": "chat:send",
            "retry_after_ms": 2_000,
        }
        assert "RateLimited: chat:send: 5 in 10,000 ms allowed" in failure.message
        assert not [event for event in app.events if isinstance(event, FunctionFaulted)], "it is no fault"


async def test_rows_that_say_nothing_any_more_go_as_new_ones_come(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        for number in range(30):
            await spend(app, key=f"early {number}")
        assert row_count(app.engine) == 30
        await app.turn(2)  # one token of five: as if never used
        for number in range(16):
            await spend(app, key=f"late {number}")
        assert row_count(app.engine) == 16, "each new one removes two"
        for _ in range(10):
            await app.turn(10)
            for number in range(10):
                await spend(app, key=f"{app.clock.monotonic()} {number}")
        assert row_count(app.engine) <= 32


async def test_rows_that_still_count_do_not_go(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        await spend(app, count=5)
        await app.turn(9)
        await spend(app, count=4)
        for number in range(10):
            await spend(app, key=str(number))
        with pytest.raises(RateLimited):
            await spend(app)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("await ctx.limit(SEND, key='k', cost=0)", FunctionMisuse, "cost=0; 1 to 5 can be had"),
        ("await ctx.limit(SEND, key='k', cost=6)", FunctionMisuse, "cost=6; 1 to 5 can be had"),
        ("await ctx.limit(SEND, key='k', cost=1.0)", FunctionMisuse, "cost=1.0"),
        ("await ctx.limit(SEND, key=7)", FunctionMisuse, "key=7; a str is needed"),
        ("await ctx.limit('chat:send')", FunctionMisuse, "no such rate limit. Declare it once"),
        ("await ctx.limit(token_bucket('x', count=1, per=timedelta(1)))", FunctionMisuse, "no such rate limit"),
        ("await ctx.limit(SEND, key='k' * 257)", LimitExceeded, "257 used, 256 allowed"),
    ],
)
async def test_a_use_that_cannot_be_is_refused(tmp_path: Path, body: str, error: type[Exception], message: str) -> None:
    async with open_app(tmp_path, f"{FUNCTIONS}\n@mutation\nasync def bad(ctx) -> None: {body}\n") as app:
        with pytest.raises(error) as refusal:
            await app.call("m:bad")
        assert message in str(refusal.value)


async def test_a_context_that_is_used_too_late_uses_nothing(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
kept = []
@mutation
async def keep(ctx) -> None: kept.append(ctx)
@mutation
async def late(ctx) -> None: await kept[0].limit(SEND, key="maya")
"""
    )
    async with open_app(tmp_path, functions) as app:
        await app.call("m:keep")
        with pytest.raises(FunctionMisuse, match="after the function had returned"):
            await app.call("m:late")


@pytest.mark.parametrize("kind", ["query", "action"])
async def test_only_mutations_use_limits(tmp_path: Path, kind: str) -> None:
    functions = f"{FUNCTIONS}\n@{kind}\nasync def bad(ctx) -> None: await ctx.limit(SEND)\n"
    async with open_app(tmp_path, functions) as app:
        with pytest.raises(FunctionMisuse, match=r"ctx\.limit is there in mutations only"):
            await app.call("m:bad")


async def test_no_function_reads_what_is_used_as_nobody_would_run_it_again(tmp_path: Path) -> None:
    functions = """
from engine.functions.rate_limits import RateLimitUse
@query
async def bad(ctx) -> int: return await ctx.db.query(RateLimitUse.by_until).count()
"""
    async with open_app(tmp_path, functions) as app:
        with pytest.raises(FunctionMisuse, match="_rate_limits is the engine's own, no function reads it"):
            await app.call("m:bad")


# -- declared, and configured


HELPER = 'from datetime import timedelta\nSEND = token_bucket("chat:send", count=1, per=timedelta(seconds=1))\n'
USER = "from functions._limits import SEND\n@mutation\nasync def send(ctx) -> None: await ctx.limit(SEND)\n"


async def test_modules_share_a_limit_by_importing_it(tmp_path: Path) -> None:
    async with open_app(tmp_path, {"_limits": HELPER, "m": USER, "n": USER}) as app:
        await app.call("m:send")
        with pytest.raises(RateLimited):
            await app.call("n:send")


async def test_two_limits_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="n: there is a rate limit 'chat:send' in m already"):
        async with open_app(tmp_path, {"m": HELPER, "n": HELPER}):
            pass


async def test_a_changed_declaration_holds_from_the_reload_on(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        await spend(app, count=5)
        await app.rewrite(FUNCTIONS.replace("count=5, per=timedelta(seconds=10)", "count=7, per=timedelta(seconds=10)"))
        await spend(app, count=2)
        with pytest.raises(RateLimited, match="7 in 10,000 ms"):
            await spend(app)
        await app.rewrite(FUNCTIONS.replace("count=5, per=timedelta(seconds=10)", "count=1, per=timedelta(seconds=1)"))
        with pytest.raises(RateLimited, match="1 in 1,000 ms") as refusal:
            await spend(app)
        assert refusal.value.retry_after_ms <= 1_000, "seven of five are not more than all"
        await app.turn(refusal.value.retry_after_ms / 1000)
        await spend(app)


def configured(directory: Path, text: str) -> Config:
    (directory / "engine.toml").write_text(text)
    return load_config(directory)


async def opened_with(directory: Path, text: str) -> Iterable[str]:
    """How many sends in a row go through, and when the next one would: of an app with this configuration."""
    write_app(directory / "app", FUNCTIONS)
    config = msgspec.structs.replace(configured(directory / "app", text), limits=UNHURRIED)
    async with Engine.open(directory / "app", ":memory:", config=config, clock=ManualClock()) as engine:
        for count in range(1_000):
            try:
                await engine.mutation("m:send")
            except RateLimited as error:
                return f"{count} sends", f"{error.retry_after_ms} ms"
    raise AssertionError("no limit")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("5 sends", "2000 ms")),
        ('[rate_limits."chat:send"]\ncount = 10', ("10 sends", "1000 ms")),
        ('[rate_limits."chat:send"]\nseconds = 2.5', ("5 sends", "500 ms")),
        ('[rate_limits."chat:send"]\ncount = 2\nseconds = 60', ("2 sends", "30000 ms")),
        ("[rate_limits.sign_up]\ncount = 1", ("5 sends", "2000 ms")),
    ],
)
async def test_what_the_configuration_says_stands_over_the_declaration(
    tmp_path: Path, text: str, expected: tuple[str, str]
) -> None:
    assert await opened_with(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[rate_limits."chat:sned"]\ncount = 1', 'rate_limits."chat:sned": no module of functions/ declares it; did '),
        ("[rate_limits.zzz]\ncount = 1", "declared are: chat:send, sign_up"),
        ('[rate_limits."chat:send"]\ncount = 0', "count=0; a whole number from 1"),
        ('[rate_limits."chat:send"]\nseconds = 0', "a timedelta from 1 ms"),
        ('[rate_limits."chat:send"]\nseconds = 1e300', "rate_limits"),
        ('[rate_limits."chat:send"]\nseconds = nan', "rate_limits"),
        ('[rate_limits."chat:send"]\nminutes = 1', "rate_limits.chat:send.minutes: unknown key"),
        ('[rate_limits."chat:send"]\ncount = "5"', "expected int"),
        ('rate_limits = "all"', "expected a table"),
    ],
)
async def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        await opened_with(tmp_path, text)
    assert message in str(refusal.value)


async def test_the_configuration_holds_over_a_reload_too(tmp_path: Path) -> None:
    directory = write_app(tmp_path / "app", FUNCTIONS)
    config = Config(limits=UNHURRIED, rate_limits={"chat:send": RateOverride(count=1)})
    async with Engine.open(directory, ":memory:", config=config, clock=ManualClock()) as engine:
        await engine.reload()
        await engine.mutation("m:send")
        with pytest.raises(RateLimited):
            await engine.mutation("m:send")
        write_app(directory, FUNCTIONS.replace('"chat:send"', '"chat:say"'))
        with pytest.raises(ConfigError, match="did you mean 'chat:say'"):
            await engine.reload()
        with pytest.raises(RateLimited):  # the old code goes on
            await engine.mutation("m:send")
