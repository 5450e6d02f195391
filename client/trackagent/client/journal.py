"""The journal: where a record is safe the moment `log()` returns, without a system call.

A journal is one producer's. Its files are segments of fixed size, memory-mapped; what is in them survives
`kill -9`, since the pages are the kernel's. Layout on disk, in one folder a producer:

    <directory>/journals/<producer id>/lock             flock held for as long as the owner lives
    <directory>/journals/<producer id>/00000007.seg     segments, numbered in order of creation
    <state>/journals/<producer id>/...                  the same again, for what did not fit in memory

A **lane** is a stream of records in a chain of segments, written by one log call at a time: a call
takes a lane from a stack, and gives it back when its record is published. Calls that meet (threads,
a signal handler that interrupts a call) get different lanes. So nothing is ever locked, waited for
or torn, and only the last record of a lane can be incomplete. `list.pop` and `list.append` are
atomic in CPython; nothing else is relied on.

Threads: `take`, `give`, `roll`, `write` on any thread and in signal handlers; `prepare`, `unsent`,
`acknowledge` on the sender's thread; `close` when no one logs any more.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from trackagent.client import record
from trackagent.client.errors import JournalError, RunFinished, TooManyCalls
from trackagent.client.folder import ProducerFolder
from trackagent.client.record import Packer
from trackagent.client.segment import (
    HEADER_BYTES,
    LAST_WORDS_BYTES,
    MAX_IDENTITY_BYTES,
    MAX_LANES,
    SUFFIX,
    Segment,
)


class _NoSegment(Segment):
    """What a lane has before its first segment: no room at all."""

    __slots__ = ()

    def __init__(self) -> None:
        self.base = 0
        self.number = 0
        self.position = HEADER_BYTES
        self.limit = -LAST_WORDS_BYTES
        self.previous = None
        self.schemas = {}


_NO_SEGMENT = _NoSegment()


class LaneState:
    """One stream of records. Only who holds its Lane may write; the sender reads.

    `segment` is the current one; assigning it is the one step that makes a new segment part of the lane.
    """

    __slots__ = ("acknowledged", "ended", "number", "records", "segment", "sent")

    def __init__(self, number: int) -> None:
        self.number = number
        self.ended = False
        self.segment: Segment = _NO_SEGMENT
        self.records = 0
        self.sent = 0
        self.acknowledged = 0

    @property
    def offset(self) -> int:
        """Offset in the lane up to which records are published."""
        segment = self.segment
        return segment.base + segment.position - HEADER_BYTES

    def segments(self) -> list[Segment]:
        """Those not yet freed, oldest first."""
        found: list[Segment] = []
        segment: Segment | None = self.segment
        while segment is not None and segment is not _NO_SEGMENT:
            found.append(segment)
            segment = segment.previous
        return found[::-1]


class Lane:
    """The right to write one stream: in the journal's stack, or with the call that has taken it.

    `give_back(lane)` puts it back. A signal handler may raise between a call's taking and its first `try`:
    then nobody holds this object any more, and its end puts another one into the stack.
    """

    __slots__ = ("give_back", "state")

    def __init__(self, state: LaneState, give: Callable[[Lane], None]) -> None:
        self.state = state
        self.give_back = give

    def __del__(self) -> None:
        # Without a state it was never whole: the handler raised while it was made.
        if hasattr(self, "give_back") and not self.state.ended:
            self.give_back(type(self)(self.state, self.give_back))

    @property
    def number(self) -> int:
        """Which of the journal's lanes it is."""
        return self.state.number

    @property
    def segment(self) -> Segment:
        """Where the next record goes, if it fits."""
        return self.state.segment


@dataclass(frozen=True, slots=True)
class Unsent:
    """Published bytes of a lane that are to be sent next."""

    lane: int
    first_offset: int
    journal_bytes: bytes


class Journal:
    """The journal of this process. JournalError when neither folder can hold it.

    `identity`: the fields of trackagent.v1.Producer that go into every segment's header,
    `producer_id` in hex; and `sender`: false where there is none. `wake`: called, from log calls
    too, when the sender has something to prepare; must not block; None: there is no sender, the
    agent reads the files and deletes each that was followed by another. `create`: makes a Segment
    (a seam for faults).
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        *,
        directory: Path,
        state_directory: Path,
        segment_bytes: int,
        memory_bytes: int,
        journal_bytes: int,
        wake: Callable[[], None] | None = None,
        create: Callable[[Path, int, bytes], Segment] = Segment,
    ) -> None:
        self._identity = json.dumps(identity, ensure_ascii=False).encode()
        if len(self._identity) > MAX_IDENTITY_BYTES:
            raise JournalError(
                f"the producer's identity takes {len(self._identity)} bytes, of {MAX_IDENTITY_BYTES}: give a "
                "shorter experiment, run name or groups"
            )
        self._producer_id = str(identity["producer_id"])
        self._segment_bytes = segment_bytes
        self._room = segment_bytes - HEADER_BYTES - LAST_WORDS_BYTES
        self._memory_bytes = memory_bytes
        self._journal_bytes = journal_bytes
        self._wake = wake
        self._create = create
        self._memory = ProducerFolder(directory, self._producer_id)
        self._disk = ProducerFolder(state_directory, self._producer_id)
        self._file_numbers = count()
        self._spares: list[Segment] = []
        self._no_room = ""
        self._sealed = False
        self._sealed_because = ""
        self._schema_ids: dict[tuple[str, ...], int] = {}
        self._next_schema_id = count()
        self._free: list[Lane] = []
        self._lane_numbers = list(range(MAX_LANES))[::-1]
        self._last_lanes: set[Lane] = set()
        self.lanes: dict[int, LaneState] = {}
        self.take = self._free.pop
        self.give = self._free.append
        # Two lanes: the second is for a call that meets another one.
        for _ in range(2):
            self.give(self.add_lane())
        self.prepare()

    # --- on the logging threads

    def add_lane(self) -> Lane:
        """A further lane, taken by the caller. JournalError when there are too many, or no room for
        a segment."""
        if self._sealed_because:
            raise RunFinished(self._sealed_because)
        try:
            lane = Lane(LaneState(self._lane_numbers.pop()), self.give)
        except IndexError:
            raise TooManyCalls(f"more than {MAX_LANES} log calls at once") from None
        self.lanes[lane.number] = lane.state
        try:
            self.roll(lane)
        except JournalError:
            self.give(lane)  # it has its number for good; its next taker tries again
            raise
        return lane

    def roll(self, lane: Lane) -> None:
        """Gives the taken lane a fresh segment. JournalError when there is no room; the lane stays usable."""
        try:
            segment = self._spares.pop()
        except IndexError:
            # The one place where a log call makes system calls: the sender's thread has not kept up.
            if self._no_room and not self._sealed_because:
                raise JournalError(self._no_room) from None
            segment = self._new_segment()
        state = lane.state
        last = state.segment
        number = 0 if last is _NO_SEGMENT else last.number + 1
        segment.publish_header(state.number, state.offset, number, len(self._identity))
        segment.previous = None if last is _NO_SEGMENT else last
        state.segment = segment
        if self._wake is not None:
            self._wake()

    def write(self, lane: Lane, data: bytes, *, last_words: bool = False) -> None:
        """Publishes one encoded record (record.encode) in the taken lane.

        JournalError when there is no room. last_words: the room that each segment keeps for what a full
        journal must still say is used too. ValueRefused when `data` is larger than a segment (no record is
        larger than record.MAX_RECORD_BYTES).
        """
        if len(data) > self._room:
            raise record.too_large(len(data), self._room)
        if lane.segment.position + len(data) > lane.segment.limit:
            try:
                self.roll(lane)
            except JournalError:
                end = lane.segment.position + len(data)
                if not last_words or end > lane.segment.limit + LAST_WORDS_BYTES:
                    raise
        segment = lane.segment
        at = segment.position
        segment.map[at + 8 : at + len(data)] = data[8:]
        segment.words[at >> 3] = int.from_bytes(data[:8], "little")
        segment.position = at + len(data)

    def write_metrics(
        self, lane: Lane, numbers: Mapping[str, float], *, step: int, time_ns: int
    ) -> None:
        """Publishes one metrics record in the taken lane, its SCHEMA before it where the segment lacks it.

        JournalError when there is no room; ValueRefused when it is too large for a segment.
        """
        keys = tuple(numbers)
        packer = lane.segment.schemas.get(keys)
        if packer is None or not self._fits(lane, packer[1]):
            packer = self._define(lane, keys, time_ns)
        if packer is None:
            named = record.encode_named(keys, [*numbers.values()], step=step, time_ns=time_ns)
            self.write(lane, named)
            return
        pack, size, head = packer
        segment = lane.segment
        body = pack(head, step, time_ns, *numbers.values())
        segment.map[segment.position + 8 : segment.position + size] = body
        segment.words[segment.position >> 3] = size | crc32(body) << 32
        segment.position += size

    def _define(self, lane: Lane, keys: tuple[str, ...], time_ns: int) -> Packer | None:
        """What packs records of `keys`, after their SCHEMA record has been published in the lane's
        segment, with room for one; None when all schema ids are taken."""
        number = self._schema_id(keys)
        if number is None:
            return None
        schema = record.encode_schema(number, keys, time_ns=time_ns)
        packer = record.metrics_packer(number, len(keys))
        if not self._fits(lane, len(schema) + packer[1]):
            self.roll(lane)
            if not self._fits(lane, len(schema) + packer[1]):
                raise record.too_large(len(schema) + packer[1], self._room)
        self.write(lane, schema)
        lane.segment.schemas[keys] = packer
        return packer

    def _fits(self, lane: Lane, size: int) -> bool:
        return lane.segment.position + size <= lane.segment.limit

    def _schema_id(self, keys: tuple[str, ...]) -> int | None:
        """The producer's id for these keys, the same in every lane; None when all ids are taken."""
        found = self._schema_ids.get(keys)
        if found is None and len(self._schema_ids) < record.MAX_SCHEMAS:
            found = self._schema_ids.setdefault(keys, next(self._next_schema_id))
        return found

    # --- on the sender's thread

    def prepare(self) -> None:
        """Makes the spare segment and the second lane that log calls may need next. Raises nothing:
        a log call that finds no room reports it."""
        if self._sealed_because:
            return
        try:
            if not self._spares:
                self._spares.append(self._new_segment())
            self._no_room = ""
            if not self._free and len(self.lanes) < MAX_LANES // 2:
                self.give(self.add_lane())
        except JournalError as error:
            self._no_room = str(error)

    def unsent(self, max_bytes: int) -> Iterator[Unsent]:
        """Published bytes not handed out before, whole records, each of one segment and of at most
        `max_bytes` (but one record at least). What the caller does not take is handed out next time.
        """
        for lane in list(self.lanes.values()):
            for segment in lane.segments():
                position = segment.position
                start = max(lane.sent - segment.base + HEADER_BYTES, HEADER_BYTES)
                while start < position:
                    end = (
                        position if position - start <= max_bytes else segment.cut(start, max_bytes)
                    )
                    first = segment.base + start - HEADER_BYTES
                    lane.sent = first + end - start
                    yield Unsent(lane.number, first, bytes(segment.view[start:end]))
                    start = end

    def rewind(self, committed: Mapping[int, int]) -> None:
        """Everything after these offsets (by lane; 0 where not named) and what is still held is to
        be sent again."""
        for lane in list(self.lanes.values()):
            self.acknowledge(lane.number, committed.get(lane.number, 0))
            lane.sent = lane.acknowledged

    def _forget_taken(self, lane: LaneState) -> None:
        """Frees those of the lane's segments that the agent has read and deleted."""
        for segment, following in pairwise(lane.segments()):
            if segment.path.exists():
                break
            lane.acknowledged = following.base
            following.previous = None
            segment.remove()

    def acknowledge(self, number: int, offset: int) -> None:
        """The agent has committed the lane up to `offset`: frees the segments before it."""
        lane = self.lanes.get(number)
        if lane is None:
            return
        lane.acknowledged = max(lane.acknowledged, min(offset, lane.offset))
        segments = lane.segments()
        for segment, following in pairwise(segments):
            if following.base > lane.acknowledged:
                break
            following.previous = None
            segment.remove()
        if segments:
            lane.segments()[0].acknowledge(lane.acknowledged)

    def held(self) -> dict[int, int]:
        """By lane, the oldest offset that is still here."""
        return {lane.number: lane.acknowledged for lane in list(self.lanes.values())}

    def schemas(self, max_bytes: int) -> list[bytes]:
        """The SCHEMA records of the segments still here, as many as fit `max_bytes`."""
        keys = {
            keys
            for lane in list(self.lanes.values())
            for segment in lane.segments()
            for keys in list(segment.schemas)
        }
        found: list[bytes] = []
        for schema in keys:
            encoded = record.encode_schema(self._schema_ids[schema], schema, time_ns=0)
            max_bytes -= len(encoded)
            if max_bytes < 0:
                break
            found.append(encoded)
        return found

    def ends(self) -> dict[int, int]:
        """By lane, the offset up to which records are published."""
        return {lane.number: lane.offset for lane in list(self.lanes.values())}

    @property
    def in_flight(self) -> int:
        """Bytes handed out and not yet acknowledged."""
        return sum(max(lane.sent - lane.acknowledged, 0) for lane in list(self.lanes.values()))

    @property
    def delivered(self) -> bool:
        """Whether everything published has been acknowledged."""
        return all(lane.acknowledged >= lane.offset for lane in list(self.lanes.values()))

    @property
    def records(self) -> int:
        """Metric records published."""
        return sum(lane.records for lane in list(self.lanes.values()))

    # --- at the end

    def seal(self, timeout_s: float, why: str) -> Lane | None:
        """Ends logging: further calls are refused with `why`. Waits for calls under way, then
        returns a lane for the last records; None when a call did not end in time (its thread is
        stopped, or it is interrupted by this very call): then nothing may be deleted, and `close`
        deletes nothing."""
        deadline = time.monotonic() + timeout_s
        self._sealed_because = why
        taken = self._last_lanes
        while len(taken) < len(self.lanes):
            try:
                taken.add(self._free.pop())
            except IndexError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.001)
        self._sealed = len(taken) == len(self.lanes)
        return min(taken, key=lambda lane: lane.number) if taken else None

    def close(self, *, remove: bool = True) -> None:
        """Deletes what has been delivered, leaves the rest to the agent, and gives the locks up.
        Idempotent. remove: the agent knows of the producer's end; else everything is left, since the free
        lock is how it finds out."""
        remove = remove and self._sealed and self.delivered
        if self._sealed:
            held = [segment for lane in self.lanes.values() for segment in lane.segments()]
            for segment in [*self._spares, *held]:
                # Busy: the sender did not end in time. Then it goes with the process.
                with contextlib.suppress(BufferError):
                    segment.unmap()
        self._end_lanes()
        for folder in (self._memory, self._disk):
            folder.close(remove=remove)

    def places(self) -> list[Path]:
        """The folders in which what is not yet delivered lies: `directory`, `state_directory`, or both."""
        found = {
            segment.path.parent
            for lane in list(self.lanes.values())
            for segment in lane.segments()
            if max(segment.base, lane.acknowledged) < segment.base + segment.position - HEADER_BYTES
        }
        return [one.base for one in (self._memory, self._disk) if one.path in found]

    def is_gone(self) -> bool:
        """Whether nothing of it is left on disk: after `close`, the agent has taken the rest."""
        return not (self._memory.path.exists() or self._disk.path.exists())

    def abandon_in_child(self) -> None:
        """In a forked child: gives up what is the parent's, above all the lock, without touching
        the files."""
        self._create = _no_segment_in_child
        for segment in [*self._spares, *(lane.segment for lane in list(self.lanes.values()))]:
            # The parent's sender may just be taking it away.
            if segment is not _NO_SEGMENT and not segment.map.closed:
                segment.abandon_in_child()
        self._end_lanes()
        self._memory.close(remove=False)
        self._disk.close(remove=False)

    def _end_lanes(self) -> None:
        for state in list(self.lanes.values()):
            state.ended = True

    # --- segments

    def _new_segment(self) -> Segment:
        if self._wake is None:
            for lane in list(self.lanes.values()):
                self._forget_taken(lane)
        held = [segment for lane in list(self.lanes.values()) for segment in lane.segments()]
        # One more for the last words of a run whose journal is full.
        reserve = self._segment_bytes if self._sealed_because else 0
        taken = (len(held) + len(self._spares) + 1) * self._segment_bytes
        if taken > self._journal_bytes + reserve:
            raise JournalError(
                f"the journal holds {self._journal_bytes} bytes, its limit: start an agent with "
                "`trackagent start`, or raise TRACKAGENT_JOURNAL_BYTES"
            )
        in_memory = sum(segment.path.parent == self._memory.path for segment in held)
        folders = [self._memory, self._disk]
        if (in_memory + len(self._spares) + 1) * self._segment_bytes > self._memory_bytes:
            folders.reverse()
        name = f"{next(self._file_numbers):08d}{SUFFIX}"
        failures: list[str] = []
        for folder in folders:
            try:
                return self._create(folder.open() / name, self._segment_bytes, self._identity)
            except OSError as error:
                failures.append(f"{folder.path}: {error.strerror or error}")
        self._no_room = (
            f"cannot create a journal segment ({self._segment_bytes} bytes): {'; '.join(failures)}; "
            "free some space, or set TRACKAGENT_DIR and TRACKAGENT_STATE"
        )
        raise JournalError(self._no_room)


def _no_segment_in_child(path: Path, _size: int, _identity: bytes) -> Segment:
    raise OSError(f"{path} is another process's: this one was forked in the middle of a log call")
