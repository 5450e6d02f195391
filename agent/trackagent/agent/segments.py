"""Segment files as an agent finds them, in folders into which others may have put anything.

Only a plain file that is the user's own, with one name and no larger than a segment, is opened; nothing else
is followed, waited for or copied. A file is believed as far as the checksum of its header goes; its records
have checksums of their own.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trackagent.agent import producers
from trackagent.agent.store.contract import ProducerInfo
from trackagent.client.errors import ConfigError
from trackagent.client.hub import Hub
from trackagent.client.record import Kind
from trackagent.client.segment import HEADER_BYTES, SUFFIX, read_header

READ_BYTES = 1024 * 1024
# The largest that a client can be told to make.
MAX_SEGMENT_BYTES = 64 * 1024 * 1024
_LOGGED_ONCE = (Kind.METRICS, Kind.NAMED, Kind.EVENT)


class NotOurs(ValueError):
    """What lies in a journal and no rank of this user can have written: it may lead to anything."""


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A segment file with records, and what its header says."""

    path: Path
    info: ProducerInfo
    lane: int
    base: int
    number: int
    acknowledged: int
    without_sender: bool
    hub: Hub | None
    """Where rank 0 wanted the records; None: wherever this agent delivers to."""

    @property
    def held_from(self) -> int:
        """The first offset of the lane that must still be delivered from here."""
        return max(self.base, self.acknowledged)

    @contextlib.contextmanager
    def mapped(self) -> Iterator[memoryview]:
        """Its bytes, header and all."""
        with _opened(self.path) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with data, memoryview(data) as view:
            yield view


def segment_files(
    folders: list[Path], unreadable: Callable[[Path, Exception], object] = lambda path, error: None
) -> list[SegmentFile]:
    """Those of a journal that have records, in the order of their lanes. `unreadable` is told of every other
    one what is wrong with it."""
    found = []
    for folder in folders:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                segment = _segment_file(path)
            except (ValueError, KeyError, TypeError, producers.BadIdentity) as error:
                unreadable(path, error)
            else:
                found += [segment] if segment is not None else []
    return sorted(found, key=lambda one: (one.lane, one.base))


def pieces(offsets: list[int], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole records, which begin at `offsets`; together [start, end), each of about READ_BYTES."""
    first = start
    for offset in offsets:
        if offset - first >= READ_BYTES:
            yield first, offset
            first = offset
    if first < end:
        yield first, end


def copies(view: memoryview, offsets: list[int]) -> list[int]:
    """Where a record stands that is another one of its segment to the byte. Calls of one lane follow each
    other, so at the same nanosecond there is one: what stands twice was written over something else."""
    found = []
    seen: set[bytes] = set()
    for offset in offsets:
        if view[offset + 8] in _LOGGED_ONCE:
            data = bytes(
                view[offset : offset + int.from_bytes(view[offset : offset + 4], "little")]
            )
            if data in seen:
                found.append(offset)
            seen.add(data)
    return found


def _segment_file(path: Path) -> SegmentFile | None:
    """The one at `path`, None for a spare. ValueError and others, with what is wrong, when it cannot be
    read."""
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return None  # its owner ended while it made it
        header = read_header(file.read(HEADER_BYTES))
        if header is None:
            if any(file.read(8)):
                raise ValueError("there are records but no header")
            return None
    producer_id = bytes.fromhex(str(header.identity["producer_id"]))
    info = producers.checked({**header.identity, "producer_id": producer_id, "hub": ""})
    if producer_id.hex() != path.parent.name:
        raise ValueError(f"it belongs to producer {producer_id.hex()}")
    without_sender = header.identity.get("sender") is False
    return SegmentFile(
        path,
        info,
        header.lane,
        header.base,
        header.number,
        header.acknowledged,
        without_sender,
        _hub(header.identity.get("hub", "")),
    )


def _hub(text: str) -> Hub | None:
    """None also for what a newer client may have written: the records themselves can be read."""
    try:
        return Hub.parse(text)
    except ConfigError:
        return None


def _opened(path: Path) -> BinaryIO:
    """The segment file at `path`, for reading. NotOurs for what no rank of this user has written there:
    nothing else is opened, followed or waited for."""
    _check_ours(path.lstat())
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_ours(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_ours(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotOurs("not a file")
    if status.st_uid != os.geteuid():
        raise NotOurs(f"it belongs to user {status.st_uid}")
    if status.st_nlink > 1:
        raise NotOurs(f"it has {status.st_nlink} names: a hard link")
    if status.st_size > MAX_SEGMENT_BYTES:
        raise NotOurs(f"{status.st_size} bytes: no segment is so large")
