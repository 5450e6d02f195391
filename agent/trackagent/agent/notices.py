"""What the agent itself has to say in a run: facts in, encoded records out.

A notice stands in the agent's own lane of the producer that it is about (spool.AGENT_LANE), and is delivered
like everything else of the run. An event tells people what is known; a loss beside it is counted, as 1 where
nobody knows how many records are missing. When a notice is written down is for its caller to decide.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from trackagent.client import record
from trackagent.client.record import Kind

if TYPE_CHECKING:
    from trackagent.agent.deadletters import DeadLetter
    from trackagent.agent.deaths import LastRecord
    from trackagent.agent.store.contract import ProducerInfo

# The reasons by which losses are counted.
UNREADABLE = "unreadable records"
LOST = "lost with a damaged spool"


def died(info: ProducerInfo, last: LastRecord, oom_kills: int | None) -> bytes:
    """A rank died. oom_kills: processes that the kernel killed in the rank's memory group while it was
    watched, None when that is not known."""
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
    event = {
        "level": "error",
        "message": message,
        "rank": info.rank,
        "node": info.node,
        "pid": info.pid,
        "last_step": last.step,
        "last_time_ns": last.time_ns,
        "oom_killed": oom_kills,
    }
    return _encoded((Kind.EVENT, event))


def event(level: str, message: str, data: Mapping[str, object]) -> bytes:
    """Something that was seen on the node of a run."""
    return _encoded((Kind.EVENT, {**data, "level": level, "message": message}))


def lost_samples(records: Mapping[str, int]) -> bytes:
    """By reason, how many samples could not be kept."""
    return _encoded((Kind.LOSS, records))


def killed() -> bytes:
    """The end of a producer that did not say how it ended."""
    return _encoded(_killed("the process ended without finish()"))


def vanished(info: ProducerInfo) -> bytes:
    """The event and the end of a producer that is gone with its journal."""
    error = "its process and its journal are gone: what it had not delivered is unknown"
    message = f"{info.source} on node {info.node} (pid {info.pid}) never ended: {error}"
    event = {"level": "error", "message": message, "rank": info.rank, "node": info.node}
    return _encoded((Kind.EVENT, event), _killed(error))


def unreadable_segment(problem: str) -> bytes:
    """The event and the loss of a journal segment that is set aside."""
    event = {"level": "error", "message": problem}
    return _encoded((Kind.EVENT, event), (Kind.LOSS, {UNREADABLE: 1}))


def lost_bytes(lane: int, start: int | None, end: int, why: str) -> bytes:
    """The event and the loss of bytes of a lane that were acknowledged and are here no longer; start: where
    they begin, None where that is not known."""
    message = f"{described_bytes(lane, start, end)} are lost: {why}"
    event = {"level": "error", "message": message, "lane": lane, "start": start, "end": end}
    return _encoded((Kind.EVENT, event), (Kind.LOSS, {LOST: 1}))


def described_bytes(lane: int, start: int | None, end: int) -> str:
    """A range of a lane in words."""
    if start is None:
        return f"bytes of lane {lane} before offset {end}"
    return f"{end - start} bytes of lane {lane} before offset {end}"


def taken_elsewhere(held: Mapping[int, int]) -> bytes:
    """The event about a producer that the spool does not know, and whose journal begins at these offsets of
    its lanes; b"" where that is the beginning."""
    before = {str(lane): offset for lane, offset in held.items() if offset > 0}
    if not before:
        return b""
    message = (
        f"{sum(before.values())} bytes of before are not here. Either an agent with another spool took them: "
        "then what that one had not delivered comes when it is started again, and not at all if its spool is "
        "gone. Or they lay in a file that was set aside"
    )
    return _encoded((Kind.EVENT, {"level": "warning", "message": message, "before": before}))


def rejected(letter: DeadLetter) -> bytes:
    """The event about a batch that a sink has rejected for good; the same one whenever it is asked for."""
    event = {
        "level": "error",
        "message": f"sink {letter.sink} rejects {letter.records} records for good: {letter.reason}; they are "
        f"kept as dead letter {letter.id}",
        "dead_letter": letter.id,
        "bytes": letter.size,
    }
    return _encoded((Kind.EVENT, event), time_ns=letter.time_ns)


def _killed(error: str) -> tuple[Kind, Mapping[str, object]]:
    return Kind.FINISH, {"status": "killed", "error": error, "records": -1}


def _encoded(*parts: tuple[Kind, Mapping[str, object]], time_ns: int | None = None) -> bytes:
    """Records of one moment: of now, where no other is given."""
    at = time.time_ns() if time_ns is None else time_ns
    return b"".join(
        record.encode_json(kind, data, step=record.NO_STEP, time_ns=at) for kind, data in parts
    )


def _clock(time_ns: int) -> str:
    try:
        when = datetime.fromtimestamp(time_ns // 10**9, tz=timezone.utc)
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns after 1970-01-01"
    return when.strftime("%Y-%m-%d %H:%M:%S")
