"""What is known of a rank that died: where it had come to, and whether memory ran out.

The last step stands in the segments that the rank left: the last one of each lane is kept until its owner
ends. Whether the kernel killed for lack of memory is told by a counter of the rank's control group, read
while the rank lived and once more after its death.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trackagent.agent.processes import holds
from trackagent.client import record
from trackagent.client.record import HEAD, Kind
from trackagent.client.segment import HEADER_BYTES

MAX_FILE_BYTES = 64 * 1024
_METRICS = (Kind.METRICS, Kind.NAMED)


@dataclass(frozen=True, slots=True)
class LastRecord:
    """What a dead producer's segments end with. step and time_ns of the metrics record logged last, None
    without one; finished: it had said how it ended."""

    step: int | None = None
    time_ns: int | None = None
    finished: bool = False

    def and_then(self, data: bytes | memoryview) -> LastRecord:
        """These, or what the segment with the bytes `data` says later."""
        step, time_ns, finished = self.step, self.time_ns, self.finished
        for offset in record.scan(data, HEADER_BYTES).offsets:
            _, _, kind, _, _, _, at_step, at_time = HEAD.unpack_from(data, offset)
            if kind in _METRICS and (time_ns is None or at_time >= time_ns):
                step, time_ns = at_step, at_time
            finished = finished or kind == Kind.FINISH
        return LastRecord(step, time_ns, finished)


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """The control group that limits a process's memory: the file with its counter, and the count of
    processes that the kernel had killed in it for lack of memory when it was looked at."""

    events: Path
    oom_kills: int

    def killed_since(self) -> int | None:
        """Processes killed since then; None when the group is gone, or its counter."""
        now = _oom_kills(self.events)
        return None if now is None else max(0, now - self.oom_kills)


def memory_group(
    pid: int,
    lock: Path,
    *,
    proc: Path = Path("/proc"),
    groups: Path = Path("/sys/fs/cgroup"),
) -> MemoryGroup | None:
    """The memory group of the living process `pid`; None when there is none, or when `pid` is not the process
    that holds `lock` open (it is of another PID namespace, or another user's)."""
    try:
        if not holds(pid, lock, proc):
            return None
    except PermissionError:
        return None
    for line in _read(proc / str(pid) / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        name = path.lstrip("/")
        if ".." in Path(name).parts:
            continue  # a group outside of what this process may see
        if controllers == "":
            places = [groups / name / "memory.events", groups / "unified" / name / "memory.events"]
        elif "memory" in controllers.split(","):
            places = [groups / "memory" / name / "memory.oom_control"]
        else:
            continue
        for events in places:
            count = _oom_kills(events)
            if count is not None:
                return MemoryGroup(events, count)
    return None


def _oom_kills(events: Path) -> int | None:
    for line in _read(events).splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.strip().isdecimal():
            return int(count)
    return None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode(errors="replace")
    except OSError:
        return ""
