"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

import turbo_backend  # noqa: F401  # before torch: it sets how OpenMP threads wait

# The suite never judges by the clock: a busy machine must not fail it.
settings.register_profile("no-clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no-clock")
