"""How much hypothesis tries: `HYPOTHESIS_PROFILE=nightly pytest` tries much more, and other things each time."""

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("pull_request", COMMON, max_examples=100, derandomize=True, database=None)
settings.register_profile("nightly", COMMON, max_examples=5_000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "pull_request"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half a surrogate pair that a test logs is no UTF-8, and would end the lane that sends its report."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
