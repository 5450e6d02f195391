"""What every collector does: say how the node, its GPUs or the ranks' processes are at this moment.

One thread calls a collector, again and again, with pauses in between; each has a thread of its own, so that
one which takes long holds no other up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from trackagent.agent.store.contract import ProducerInfo


class Unavailable(Exception):
    """There is nothing to collect here: a library, a device or a permission is missing. The message is a line
    that says what, and what to do if it is wanted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Readings of one moment. values: by key, as docs/metrics.md lists them, in the unit that the key names;
    a reading that the system does not give is left out. gpu: of this one, its index, with the instance of a
    partitioned one behind a dot (`0`, `0.1`). rank: of this process of a run. Neither: of the node."""

    values: dict[str, float]
    gpu: str = ""
    rank: ProducerInfo | None = None


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that a device reported at this moment, such as an XID: as an event of the runs."""

    level: str
    message: str
    data: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What a collector is made from. ranks: the processes of runs that log here now; may take a moment.
    folders: the agent's own, in memory and on the disk; under `journals` in them, each rank has its journal,
    named by its producer id. proc, sys: where the kernel tells of things. clock: seconds, monotonic."""

    ranks: Callable[[], Sequence[ProducerInfo]] = tuple
    folders: Sequence[Path] = ()
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What a GPU, or an instance of a partitioned one, is. gpu: as in Sample. mig_profile: `1g.10gb`, or "".
    processes: bytes that each process had on it when they were last listed, 0 where the driver does not say.
    lost: the driver's words where it does not answer any more, or ""."""

    gpu: str
    uuid: str
    name: str
    driver: str
    mig_profile: str = ""
    processes: dict[int, int] = field(default_factory=dict)
    lost: str = ""


class Collector(Protocol):
    """Made by its module's `make`, which raises Unavailable where there is nothing to collect."""

    name: str
    """As in the configuration: `system`."""

    def sample(self) -> Sequence[Sample | Incident]:
        """How things are now. Any exception: it failed, and is asked again later. Takes milliseconds."""
        ...


@runtime_checkable
class KnowsGpus(Protocol):
    """A collector that can say what GPUs there are."""

    def devices(self) -> tuple[GpuFacts, ...]:
        """Each GPU before the instances that it is partitioned into, as they were when they were last read;
        from any thread, without waiting."""
        ...
