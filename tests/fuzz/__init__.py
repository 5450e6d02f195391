"""Hostile bytes and calls, and the settings of all that hypothesis makes up: the same examples each time in
`make test`, others each time, and more of them, in `make fuzz`."""

from __future__ import annotations

import os
from datetime import timedelta

from hypothesis import HealthCheck, Phase, settings

# `make fuzz` says how many times as many examples as in `make test` there are, drawn at random.
RANDOM = "FUZZ_SCALE" in os.environ
SCALE = int(os.environ.get("FUZZ_SCALE", "1"))


def load_profile() -> None:
    """What holds for every test of hypothesis that does not say otherwise."""
    settings.register_profile(
        "trackagent",
        max_examples=100 * SCALE,
        derandomize=not RANDOM,
        database=None,
        deadline=timedelta(seconds=20),
        # What is large is slow to make smaller; the example printed can be replayed as it is.
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
        print_blob=True,
        # These speak of luck, or of a busy machine.
        suppress_health_check=[
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
            HealthCheck.large_base_example,
            HealthCheck.too_slow,
        ],
    )
    settings.load_profile("trackagent")


def examples(number: int) -> settings:
    """The settings of a test with so many examples instead of 100."""
    return settings(max_examples=number * SCALE)
