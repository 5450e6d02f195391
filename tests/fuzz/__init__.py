"""Hostile bytes and calls, made up by hypothesis: a few, the same each time, in `make test`; many in
`make fuzz`."""

from __future__ import annotations

import os
from datetime import timedelta

from hypothesis import HealthCheck, Phase, settings

# How many times as many examples as in `make test`, drawn at random.
SCALE = int(os.environ.get("FUZZ_SCALE", "1"))


def examples(number: int) -> settings:
    """The settings of a test with so many examples."""
    return settings(
        max_examples=number * SCALE,
        derandomize=SCALE == 1,
        database=None,
        deadline=timedelta(seconds=20),
        # What is large is slow to make smaller; the example printed can be replayed as it is.
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
