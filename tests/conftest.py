"""How much hypothesis tries: `HYPOTHESIS_PROFILE=nightly pytest` tries much more, and other things each time."""

import os

from hypothesis import HealthCheck, settings

COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("pull_request", COMMON, max_examples=100, derandomize=True, database=None)
settings.register_profile("nightly", COMMON, max_examples=5_000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "pull_request"))
