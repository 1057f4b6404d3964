"""Settings that all tests share."""

import hypothesis

hypothesis.settings.register_profile(
    "here", deadline=None, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("here")
