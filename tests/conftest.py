"""What all tests share, and how much hypothesis tries.

`HYPOTHESIS_PROFILE=nightly pytest` tries much more, and other things each time.
"""

import io
import logging
import os
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from engine.observe.log import set_up_logging

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


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the log of the process receives; the set-up of pytest is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    root.handlers.clear()
    set_up_logging(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
