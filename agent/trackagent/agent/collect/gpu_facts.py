"""What a GPU is, beside what is sampled of it: for pages and commands that name it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """A GPU, or an instance of a partitioned one. gpu: as in Sample. mig_profile: `1g.10gb`, or "".
    processes: bytes that each process had on it when they were last listed, 0 where the driver does not say.
    lost: the driver's words where it does not answer any more, or ""."""

    gpu: str
    uuid: str
    name: str
    driver: str
    mig_profile: str = ""
    processes: dict[int, int] = field(default_factory=dict)
    lost: str = ""
