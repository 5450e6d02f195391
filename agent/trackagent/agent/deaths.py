"""What can be said of a rank that died: where it had come to, and whether memory ran out.

Only what is known is said. The last step stands in the segments that the rank left: the last one of each
lane is kept until its owner ends. Whether the kernel killed for lack of memory is told by a counter of the
rank's control group, read while the rank lived and once more after its death.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trackagent.agent.processes import holds
from trackagent.agent.store.contract import ProducerInfo
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


def event(info: ProducerInfo, last: LastRecord, oom_kills: int | None) -> dict[str, Any]:
    """The event that says that a rank died, as an EVENT record holds it. oom_kills: processes that the kernel
    killed in the rank's memory group while it was watched, None when that is not known."""
    message = f"{info.source} on node {info.node} (pid {info.pid}) died without finish(): "
    if last.step is None or last.time_ns is None:
        message += "no step is known of it"
    else:
        message += f"last step {last.step} at {_clock(last.time_ns)} UTC"
    if oom_kills:
        processes = "1 process" if oom_kills == 1 else f"{oom_kills} processes"
        message += (
            f"; since it was first seen, the kernel killed {processes} of its control group "
            "for lack of memory"
        )
    return {
        "level": "error",
        "message": message,
        "rank": info.rank,
        "node": info.node,
        "pid": info.pid,
        "last_step": last.step,
        "last_time_ns": last.time_ns,
        "oom_killed": oom_kills,
    }


def _clock(time_ns: int) -> str:
    try:
        when = datetime.fromtimestamp(time_ns // 10**9, tz=timezone.utc)
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns after 1970-01-01"
    return when.strftime("%Y-%m-%d %H:%M:%S")


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
