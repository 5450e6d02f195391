"""Rules about a node: what its collectors sample, and what is wrong with it now."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from trackagent.agent.collect.contract import Sample
from trackagent.agent.health.alarms import Finding
from trackagent.agent.health.settings import Thresholds

# How long errors that were counted are told of after the last one.
AFTER_COUNTED_S = 60.0
# The state of an InfiniBand port that works.
ACTIVE = 4

Place = tuple[str, str]
"""Where something was read: ("", "") on the node, its GPUs included; or the run and the source of a rank."""

Readings = Mapping[Place, Mapping[str, float]]
"""By place, the latest values by key, as docs/metrics.md lists them."""


def readings(samples: Iterable[Sample]) -> Readings:
    """What was sampled, by place."""
    found: dict[Place, dict[str, float]] = {}
    for sample in samples:
        place = ("", "") if sample.rank is None else (sample.rank.run_id, sample.rank.source)
        found.setdefault(place, {}).update(sample.values)
    return found


@dataclass(frozen=True, slots=True)
class _Counter:
    """Errors that are counted: what each new one means. In `what`, {0} and so on are the groups of `key`."""

    key: re.Pattern[str]
    rule: str
    level: str
    what: str


_COUNTERS = (
    _Counter(
        re.compile(r"gpu/([^/]+)/ecc_uncorrected_errors_total"),
        "hardware",
        "error",
        "GPU {0}: uncorrected ECC errors",
    ),
    _Counter(
        re.compile(r"gpu/([^/]+)/retired_pages_double_bit"),
        "hardware",
        "error",
        "GPU {0}: pages retired for errors of two bits",
    ),
    _Counter(
        re.compile(r"gpu/([^/]+)/remapped_rows_uncorrected"),
        "hardware",
        "error",
        "GPU {0}: rows remapped for uncorrected errors",
    ),
    _Counter(
        re.compile(r"gpu/([^/]+)/nvlink_(crc|replay|recovery|ecc|receive)_errors_total"),
        "hardware",
        "warning",
        "GPU {0}: NVLink {1} errors",
    ),
    _Counter(
        re.compile(r"infiniband/([^/]+/[^/]+)/link_downed_total"),
        "hardware",
        "error",
        "InfiniBand {0}: times that the link went down",
    ),
    _Counter(
        re.compile(
            r"infiniband/([^/]+/[^/]+)/"
            r"(link_recoveries|symbol_errors|receive_errors|integrity_errors|overruns)_total"
        ),
        "hardware",
        "warning",
        "InfiniBand {0}: {1}",
    ),
    _Counter(
        re.compile(r"cgroup/memory/oom_kills_total"),
        "memory",
        "error",
        "processes killed by the kernel for lack of memory",
    ),
)
# Flags that say that a GPU is broken.
_BROKEN = re.compile(r"gpu/([^/]+)/remapped_rows_failed")
_PORT = re.compile(r"infiniband/([^/]+/[^/]+)/state")
# What keeps the clocks of a GPU down, and how bad that is. Most cards run at their power cap when they are
# busy: worth knowing, no fault.
_THROTTLE = re.compile(r"gpu/([^/]+)/throttle/([a-z_]+)")
_THROTTLED_BY = {
    "hw_slowdown": "warning",
    "hw_thermal": "warning",
    "sw_thermal": "warning",
    "hw_power_brake": "warning",
    "sw_power_cap": "info",
}
_FILESYSTEM = re.compile(r"system/filesystem/(.+)/used_percent")
_MEMORY = {
    "system/memory/used_percent": "memory of the node",
    "cgroup/memory/used_percent": "memory of the control group",
}


@dataclass(slots=True)
class _Grown:
    """A counter: its last value, and by how much it grew since it last began to, and when it last did."""

    value: float
    by: float = 0.0
    at_s: float = -math.inf


@dataclass(slots=True)
class NodeView:
    """What is known of a node: the latest readings, and what of them can only be told over time."""

    latest: Readings = field(default_factory=dict)
    grown: dict[tuple[Place, str], _Grown] = field(default_factory=dict)
    throttled_since: dict[str, float] = field(default_factory=dict)
    active_ports: set[str] = field(default_factory=set)

    def take(self, found: Readings, now_s: float) -> None:
        """The readings at `now_s`. What is not among them any more is forgotten."""
        self.latest = found
        counters = {
            (place, key): value
            for place, values in found.items()
            for key, value in values.items()
            if _counter(key) is not None
        }
        for name in [name for name in self.grown if name not in counters]:
            del self.grown[name]
        for name, value in counters.items():
            known = self.grown.setdefault(name, _Grown(value))
            if value > known.value:
                # One that begins anew after a while is told anew.
                recent = now_s - known.at_s <= AFTER_COUNTED_S
                known.by = (known.by if recent else 0.0) + value - known.value
                known.at_s = now_s
            known.value = value
        node = found.get(("", ""), {})
        throttled = {key for key, value in node.items() if _THROTTLE.fullmatch(key) and value == 1}
        self.throttled_since = {key: self.throttled_since.get(key, now_s) for key in throttled}
        ports = {key for key in node if _PORT.fullmatch(key)}
        self.active_ports = (self.active_ports & ports) | {
            key for key in ports if node[key] == ACTIVE
        }


def findings(view: NodeView, thresholds: Thresholds, now_s: float) -> list[Finding]:
    """What is wrong with the node at `now_s`."""
    rules: tuple[Callable[[NodeView, Thresholds, float], Iterable[Finding]], ...] = (
        _counted,
        _broken,
        _ports,
        _throttling,
        _memory,
        _disks,
    )
    return [finding for rule in rules for finding in rule(view, thresholds, now_s)]


@functools.lru_cache(10_000)
def _counter(key: str) -> tuple[_Counter, tuple[str, ...]] | None:
    """What a counter counts, with the groups of its key; None for any other key."""
    for counter in _COUNTERS:
        if match := counter.key.fullmatch(key):
            return counter, match.groups()
    return None


def _counted(view: NodeView, thresholds: Thresholds, now_s: float) -> Iterable[Finding]:
    for ((run_id, source), key), grown in view.grown.items():
        counter = _counter(key)
        if counter is None or now_s - grown.at_s > AFTER_COUNTED_S:
            continue
        known, groups = counter
        device, *errors = groups or ("",)
        what = known.what.format(device, *(name.replace("_", " ") for name in errors))
        of = f" of the control group of {source}" if source else ""
        message = f"{what}{of}: {grown.by:g} more, {grown.value:g} in all"
        numbers = {"key": key, "more": grown.by, "total": grown.value}
        subject = f"{source} {key}".strip()
        yield Finding(known.rule, subject, known.level, message, numbers, run_id)


def _broken(view: NodeView, thresholds: Thresholds, now_s: float) -> Iterable[Finding]:
    for key, value in view.latest.get(("", ""), {}).items():
        match = _BROKEN.fullmatch(key)
        if match and value > 0:
            message = f"GPU {match[1]}: a row of its memory cannot be remapped: have it replaced"
            yield Finding("hardware", key, "error", message, {"key": key, "value": value})


def _ports(view: NodeView, thresholds: Thresholds, now_s: float) -> Iterable[Finding]:
    node = view.latest.get(("", ""), {})
    for key in sorted(view.active_ports):
        if node[key] != ACTIVE:
            match = _PORT.fullmatch(key)
            port = match[1] if match else key
            message = f"InfiniBand {port} is down: its state is {node[key]:g}, it was {ACTIVE}"
            yield Finding("hardware", key, "error", message, {"key": key, "state": node[key]})


def _throttling(view: NodeView, thresholds: Thresholds, now_s: float) -> Iterable[Finding]:
    node = view.latest.get(("", ""), {})
    for key, since_s in sorted(view.throttled_since.items()):
        match = _THROTTLE.fullmatch(key)
        level = _THROTTLED_BY.get(match[2]) if match else None
        if match is None or level is None or now_s - since_s < thresholds.throttled_s:
            continue
        busy = node.get(f"gpu/{match[1]}/utilization_percent", math.nan)
        if not busy >= thresholds.busy_percent:
            continue
        names = ("temperature_celsius", "power_watts", "sm_clock_mhz")
        gpu = f"gpu/{match[1]}/"
        seen = {name: node[gpu + name] for name in names if gpu + name in node}
        how = ", ".join(f"{name} {value:g}" for name, value in seen.items())
        message = (
            f"GPU {match[1]} is throttled ({match[2].replace('_', ' ')}) for {now_s - since_s:.0f} s while "
            f"{busy:.0f} % busy{': ' + how if how else ''}"
        )
        numbers = {"key": key, "since_s": round(now_s - since_s, 1), "busy_percent": busy, **seen}
        yield Finding("hardware", key, level, message, numbers)


def _memory(view: NodeView, thresholds: Thresholds, now_s: float) -> Iterable[Finding]:
    for (run_id, source), values in view.latest.items():
        for key, what in _MEMORY.items():
            used = values.get(key, 0.0) / 100
            if used < thresholds.memory_warning:
                continue
            high = used >= thresholds.memory_error
            limit = thresholds.memory_error if high else thresholds.memory_warning
            of = f" of {source}" if source else ""
            message = f"{used:.1%} of the {what}{of} is in use"
            numbers = {"key": key, "used": round(used, 4), "limit": limit}
            level = "error" if high else "warning"
            yield Finding("memory", f"{source} {key}".strip(), level, message, numbers, run_id)


def _disks(view: NodeView, thresholds: Thresholds, now_s: float) -> Iterable[Finding]:
    node = view.latest.get(("", ""), {})
    for key, value in node.items():
        match = _FILESYSTEM.fullmatch(key)
        if match and value / 100 >= thresholds.disk_error:
            free = node.get(key.replace("used_percent", "free_bytes"), math.nan)
            left = "" if math.isnan(free) else f", {free / 1e9:.1f} GB left"
            message = f"the file system {match[1]} is {value:.1f} % full{left}"
            numbers = {
                "key": key,
                "used": round(value / 100, 4),
                "limit": thresholds.disk_error,
            }
            yield Finding("disk", key, "error", message, numbers)
