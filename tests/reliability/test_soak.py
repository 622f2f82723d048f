"""Half a minute of the soak in `soak/`, whose 30 minutes run at night; and whether its checks would catch a leak.

More by the environment: REL_SECONDS, REL_SEED.
"""

import os
from pathlib import Path

import msgspec
import pytest

from tests.reliability.soak.run import soak
from tests.reliability.soak.verdict import Figures, Plan, Sample, faults_of, growth_bytes, report, slope_per_second

MIB = 1 << 20
SHORT = Plan(
    seconds=float(os.environ.get("REL_SECONDS", 16)),
    seed=int(os.environ.get("REL_SEED", 1)),
    churn_per_minute=0.4,
    reload_seconds=6,
    refresh_seconds=10,
    sample_seconds=0.5,
    warm_seconds=3,
    rest_seconds_max=15,
    sweep_seconds=1,
    seen_seconds=1,
    ping_seconds=1,
    stuck_seconds_max=4,
)
CONTROL = msgspec.structs.replace(SHORT, seconds=4, client_count=20, warm_seconds=1, rest_seconds_max=2, reload_count=2)
FLAT = Figures(
    samples=[Sample(number * 5.0, 100 * MIB, MIB) for number in range(361)],
    seconds_by_call=[(number / 10, 0.01) for number in range(18_000)],
    baseline={"tasks": 5},
    left={"tasks": 5},
    rows={"_engine_ledger": 0, "_scheduled_jobs": 0},
    reload_growth_bytes=0,
    counts={"mutations": 90_000, "reloads": 15},
    errors=[],
)
LONG = Plan(seconds=1_800)


@pytest.mark.slow
async def test_a_server_under_everyday_load_keeps_nothing_of_it(tmp_path: Path) -> None:
    figures = await soak(SHORT, tmp_path)
    assert faults_of(figures, SHORT) == [], f"seed {SHORT.seed}\n{report(figures, SHORT)}"
    assert figures.counts["dropped"] >= 1, "those that read nothing were dropped meanwhile"
    assert figures.counts["churned"] >= 1
    assert figures.counts["reloads"] > SHORT.reload_count, "also under load"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "fault"), [("views are kept", "engine.live.view.View are left"), ("bytes are kept", "memory grew by")]
)
async def test_the_control_a_server_that_keeps_something_is_found(tmp_path: Path, broken: str, fault: str) -> None:
    plan = msgspec.structs.replace(CONTROL, broken=broken, mutations_per_second=100)
    faults = faults_of(await soak(plan, tmp_path), plan)
    assert any(fault in each for each in faults), faults


# -- what is found in figures


def test_flat_figures_have_no_fault() -> None:
    assert faults_of(FLAT, LONG) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"samples": [Sample(number * 5.0, 100 * MIB + number * 12_000, MIB) for number in range(361)]},
            "memory grew by 2.7 MiB in 1200 s, 2.0 MiB allowed",
        ),
        (
            {"samples": [Sample(n * 5.0, (100 + 20 * (n > 355)) * MIB, MIB) for n in range(361)]},
            "memory went from 100.0 to 120.0 MiB",
        ),
        ({"samples": [*FLAT.samples, Sample(1_801, 100 * MIB, 65 * MIB)]}, "the WAL had 65 MiB"),
        ({"left": {"tasks": 8}}, "8 tasks are left, 5 were there before"),
        ({"left": {"tasks": 5, "engine.live.view.View": 3}}, "3 engine.live.view.View are left, 0 were there before"),
        ({"rows": FLAT.rows | {"_engine_ledger": 50_000}}, "the ledger has 50,000 rows"),
        ({"rows": FLAT.rows | {"_scheduled_jobs": 5_000}}, "5,000 jobs that have ended are still there"),
        ({"reload_growth_bytes": 11 * MIB}, "20 reloads took 11.0 MiB"),
        ({"errors": ["an ERROR line"]}, "1 errors were logged, the first: an ERROR line"),
        (
            {"seconds_by_call": [(n / 10, 0.05 if n > 15_000 else 0.01) for n in range(18_000)]},
            "p99 went from 10.0 to 50.0 ms",
        ),
    ],
)
def test_what_is_not_flat_is_a_fault(changes: dict[str, object], fault: str) -> None:
    found = faults_of(msgspec.structs.replace(FLAT, **changes), LONG)
    assert any(fault in each for each in found), found


def test_times_say_nothing_on_a_busy_machine() -> None:
    busy = [Sample(sample.seconds, sample.resident_bytes, sample.wal_bytes, load=1.5) for sample in FLAT.samples]
    slower = [(number / 10, 0.05 if number > 15_000 else 0.01) for number in range(18_000)]
    assert faults_of(msgspec.structs.replace(FLAT, samples=busy, seconds_by_call=slower), LONG) == []


def test_growth_is_that_of_the_line_that_fits_best() -> None:
    assert slope_per_second([(0, 1), (1, 4), (2, 5)]) == pytest.approx(2.0)
    assert slope_per_second([(0, 1)]) == 0
    noisy = [Sample(float(n), 100 * MIB + 1_000 * n + 50_000 * (n % 2), 0) for n in range(300)]
    growth, seconds = growth_bytes(noisy)
    assert (growth, seconds) == (pytest.approx(199_000, rel=0.05), 199)
