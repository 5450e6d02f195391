"""Control groups, v1 and v2: what a container may use, what it uses, and how often it had to wait for it.

The agent's own group is the node's series. Ranks in another one (a container of their own, a job of the
scheduler) are sampled too: each group once, as series of the first rank in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trackagent.agent.collect.contract import Here, Incident, Sample, Unavailable
from trackagent.agent.collect.counters import KernelFile, Rates
from trackagent.agent.collect.metrics import Metric
from trackagent.agent.collect.ranks import RankProcesses
from trackagent.agent.store.contract import ProducerInfo

# Limits are changed by people and schedulers, rarely.
LIMITS_S = 10.0
# What v1 says where there is no limit is a little less than 2^63.
_NO_LIMIT_BYTES = 1 << 60

_CPU, _MEMORY = "cpu.stat", "memory.stat"
_V2 = "(v2)"
METRICS = (
    Metric("cgroup/cpu/percent", "% of a core", "used", "cpu.stat; v1: cpuacct.usage"),
    Metric(
        "cgroup/cpu/limit_cores", "cores", "the quota, every 10 s", "cpu.max; v1: cpu.cfs_quota_us"
    ),
    Metric("cgroup/cpu/throttled_periods_percent", "% of periods", "in which it was stopped", _CPU),
    Metric("cgroup/cpu/throttled_percent", "% of a core", "wanted beyond the quota", _CPU),
    Metric(
        "cgroup/memory/current_bytes",
        "bytes",
        "used, page cache too",
        "memory.current; v1: memory.usage_in_bytes",
    ),
    Metric(
        "cgroup/memory/working_set_bytes",
        "bytes",
        "used, without page cache that can go",
        "less inactive_file of memory.stat",
    ),
    Metric(
        "cgroup/memory/limit_bytes",
        "bytes",
        "every 10 s",
        "memory.max; v1: memory.limit_in_bytes",
    ),
    Metric("cgroup/memory/used_percent", "%", "working set of limit", "both"),
    Metric("cgroup/memory/swap_bytes", "bytes", "swapped out", "memory.swap.current (v2)"),
    Metric(
        "cgroup/memory/oom_kills_total",
        "processes",
        "killed for lack of memory",
        "memory.events; v1: memory.oom_control",
    ),
    *(
        Metric(
            f"cgroup/pressure/{what}_{who}_percent",
            "% of the time",
            f"{whom} waited for {what}",
            f"{what}.pressure {_V2}",
        )
        for what in ("cpu", "memory", "io")
        for who, whom in (("some", "some"), ("full", "all"))
    ),
)


def make(here: Here) -> Cgroup:
    if not (here.sys / "fs" / "cgroup").is_dir():
        raise Unavailable(f"no control groups: there is no {here.sys}/fs/cgroup")
    return Cgroup(here)


class Cgroup:
    """Collector `cgroup`."""

    name = "cgroup"

    def __init__(self, here: Here) -> None:
        self._here = here
        self._ranks = RankProcesses(here)
        self._own = _places("self", here)
        self._places: dict[bytes, _Places] = {}
        self._groups: dict[_Places, _Group] = {}

    def sample(self) -> Sequence[Sample | Incident]:
        wanted: dict[_Places, ProducerInfo | None] = {self._own: None}
        places: dict[bytes, _Places] = {}
        for info, pid in sorted(self._ranks.found(), key=lambda found: found[0].rank):
            where = self._places.get(info.producer_id) or _places(str(pid), self._here)
            places[info.producer_id] = where
            wanted.setdefault(where, info)
        self._places = places
        now = self._here.clock()
        groups = {where: self._groups.get(where) or _Group(where) for where in wanted}
        self._groups = groups
        return [
            Sample(values, rank=wanted[where])
            for where, group in groups.items()
            if (values := group.sample(now))
        ]


@dataclass(frozen=True, slots=True)
class _Places:
    """The folders of a process's group: that of v2 and those of v1's controllers; None where there is
    none."""

    root: Path
    unified: Path | None = None
    cpu: Path | None = None
    cpuacct: Path | None = None
    memory: Path | None = None


def _places(process: str, here: Here) -> _Places:
    root = here.sys / "fs" / "cgroup"
    try:
        lines = (here.proc / process / "cgroup").read_text().splitlines()
    except OSError:
        return _Places(root)
    found: dict[str, Path] = {}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        name = path.lstrip("/")
        for controller in controllers.split(",") if controllers else ["unified"]:
            base = root / controller
            if not controllers and (root / "cgroup.controllers").exists():
                base = root
            if controller not in ("unified", "cpu", "cpuacct", "memory") or not base.is_dir():
                continue
            # In a container that sees its own group as the root, the path may be the host's.
            folder = base / name
            inside = ".." not in Path(name).parts and folder.is_dir()
            found[controller] = folder if inside else base
    return _Places(root, **found)


class _Group:
    """One control group. What it does not tell, or tells no more, is left out."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self._rates = Rates()
        self._limits: dict[str, float] = {}
        self._limits_due = -math.inf
        unified, memory = places.unified, places.memory
        self._cpu_stat = _opened(unified, "cpu.stat") or _opened(places.cpu, "cpu.stat")
        self._usage = _opened(places.cpuacct, "cpuacct.usage")
        self._memory = _opened(unified, "memory.current") or _opened(
            memory, "memory.usage_in_bytes"
        )
        self._memory_stat = _opened(unified, "memory.stat") or _opened(memory, "memory.stat")
        self._swap = _opened(unified, "memory.swap.current")
        self._events = _opened(unified, "memory.events") or _opened(memory, "memory.oom_control")
        self._pressures = {
            what: file
            for what in ("cpu", "memory", "io")
            if (file := _opened(unified, f"{what}.pressure")) is not None
        }

    def sample(self, now: float) -> dict[str, float]:
        if now >= self._limits_due:
            self._limits_due = now + LIMITS_S
            self._limits = self._find_limits()
        values = self._of_memory() | self._limits
        rates = self._rates.per_second(self._counters(), now)
        periods, stopped = rates.pop("periods", 0.0), rates.pop("stopped", 0.0)
        if periods:
            values["cgroup/cpu/throttled_periods_percent"] = 100.0 * stopped / periods
        return values | rates

    def _counters(self) -> dict[str, float]:
        """What becomes rates: of times, in hundredths of a second, so that a rate is a percentage."""
        found: dict[str, float] = {}
        cpu = _pairs(_read(self._cpu_stat))
        usage = _read(self._usage)
        if b"usage_usec" in cpu:
            found["cgroup/cpu/percent"] = cpu[b"usage_usec"] / 1e4
        elif usage:
            found["cgroup/cpu/percent"] = float(usage) / 1e7
        if b"nr_periods" in cpu:
            found["periods"] = cpu[b"nr_periods"]
            found["stopped"] = cpu[b"nr_throttled"]
            if b"throttled_usec" in cpu:
                found["cgroup/cpu/throttled_percent"] = cpu[b"throttled_usec"] / 1e4
            elif b"throttled_time" in cpu:
                found["cgroup/cpu/throttled_percent"] = cpu[b"throttled_time"] / 1e7
        for what, file in self._pressures.items():
            # `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, in microseconds
            for line in _read(file).splitlines():
                who, total = line.partition(b" ")[0], line.rpartition(b"total=")[2]
                key = f"cgroup/pressure/{what}_{who.decode(errors='replace')}_percent"
                if total.isdigit() and who in (b"some", b"full"):
                    found[key] = float(total) / 1e4
        return found

    def _of_memory(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if current := _read(self._memory):
            used = float(current)
            working = max(0.0, used - _reclaimable(_read(self._memory_stat)))
            found["cgroup/memory/current_bytes"] = used
            found["cgroup/memory/working_set_bytes"] = working
            if limit := self._limits.get("cgroup/memory/limit_bytes"):
                found["cgroup/memory/used_percent"] = 100.0 * working / limit
        if swap := _read(self._swap):
            found["cgroup/memory/swap_bytes"] = float(swap)
        events = _pairs(_read(self._events))
        if b"oom_kill" in events:
            found["cgroup/memory/oom_kills_total"] = events[b"oom_kill"]
        return found

    def _find_limits(self) -> dict[str, float]:
        """The least of the group's own and those of the groups that it lies in."""
        cores, size = math.inf, math.inf
        for folder in self._up(self._places.unified):
            cores = min(cores, _quota(_text(folder / "cpu.max")))
            size = min(size, _size(_text(folder / "memory.max")))
        for folder in self._up(self._places.cpu):
            text = [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            cores = min(cores, _quota(" ".join(text)))
        for folder in self._up(self._places.memory):
            size = min(size, _size(_text(folder / "memory.limit_in_bytes")))
        found = {"cgroup/cpu/limit_cores": cores, "cgroup/memory/limit_bytes": size}
        return {key: limit for key, limit in found.items() if limit < math.inf}

    def _up(self, folder: Path | None) -> Sequence[Path]:
        if folder is None:
            return ()
        root = self._places.root
        return [one for one in (folder, *folder.parents) if one == root or root in one.parents]


def _opened(folder: Path | None, name: str) -> KernelFile | None:
    if folder is None:
        return None
    try:
        file = KernelFile(folder / name)
        file.read()  # some can be opened and not be read
    except OSError:
        return None
    return file


def _read(file: KernelFile | None) -> bytes:
    if file is None:
        return b""
    try:
        return file.read()
    except OSError:
        return b""  # the group is gone


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _pairs(text: bytes) -> Mapping[bytes, float]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _reclaimable(memory_stat: bytes) -> float:
    """Bytes of page cache that can go. Of v1, those of the groups within the group as well."""
    for name in (b"\ntotal_inactive_file ", b"\ninactive_file "):
        _, found, rest = memory_stat.partition(name)
        if found:
            return float(rest.partition(b"\n")[0])
    return 0.0


def _quota(text: str) -> float:
    """Cores, of `quota period`; infinite for `max` and -1."""
    quota, _, period = text.partition(" ")
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return math.inf
    return int(quota) / int(period)


def _size(text: str) -> float:
    return float(text) if text.isdecimal() and int(text) < _NO_LIMIT_BYTES else math.inf
