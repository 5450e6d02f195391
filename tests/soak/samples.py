"""What the soak measures: samples of one node, and whether they stay flat from its start to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median

WINDOWS = ("start", "middle", "end")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What one look at the node found. `share`, `slack`: a quantity is flat while its end is below its
    start times (1 + share), plus slack."""

    agent_rss_mib: float = field(metadata={"share": 0.15, "slack": 8.0})
    agent_descriptors: float = field(metadata={"share": 0.0, "slack": 8.0})
    agent_threads: float = field(metadata={"share": 0.0, "slack": 4.0})
    agent_cpu_percent: float = field(metadata={"share": 0.3, "slack": 3.0})
    producer_rss_mib: float = field(metadata={"share": 0.1, "slack": 4.0})
    producer_descriptors: float = field(metadata={"share": 0.0, "slack": 4.0})
    producer_threads: float = field(metadata={"share": 0.0, "slack": 2.0})
    journals_mib: float = field(metadata={"share": 0.5, "slack": 8.0})
    spool_mib: float = field(metadata={"share": 0.5, "slack": 16.0})
    store_bytes_per_point: float = field(metadata={"share": 0.2, "slack": 0.5})
    delay_s: float = field(metadata={"share": 0.5, "slack": 0.5})


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity: its median in each of the windows, and its largest value."""

    name: str
    windows: Mapping[str, float]
    largest: float
    flat: bool


def table(samples: Sequence[Sample]) -> list[Row]:
    """A row for each quantity. The windows are the first, the middle and the last tenth of the samples (one
    sample each at least). ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    size = max(1, len(samples) // 10)
    middle = (len(samples) - size) // 2
    parts = (samples[:size], samples[middle : middle + size], samples[-size:])
    rows = []
    for quantity in fields(Sample):
        medians = [median(getattr(sample, quantity.name) for sample in part) for part in parts]
        limit = medians[0] * (1 + quantity.metadata["share"]) + quantity.metadata["slack"]
        rows.append(
            Row(
                name=quantity.name,
                windows=dict(zip(WINDOWS, medians, strict=True)),
                largest=max(getattr(sample, quantity.name) for sample in samples),
                flat=medians[-1] <= limit,
            )
        )
    return rows
