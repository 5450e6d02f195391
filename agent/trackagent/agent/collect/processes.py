"""The process of each rank: what it takes of processor, memory, threads, files and disks.

What would cost the training something is read rarely: PSS is summed up while the kernel holds the lock of the
process's memory map, for milliseconds where there are many gigabytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trackagent.agent.collect.contract import Here, Incident, Sample, Unavailable
from trackagent.agent.collect.counters import KernelFile, Rates
from trackagent.agent.collect.metrics import Metric
from trackagent.agent.collect.ranks import RankProcesses
from trackagent.agent.store.contract import ProducerInfo

SELDOM_S = 10.0
PSS_S = 60.0
# Nor is PSS read for more than this part of the time.
PSS_SHARE = 1e-3
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

_STAT, _IO = "/proc/PID/stat", "/proc/PID/io"
_SWITCHES = "of its main thread, every 10 s: how often it "
METRICS = (
    Metric("process/cpu/percent", "% of a core", "all of its threads", _STAT, "", "cpu × cores"),
    Metric(
        "process/memory/rss_bytes",
        "bytes",
        "resident, what it shares too",
        _STAT,
        "",
        "proc.memory.rssMB × 2^20",
    ),
    Metric(
        "process/memory/pss_bytes",
        "bytes",
        "resident, its part of what it shares; every 60 s",
        "/proc/PID/smaps_rollup",
    ),
    Metric("process/threads", "threads", "running or not", _STAT, "", "proc.cpu.threads"),
    Metric("process/open_files", "files", "descriptors; every 10 s", "/proc/PID/fd"),
    Metric("process/io/read_bytes_per_second", "bytes/s", "read from disks, every 10 s", _IO),
    Metric("process/io/written_bytes_per_second", "bytes/s", "written to disks, every 10 s", _IO),
    Metric("process/faults/minor_per_second", "1/s", "page faults without a disk", _STAT),
    Metric("process/faults/major_per_second", "1/s", "page faults with one", _STAT),
    Metric(
        "process/switches/voluntary_per_second", "1/s", f"{_SWITCHES}waited", "/proc/PID/status"
    ),
    Metric(
        "process/switches/involuntary_per_second",
        "1/s",
        f"{_SWITCHES}was preempted",
        "/proc/PID/status",
    ),
)


def make(here: Here) -> Processes:
    if not (here.proc / "self").exists():
        raise Unavailable(f"no processes can be seen: there is no {here.proc}/self")
    return Processes(here)


class Processes:
    """Collector `processes`."""

    name = "processes"

    def __init__(self, here: Here) -> None:
        self._here = here
        self._ranks = RankProcesses(here)
        self._known: dict[bytes, _Process] = {}

    def sample(self) -> Sequence[Sample | Incident]:
        found: list[Sample | Incident] = []
        known: dict[bytes, _Process] = {}
        for info, pid in self._ranks.found():
            try:
                process = self._known.get(info.producer_id) or _Process(info, pid, self._here)
                known[info.producer_id] = process
                found += process.sample(self._here.clock())
            except (FileNotFoundError, ProcessLookupError):
                self._ranks.forget(info)
                known.pop(info.producer_id, None)
        # PSS of one at a time.
        due = min(known.values(), key=lambda one: one.pss_due, default=None)
        if due is not None and self._here.clock() >= due.pss_due:
            found += due.sample_pss()
        self._known = known
        return found


class _Process:
    """One rank's. Its files stay open, so that another process which gets its number is not taken for it.
    FileNotFoundError and ProcessLookupError when it has ended."""

    def __init__(self, info: ProducerInfo, pid: int, here: Here) -> None:
        self._info = info
        self._clock = here.clock
        self._folder = here.proc / str(pid)
        self._stat = KernelFile(self._folder / "stat")
        self._status = KernelFile(self._folder / "status")
        self._io: KernelFile | None = None
        try:
            self._io = KernelFile(self._folder / "io")
        except PermissionError:
            pass
        self._rates, self._counts = Rates(), Rates()
        self._seldom_due = self._clock()
        # The memory of a rank that begins grows: PSS is of interest later.
        self.pss_due = self._clock() + SELDOM_S

    def sample(self, now: float) -> list[Sample]:
        # Behind the name, which may hold anything: the state is the first field, as (3) in proc(5).
        fields = self._stat.read().rpartition(b")")[2].split()
        counters = {
            "process/cpu/percent": (int(fields[11]) + int(fields[12])) * 100.0 / _TICKS,
            "process/faults/minor_per_second": float(fields[7]),
            "process/faults/major_per_second": float(fields[9]),
        }
        values = self._rates.per_second(counters, now)
        values["process/threads"] = float(fields[17])
        values["process/memory/rss_bytes"] = float(fields[21]) * _PAGE
        found = [Sample(values, rank=self._info)]
        if now >= self._seldom_due:
            self._seldom_due = now + SELDOM_S
            if seldom := self._of_files() | self._of_counts(now):
                found.append(Sample(seldom, rank=self._info))
        return found

    def _of_files(self) -> dict[str, float]:
        try:
            return {"process/open_files": float(len(os.listdir(self._folder / "fd")))}
        except PermissionError:
            return {}

    def _of_counts(self, now: float) -> dict[str, float]:
        counters: dict[str, float] = {}
        _, _, switches = self._status.read().rpartition(b"\nvoluntary_ctxt_switches:")
        voluntary, _, rest = switches.partition(b"\n")
        if involuntary := rest.partition(b":")[2]:
            counters["process/switches/voluntary_per_second"] = float(voluntary)
            counters["process/switches/involuntary_per_second"] = float(involuntary)
        if self._io is not None:
            _, _, moved = self._io.read().partition(b"\nread_bytes: ")
            read, _, rest = moved.partition(b"\nwrite_bytes: ")
            counters["process/io/read_bytes_per_second"] = float(read)
            counters["process/io/written_bytes_per_second"] = float(rest.partition(b"\n")[0])
        return self._counts.per_second(counters, now)

    def sample_pss(self) -> list[Sample]:
        began = self._clock()
        try:
            text = (self._folder / "smaps_rollup").read_bytes()
        except OSError:
            text = b""  # it has just ended, or is not ours to see
        now = self._clock()
        self.pss_due = now + max(PSS_S, (now - began) / PSS_SHARE)
        _, _, rest = text.partition(b"\nPss:")
        if not rest:
            return []
        size = float(rest.split(None, 1)[0]) * 1024
        return [Sample({"process/memory/pss_bytes": size}, rank=self._info)]
