"""What a soak is, what it found, and whether that is flat enough.

The bounds are those of `spec/reliability.md` (i) over its 30 minutes; a short soak has room for what warms up.
"""

import msgspec

from engine.auth.tokens import LEEWAY_SECONDS
from tests.auth.issuers import AUDIENCE, ISSUER

_MIB = 1 << 20
_GROWTH_BYTES_PER_10_MINUTES = _MIB
_LONG_SECONDS = 1_200  # from here on growth is told from noise
_SHORT_NOISE_BYTES = 12 * _MIB  # pools and caches that fill in the first minutes
_END_RATIO_MAX = 1.15
_WAL_BYTES_MAX = 64 * _MIB
_RELOAD_GROWTH_BYTES_MAX = 10 * _MIB
_P99_RATIO_MAX, _P99_SECONDS_MIN = 1.2, 0.02  # below this it is the machine's
_SPARE_COUNT, _SPARE_RATIO = 2, 0.1  # a keep-alive connection of ours; caches that the warm-up has not filled
_SPARE_THREAD_COUNT = 8  # of the pool for plain actions, which grows to what was ever used at once


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How a server is loaded, and for how long."""

    seconds: float
    seed: int = 1
    client_count: int = 200
    stuck_count: int = 4
    mutations_per_second: float = 50
    churn_per_minute: float = 0.1
    reload_seconds: float = 120
    refresh_seconds: float = 60
    paint_seconds: float = 0.5
    sample_seconds: float = 5
    warm_seconds: float = 20
    rest_seconds_max: float = 90
    reload_count: int = 20  # with no other load, at the end
    sweep_seconds: float = 10
    seen_seconds: int = 30  # how long the outcome of a request stays once its client has seen it
    stuck_seconds_max: int = 30
    ping_seconds: int = 15  # with each goes the question which outcomes the client has seen
    broken: str = ""  # of `server.BREAKS`

    @property
    def token_seconds(self) -> int:
        return int(2 * self.refresh_seconds)

    @property
    def configuration(self) -> str:
        """`engine.toml`."""
        return (
            f'[[auth.providers]]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\njwks = "jwks.json"\n'
            f'algorithms = ["EdDSA"]\n[limits]\nledger_seconds_after_seen = {self.seen_seconds}\n'
            f"send_stuck_seconds_max = {self.stuck_seconds_max}\n"
            f"ping_interval_seconds = {self.ping_seconds}\n"
            "disconnect_grace_ms = 1_000\ndisconnect_grace_closed_ms = 500\n"
        )


class Sample(msgspec.Struct, frozen=True):
    """The server at one moment of the load."""

    seconds: float  # since it began
    resident_bytes: int
    wal_bytes: int
    load: float = 0.0  # of the machine, for each core; above 1 somebody waits


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one soak has seen."""

    samples: list[Sample]
    seconds_by_call: list[tuple[float, float]]  # when each began, in seconds since the load did; how long it took
    baseline: dict[str, int]  # what was alive before, with nobody there; by kind
    left: dict[str, int]  # and after
    rows: dict[str, int]  # of the engine's own tables, at the end
    reload_growth_bytes: int
    counts: dict[str, int]  # what was done
    errors: list[str]  # lines of the log


_OF_ASKS = ("engine.functions.outcomes.Call", "engine.functions.arguments.Arguments", "engine.live.live_query.Ask")
_OF_CLASSES = tuple(
    f"engine.schema.declarations.{name}" for name in ("TableMeta", "Index", "IndexDeclaration", "AggregateDeclaration")
)


def slope_per_second(points: list[tuple[float, float]]) -> float:
    """Of the straight line that fits best; 0 for fewer than two points."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def growth_bytes(samples: list[Sample]) -> tuple[float, float]:
    """How much the fit grows over the last two thirds of the time, and how long those are."""
    end = samples[-1].seconds
    late = [(sample.seconds, float(sample.resident_bytes)) for sample in samples if sample.seconds >= end / 3]
    seconds = late[-1][0] - late[0][0]
    return slope_per_second(late) * seconds, seconds


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)] if seconds else 0.0


def faults_of(figures: Figures, plan: Plan) -> list[str]:
    """What is not as it should be, in words; empty: all is well."""
    faults = [*_memory_faults(figures, plan), *left_over(figures.baseline, figures.left, plan)]
    wal_bytes = max(sample.wal_bytes for sample in figures.samples)
    if wal_bytes > _WAL_BYTES_MAX:
        faults.append(f"the WAL had {wal_bytes / _MIB:.0f} MiB")
    if figures.errors:
        faults.append(f"{len(figures.errors)} errors were logged, the first: {figures.errors[0]}")
    # those that a client left behind without having seen them stay for days, and are few
    outcome_count_max = figures.counts["mutations"] * 0.2 + plan.mutations_per_second * (
        2 * plan.seen_seconds + plan.sweep_seconds + 2 * plan.ping_seconds
    )
    if figures.rows["_engine_ledger"] > outcome_count_max:
        faults.append(f"the ledger has {figures.rows['_engine_ledger']:,} rows, {outcome_count_max:,.0f} expected")
    if figures.rows["_scheduled_jobs"] > figures.counts["mutations"] * 0.02 + 200:
        faults.append(f"{figures.rows['_scheduled_jobs']:,} jobs that have ended are still there")
    first, last = (p99(_call_seconds(figures, part)) for part in ((0, 1 / 6), (5 / 6, 1)))
    is_judged = plan.seconds >= _LONG_SECONDS and _mean_load(figures) <= 1  # a busy machine has times of its own
    if is_judged and last > max(_P99_RATIO_MAX * first, first + _P99_SECONDS_MIN):
        faults.append(f"p99 went from {first * 1000:.1f} to {last * 1000:.1f} ms")
    return faults


def left_over(baseline: dict[str, int], counts: dict[str, int], plan: Plan) -> list[str]:
    """What is alive beyond what was at first, and what has a time to live or a bound of its own."""
    token_count = int((plan.client_count / plan.refresh_seconds + 1) * (plan.token_seconds + 2 * LEEWAY_SECONDS))
    spare_by_name = {
        "threads": _SPARE_THREAD_COUNT,
        "engine.auth.tokens._Cached": token_count,
        "engine.auth.tokens.Verified": token_count,
        "engine.identity.Identity": 2 * token_count,
        # the newest asks are kept, 4,096 at most; and how the values of a class are encoded, of 1,024
        **dict.fromkeys(_OF_ASKS, 100),
        "engine.transaction.kept._Scan": 6 * plan.client_count,  # that there can be in this app, where 16,384 may stay
        **dict.fromkeys(_OF_CLASSES, 2 * (plan.reload_count + int(plan.seconds / plan.reload_seconds))),
    }
    return [
        f"{count} {name} are left, {baseline.get(name, 0)} were there before"
        for name, count in counts.items()
        if count > baseline.get(name, 0) * (1 + _SPARE_RATIO) + spare_by_name.get(name, _SPARE_COUNT)
    ]


def report(figures: Figures, plan: Plan) -> str:
    """The figures, a line each."""
    growth, seconds = growth_bytes(figures.samples)
    first, last = (p99(_call_seconds(figures, part)) for part in ((0, 1 / 6), (5 / 6, 1)))
    resident = [sample.resident_bytes / _MIB for sample in figures.samples]
    left = {name: count for name, count in figures.left.items() if count > figures.baseline.get(name, 0)}
    lines = {
        "load": f"{plan.seconds:.0f} s, {plan.client_count} clients, {plan.mutations_per_second:.0f} calls/s, "
        + ", ".join(f"{count:,} {name}" for name, count in figures.counts.items()),
        "resident memory": f"{resident[0]:.1f} MiB at first, {max(resident):.1f} at most, {resident[-1]:.1f} at last",
        "its fit": f"{growth / _MIB:+.2f} MiB over the last {seconds:.0f} s "
        f"({growth / _MIB / max(seconds, 1) * 600:+.2f} MiB per 10 minutes)",
        "20 reloads": f"{figures.reload_growth_bytes / _MIB:+.2f} MiB",
        "p99 of a call": f"{first * 1000:.1f} ms in the first sixth, {last * 1000:.1f} ms in the last, "
        f"on a machine with a load of {_mean_load(figures):.1f} for each core",
        "WAL": f"{max(sample.wal_bytes for sample in figures.samples) / _MIB:.1f} MiB at most",
        "rows": ", ".join(f"{name} {count:,}" for name, count in figures.rows.items()),
        "left over": ", ".join(f"{name} {count}" for name, count in left.items()) or "nothing",
        "errors logged": str(len(figures.errors)),
    }
    return "\n".join(f"{label:16} {line}" for label, line in lines.items())


def _mean_load(figures: Figures) -> float:
    return sum(sample.load for sample in figures.samples) / len(figures.samples)


def _memory_faults(figures: Figures, plan: Plan) -> list[str]:
    faults = []
    growth, seconds = growth_bytes(figures.samples)
    allowed = _GROWTH_BYTES_PER_10_MINUTES * seconds / 600
    if plan.seconds < _LONG_SECONDS:
        allowed += _SHORT_NOISE_BYTES
    if growth > allowed:
        faults.append(f"memory grew by {growth / _MIB:.1f} MiB in {seconds:.0f} s, {allowed / _MIB:.1f} MiB allowed")
    third = next(sample for sample in figures.samples if sample.seconds >= figures.samples[-1].seconds / 3)
    end = figures.samples[-1].resident_bytes
    if end > _END_RATIO_MAX * third.resident_bytes:
        faults.append(f"memory went from {third.resident_bytes / _MIB:.1f} to {end / _MIB:.1f} MiB")
    if figures.reload_growth_bytes > _RELOAD_GROWTH_BYTES_MAX:
        faults.append(f"{plan.reload_count} reloads took {figures.reload_growth_bytes / _MIB:.1f} MiB")
    return faults


def _call_seconds(figures: Figures, part: tuple[float, float]) -> list[float]:
    end = figures.samples[-1].seconds
    return [took for began, took in figures.seconds_by_call if part[0] * end <= began <= part[1] * end]
