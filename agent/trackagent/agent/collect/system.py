"""The node as a whole: processors, memory, disks, network. In a container these are the host's figures; what
the container may use of them is in cgroup.py.

The counters are read from /proc by hand, from files that stay open: psutil asks /sys of each disk every time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from trackagent.agent.collect.contract import Here, Incident, Sample, Unavailable
from trackagent.agent.collect.counters import KernelFile, Rates, bounded, part
from trackagent.agent.collect.metrics import Metric

# How often file systems are looked at, and how often for devices that came or went.
FILESYSTEMS_S = 10.0
DEVICES_S = 60.0
SECTOR_BYTES = 512  # in /proc/diskstats, whatever the disk's own are
# What containers and virtual machines make on the host beside its own interfaces.
_NOT_SHOWN_INTERFACES = ("lo", "veth", "cali", "lxc", "cni", "tap", "dummy", "kube-", "nodelocal")
_NOT_SHOWN_DISKS = ("loop", "ram", "zram", "fd", "sr")

_STAT, _NET, _DISKS = "/proc/stat", "/proc/net/dev", "/proc/diskstats"
METRICS = (
    Metric(
        "system/cpu/percent",
        "% of all cores",
        "not idle",
        _STAT,
        "system/cpu_utilization_percentage",
    ),
    Metric("system/cpu/max_core_percent", "% of a core", "the busiest core", _STAT),
    Metric("system/cpu/user_percent", "% of all cores", "in programs", _STAT),
    Metric("system/cpu/system_percent", "% of all cores", "in the kernel", _STAT),
    Metric("system/cpu/iowait_percent", "% of all cores", "idle, waiting for a disk", _STAT),
    Metric("system/cpu/steal_percent", "% of all cores", "taken by other virtual machines", _STAT),
    Metric("system/load_1m", "processes", "load average of a minute", "/proc/loadavg"),
    Metric("system/load_5m", "processes", "load average of 5 minutes", "/proc/loadavg"),
    Metric("system/load_15m", "processes", "load average of 15 minutes", "/proc/loadavg"),
    Metric("system/memory/total_bytes", "bytes", "installed", "/proc/meminfo"),
    Metric(
        "system/memory/used_bytes",
        "bytes",
        "total less available",
        "/proc/meminfo",
        "system/system_memory_usage_megabytes × 10^6",
    ),
    Metric(
        "system/memory/available_bytes",
        "bytes",
        "for programs, without swapping",
        "/proc/meminfo",
        "",
        "proc.memory.availableMB × 2^20",
    ),
    Metric(
        "system/memory/used_percent",
        "%",
        "used of total",
        "/proc/meminfo",
        "system/system_memory_usage_percentage",
        "memory_percent",
    ),
    Metric("system/swap/used_bytes", "bytes", "swapped out", "/proc/meminfo"),
    Metric(
        "system/filesystem/{mount}/used_bytes",
        "bytes",
        "every 10 s; `root` is /",
        "statvfs",
        "system/disk_usage_megabytes × 10^6",
        "disk.{path}.usageGB × 2^30",
    ),
    Metric(
        "system/filesystem/{mount}/free_bytes",
        "bytes",
        "for every user",
        "statvfs",
        "system/disk_available_megabytes × 10^6",
    ),
    Metric(
        "system/filesystem/{mount}/used_percent",
        "%",
        "used of used and free",
        "statvfs",
        "system/disk_usage_percentage",
        "disk.{path}.usagePercent",
    ),
    Metric("system/disk/{device}/read_bytes_per_second", "bytes/s", "read", _DISKS),
    Metric("system/disk/{device}/written_bytes_per_second", "bytes/s", "written", _DISKS),
    Metric("system/disk/{device}/reads_per_second", "1/s", "reads completed", _DISKS),
    Metric("system/disk/{device}/writes_per_second", "1/s", "writes completed", _DISKS),
    Metric("system/disk/{device}/busy_percent", "% of the time", "with requests", _DISKS),
    Metric("system/network/{interface}/received_bytes_per_second", "bytes/s", "received", _NET),
    Metric("system/network/{interface}/sent_bytes_per_second", "bytes/s", "sent", _NET),
    Metric("system/network/{interface}/received_packets_per_second", "1/s", "received", _NET),
    Metric("system/network/{interface}/sent_packets_per_second", "1/s", "sent", _NET),
    Metric("system/network/{interface}/receive_errors_total", "packets", "received badly", _NET),
    Metric("system/network/{interface}/send_errors_total", "packets", "not sent", _NET),
    Metric("system/network/{interface}/receive_drops_total", "packets", "dropped", _NET),
    Metric("system/network/{interface}/send_drops_total", "packets", "dropped", _NET),
)


def make(here: Here) -> System:
    return System(here)


class System:
    """Collector `system`."""

    name = "system"

    def __init__(self, here: Here) -> None:
        self._here = here
        try:
            self._stat = KernelFile(here.proc / "stat", 256 * 1024)
            self._load = KernelFile(here.proc / "loadavg")
            self._memory = KernelFile(here.proc / "meminfo")
            self._network = KernelFile(here.proc / "net" / "dev", in_pieces=True)
        except OSError as error:
            raise Unavailable(f"no figures of this system: {error}") from None
        self._disks: KernelFile | None = None
        try:
            self._disks = KernelFile(here.proc / "diskstats", 256 * 1024, in_pieces=True)
        except OSError:
            pass  # a system without disks of its own
        # Jiffies busy and in all of each core, the first for all together.
        self._cores: dict[bytes, tuple[int, ...]] = {}
        self._rates = Rates()
        self._devices: dict[str, str] = {}
        self._devices_due = self._filesystems_due = -1.0
        self._filesystems: dict[str, str] = {}

    def sample(self) -> Sequence[Sample | Incident]:
        now = self._here.clock()
        if now >= self._devices_due:
            self._devices_due = now + DEVICES_S
            self._devices = self._find_devices()
            self._filesystems = self._find_filesystems()
        totals, counters = self._of_network()
        counters.update(self._of_disks())
        rates = self._rates.per_second(counters, now)
        busy = {key: rate for key, rate in rates.items() if key.endswith("busy_percent")}
        # Milliseconds in a second, of a thousand.
        rates.update({key: min(100.0, rate / 10) for key, rate in busy.items()})
        found = [Sample(self._of_cpu() | self._of_memory() | rates | totals)]
        if now >= self._filesystems_due:
            self._filesystems_due = now + FILESYSTEMS_S
            found.append(Sample(self._of_filesystems()))
        return found

    def _of_cpu(self) -> dict[str, float]:
        one, five, fifteen = map(float, self._load.read().split()[:3])
        found = {"system/load_1m": one, "system/load_5m": five, "system/load_15m": fifteen}
        before, cores = self._cores, {}
        busiest = 0.0
        for line in self._stat.read().split(b"\n"):
            if not line.startswith(b"cpu"):
                break
            name, *fields = line.split(None, 9)
            # user, nice, system, idle, iowait, irq, softirq, steal; what guests take is in user.
            cores[name] = times = tuple(map(int, fields[:8]))
            if name not in before:
                continue
            spent = [now - then for now, then in zip(times, before[name], strict=False)]
            total = sum(spent)
            if total <= 0 or len(spent) < 8:
                continue
            percent = max(0.0, 100.0 * (total - spent[3] - spent[4]) / total)
            if name != b"cpu":
                busiest = max(busiest, percent)
                continue
            found["system/cpu/percent"] = percent
            found["system/cpu/user_percent"] = 100.0 * (spent[0] + spent[1]) / total
            found["system/cpu/system_percent"] = 100.0 * (spent[2] + spent[5] + spent[6]) / total
            found["system/cpu/iowait_percent"] = max(0.0, 100.0 * spent[4] / total)
            found["system/cpu/steal_percent"] = max(0.0, 100.0 * spent[7] / total)
        self._cores = cores
        if "system/cpu/percent" in found:
            found["system/cpu/max_core_percent"] = busiest
        return found

    def _of_memory(self) -> dict[str, float]:
        sizes = {}
        for line in self._memory.read().split(b"\n", 24)[:24]:
            name, _, value = line.partition(b":")
            if value:
                sizes[name] = float(value.split(None, 1)[0]) * 1024
        total, available = sizes[b"MemTotal"], sizes[b"MemAvailable"]
        return {
            "system/memory/total_bytes": total,
            "system/memory/used_bytes": total - available,
            "system/memory/available_bytes": available,
            "system/memory/used_percent": 100.0 * (total - available) / total,
            "system/swap/used_bytes": sizes.get(b"SwapTotal", 0.0) - sizes.get(b"SwapFree", 0.0),
        }

    def _of_network(self) -> tuple[dict[str, float], dict[str, float]]:
        """What is counted from the beginning, and what becomes rates."""
        lines: dict[str, list[bytes]] = {}
        for line in self._network.read().split(b"\n")[2:]:
            name, colon, rest = line.partition(b":")
            shown = name.strip().decode(errors="replace")
            if colon and not shown.startswith(_NOT_SHOWN_INTERFACES):
                lines[shown] = rest.split()
        totals, counters = {}, {}
        for interface in bounded(lines):
            prefix = f"system/network/{part(interface)}/"
            received = list(map(float, lines[interface][:4]))
            sent = list(map(float, lines[interface][8:12]))
            for way, (size, packets, _, _) in (("received", received), ("sent", sent)):
                counters[f"{prefix}{way}_bytes_per_second"] = size
                counters[f"{prefix}{way}_packets_per_second"] = packets
            for way, (_, _, errors, drops) in (("receive", received), ("send", sent)):
                totals[f"{prefix}{way}_errors_total"] = errors
                totals[f"{prefix}{way}_drops_total"] = drops
        return totals, counters

    def _of_disks(self) -> dict[str, float]:
        counters: dict[str, float] = {}
        if self._disks is None:
            return counters
        for line in self._disks.read().split(b"\n"):
            fields = line.split()
            name = fields[2].decode(errors="replace") if len(fields) >= 14 else ""
            if prefix := self._devices.get(name):
                reads, _, read, _, writes, _, written, _, _, busy_ms = map(float, fields[3:13])
                counters[f"{prefix}read_bytes_per_second"] = read * SECTOR_BYTES
                counters[f"{prefix}written_bytes_per_second"] = written * SECTOR_BYTES
                counters[f"{prefix}reads_per_second"] = reads
                counters[f"{prefix}writes_per_second"] = writes
                counters[f"{prefix}busy_percent"] = busy_ms
        return counters

    def _of_filesystems(self) -> dict[str, float]:
        found = {}
        for mount, name in self._filesystems.items():
            try:
                size = os.statvfs(mount)
            except OSError:
                continue  # unmounted, or not ours to see
            used, free = size.f_blocks - size.f_bfree, size.f_bavail
            if used + free > 0:
                prefix = f"system/filesystem/{name}/"
                found[f"{prefix}used_bytes"] = float(used * size.f_frsize)
                found[f"{prefix}free_bytes"] = float(free * size.f_frsize)
                found[f"{prefix}used_percent"] = 100.0 * used / (used + free)
        return found

    def _find_devices(self) -> dict[str, str]:
        """By whole disk, how its keys begin."""
        try:
            names = os.listdir(self._here.sys / "block")
        except OSError:
            return {}
        shown = bounded(name for name in names if not name.startswith(_NOT_SHOWN_DISKS))
        return {name: f"system/disk/{part(name)}/" for name in shown}

    def _find_filesystems(self) -> dict[str, str]:
        """By mount point, its name in keys: of each local disk the first, of the root, and of the agent's
        folders. A network's file system may hang whoever asks it."""
        mounts: dict[str, str] = {}
        for one in psutil.disk_partitions(all=False):
            mounts.setdefault(one.device, one.mountpoint)
        found = {"/": "root"}
        for mount in bounded({*mounts.values(), *map(_mount_of, self._here.folders)}):
            found.setdefault(mount, part(mount.strip("/").replace("/", "_")))
        return found


def _mount_of(folder: Path) -> str:
    while not os.path.ismount(folder) and folder != folder.parent:
        folder = folder.parent
    return str(folder)
