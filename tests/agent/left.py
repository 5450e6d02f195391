"""What a rank left behind, and what the spool has of it."""

from __future__ import annotations

from pathlib import Path

from tests.agent.samples import (
    journal,
    log_losses,
    producer,
)
from tests.fakes import Folders
from trackagent.agent.decode import decode
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import Batch, EventData
from trackagent.client import record
from trackagent.client.record import Kind
from trackagent.client.segment import HEADER_BYTES

ID = producer().producer_id
NAME = ID.hex()
MANY = range(2000)  # fill more than one segment
KILLED = ("killed", "the process ended without finish()", -1)


def spooled(spool: Spool) -> Batch:
    """All that waits in the spool, decoded."""
    delivery = spool.next_delivery("store", 1 << 40).result()
    assert delivery is not None
    return decode(delivery, spool.keys)


def steps(spool: Spool) -> list[int]:
    """Of all points in the spool, in order."""
    return [int(step) for points in spooled(spool).points for step in points.steps]


def ends(spool: Spool) -> list[tuple[str, str, int]]:
    return [(end.status, end.error, end.logged) for end in spooled(spool).ends]


def problems(spool: Spool) -> list[EventData]:
    """Events but those that say that a rank died."""
    return [event for event in spooled(spool).events if "last_step" not in event.data]


def nothing_is_spooled(spool: Spool) -> bool:
    return spool.next_delivery("store", 1 << 40).result() is None


def left_behind(folders: Folders, wanted: range = MANY) -> list[Path]:
    """The segments with records of a journal whose owner is gone, in order of their offsets."""
    target = journal(folders)
    log_losses(target, wanted)
    target.close()
    return segments(folders)


def segments(folders: Folders) -> list[Path]:
    """Segment files that hold steps, in their order."""
    found = [path for folder in folders.journals() for path in folder.glob("*.seg")]
    return sorted(filter(steps_in, found), key=steps_in)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def steps_in(path: Path) -> list[int]:
    """The steps of a segment's records."""
    data = path.read_bytes()
    found = (record.decode(data, at) for at in record.scan(data, HEADER_BYTES).offsets)
    return [one.step for one in found if one.kind == Kind.METRICS]
