"""What several test files share: hypothesis settings, and aligners whose rule a test names."""

from __future__ import annotations

import asyncio

from hypothesis import HealthCheck, settings

# Without this the first to ask for a loop outside of one is given a new one, which nobody closes; LlamaIndex
# asks (`asyncio_run`). Told that there is none, it makes its own and closes it.
asyncio.set_event_loop(None)

# Machines that run the tests are often busy: time is no reason to fail, and runs must repeat.
settings.register_profile(
    "house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("house")
