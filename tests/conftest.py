"""What several test files share: hypothesis settings, and aligners whose rule a test names."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Machines that run the tests are often busy: time is no reason to fail, and runs must repeat.
settings.register_profile(
    "house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("house")
