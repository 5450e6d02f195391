"""Journals that tests write to: small segments, of which ten records fill one."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from tests.fakes import Folders, SegmentFile, read_segments
from trackagent.client import record
from trackagent.client.journal import Journal
from trackagent.client.record import Kind
from trackagent.client.segment import (
    HEADER_BYTES,
    LAST_WORDS_BYTES,
)

SEGMENT_BYTES = 64 * 1024
ROOM = SEGMENT_BYTES - HEADER_BYTES - LAST_WORDS_BYTES
# A record of which ten fill a segment.
TENTH = ROOM // 10 & ~7
IDENTITY = {"producer_id": uuid4().hex, "run_id": "ab" * 16, "rank": 3}


def event(number: int, size: int = TENTH) -> bytes:
    """A record of `size` bytes that tells its number."""
    padding = b"x" * (size - record.HEAD_BYTES - len('{"x":""}'))
    return record.encode(Kind.EVENT, b'{"x":"' + padding + b'"}', step=number, time_ns=0)


def write(journal: Journal, data: bytes) -> int:
    """Writes a record as a log call does; the lane that it went to."""
    lane = journal.take()
    try:
        journal.write(lane, data)
    finally:
        journal.give(lane)
    return lane.number


def fill(journal: Journal, records: int, first: int = 0) -> None:
    for number in range(first, first + records):
        write(journal, event(number))


def memory(folders: Folders) -> Path:
    return folders.directory / "journals" / IDENTITY["producer_id"]


def disk(folders: Folders) -> Path:
    return folders.state / "journals" / IDENTITY["producer_id"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.seg"))


def segments(folder: Path) -> list[SegmentFile]:
    return read_segments(folder)


def steps(folder: Path) -> list[int]:
    """What is in the segments of the lane that the test has written to."""
    return [one.step for segment in segments(folder) for one in segment.records]


def take_all(journal: Journal) -> dict[int, bytes]:
    """Everything unsent, by lane."""
    found: dict[int, bytes] = {}
    for part in journal.unsent(1 << 30):
        found[part.lane] = found.get(part.lane, b"") + part.journal_bytes
    return found
