"""What can be known of a damaged spool: from rows as they lie on its pages to what a new one begins with.

Every row of a spool carries a checksum over its table and its columns (spooltables.py), so what is found
anywhere on the pages is believed or not, row by row. Rows may be older states: offsets and cursors only grow,
the greatest counts.

Nothing is delivered twice: batches are brought over with their numbers, and only when the spool's name (its
`origin`) is known, since with both a sink can tell what it has; new numbers begin far above any given before.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

from trackagent.agent.pages import Cell, Pages, Place, Value, columns
from trackagent.agent.spooltables import SinkState, checksum

# More batches than can have been lost.
NUMBERS_SKIPPED = 1 << 32
BATCH_COLUMNS = 11
MAX_ROW_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class BatchHead:
    """A row of `batches` without its bytes."""

    number: int
    producer: int
    lane: int
    first_offset: int
    size: int
    previous: int
    content: int
    place: Place

    @property
    def end(self) -> int:
        return self.first_offset + self.size


@dataclass(frozen=True, slots=True)
class Hole:
    """Bytes of a lane before offset `end` that are gone; start None: from where on is not known."""

    producer: int
    lane: int
    start: int | None
    end: int


@dataclass(slots=True)
class Salvaged:
    """What a new spool begins with. producers: number → (producer_id, info, ended_ns); lanes: (producer,
    lane) → (committed, last batch). ownerless: batches, and bytes of them, whose producer is not known any
    more; lost: all such batches there ever were; renamed: the last number that was given under another
    name."""

    origin: str | None = None
    first_number: int = 1
    lost: int = 0
    renamed: int = 0
    producers: dict[int, tuple[bytes, str, int | None]] = field(default_factory=dict)
    lanes: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    schemas: dict[tuple[int, int], str] = field(default_factory=dict)
    arrived: list[tuple[str, int, int]] = field(default_factory=list)
    sinks: dict[str, SinkState] = field(default_factory=dict)
    batches: list[BatchHead] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    ownerless: tuple[int, int] = (0, 0)


def salvaged(pages: Pages) -> Salvaged:
    """Everything that can be read on `pages` and is true."""
    found = _Rows(pages)
    origin, first_number, lost, renamed = found.spool
    if origin is None:
        origin = next((sink.origin for sink in found.sinks.values()), None)
    known = found.last_producers()
    result = Salvaged(
        origin=origin,
        first_number=max(first_number, found.highest + NUMBERS_SKIPPED),
        lost=lost,
        renamed=renamed,
        producers=known,
        schemas={key: text for key, text in found.schemas.items() if key[0] in known},
        lanes={key: lane for key, lane in found.lanes.items() if key[0] in known},
        arrived=sorted(found.arrived),
        sinks=found.sinks,
    )
    heads = sorted(found.batches.values(), key=lambda head: head.number)
    # Up to here every sink has everything; batches go from the front only.
    done = heads[0].number - 1 if heads else found.highest
    if result.sinks:
        done = min(sink.cursor for sink in result.sinks.values())
    heads = [head for head in heads if head.number > done]
    owned = [head for head in heads if head.producer in known]
    result.ownerless = (
        len(heads) - len(owned),
        sum(head.size for head in heads) - sum(head.size for head in owned),
    )
    result.lost += result.ownerless[0]
    if origin is not None:
        _place(result, owned, done)
    else:  # a sink may have them, and there is no name by which to ask
        result.holes = [Hole(h.producer, h.lane, h.first_offset, h.end) for h in owned]
    for head in owned:
        committed, last = result.lanes.get((head.producer, head.lane), (0, 0))
        result.lanes[head.producer, head.lane] = max(committed, head.end), last
    _link(result)
    return result


def _place(result: Salvaged, heads: list[BatchHead], done: int) -> None:
    """Takes the batches whose bytes are new to their lanes, and finds what is missing between them."""
    there = {head.number for head in heads}
    ends: dict[tuple[int, int], int] = {}
    for head in heads:
        key = head.producer, head.lane
        before = ends.get(key)
        if before is not None and head.first_offset < before:
            continue  # written once more after its commit had failed
        gap = before is not None and head.first_offset > before
        if gap or (before is None and head.previous > done and head.previous not in there):
            result.holes.append(Hole(*key, before, head.first_offset))
        ends[key] = head.end
        result.batches.append(head)
    for key, (committed, last) in result.lanes.items():
        if last > done and last not in there and committed > ends.get(key, 0):
            result.holes.append(Hole(*key, ends.get(key), committed))


def _link(result: Salvaged) -> None:
    """Lets each batch, and each lane, name the batch before among those that are kept: what is missing is
    told once."""
    last: dict[tuple[int, int], int] = {}
    for at, head in enumerate(result.batches):
        key = head.producer, head.lane
        result.batches[at] = replace(head, previous=last.get(key, 0))
        last[key] = head.number
    for key, (committed, _) in result.lanes.items():
        result.lanes[key] = committed, last.get(key, 0)


class _Rows:
    """The rows with a good checksum on some pages, the last state of each. spool: its name, or None, and its
    other columns. highest: the greatest number that a batch is known to have had."""

    def __init__(self, pages: Pages) -> None:
        self.spool: tuple[str | None, int, int, int] = None, 1, 0, 0
        self.producers: dict[int, tuple[bytes, str, int | None]] = {}
        self.lanes: dict[tuple[int, int], tuple[int, int]] = {}
        self.schemas: dict[tuple[int, int], str] = {}
        # What came stays so: older states say the truth, and less of it.
        self.arrived: set[tuple[str, int, int]] = set()
        self.sinks: dict[str, SinkState] = {}
        self.batches: dict[int, BatchHead] = {}
        self.highest = 0
        self._pages = pages
        take: dict[str, Callable[..., None]] = {
            "spool": self._take_spool,
            "producers": self._take_producer,
            "lanes": self._take_lane,
            "schemas": self._take_schema,
            "arrived": lambda *range_: self.arrived.add(range_),
            "sinks": self._take_sink,
        }
        for cell in pages.cells():
            values = columns(cell.local, cell.size)
            if values is None:
                continue
            if values[0] is None:  # it is the row's number
                values[0] = cell.rowid
            if len(values) == BATCH_COLUMNS:
                self._take_batch(cell, values)
                continue
            if len(cell.local) < cell.size <= MAX_ROW_BYTES:
                whole = columns(pages.payload(cell), cell.size)
                values = [values[0], *whole[1:]] if whole else values
            *fields, known = values
            for table, taken in take.items():
                if checksum(table, *fields) == known:
                    taken(*fields)

    def last_producers(self) -> dict[int, tuple[bytes, str, int | None]]:
        """Each producer once: one that was forgotten and came again has its later number."""
        numbers = {producer[0]: number for number, producer in sorted(self.producers.items())}
        return {number: self.producers[number] for number in numbers.values()}

    def _take_batch(self, cell: Cell, values: list[Value]) -> None:
        *fields, known, _ = values
        if checksum("batches", *fields) != known:
            return
        numbers = typing.cast("tuple[int, int, int, int, int, int, int]", tuple(fields[:7]))
        head = BatchHead(*numbers, cell.place)
        self.highest = max(self.highest, head.number)
        other = self.batches.get(head.number)
        if other is None or not batch_bytes(self._pages, other)[1]:
            self.batches[head.number] = head

    def _take_spool(self, _: Any, origin: Any, *figures: Any) -> None:
        # A spool that gets another name begins with a greater number.
        if self.spool[0] is None or figures >= self.spool[1:]:
            self.spool = origin, *figures

    def _take_producer(self, number: Any, producer_id: Any, info: Any, ended_ns: Any) -> None:
        if number not in self.producers or ended_ns is not None:
            self.producers[number] = producer_id, info, ended_ns

    def _take_lane(self, producer: Any, lane: Any, committed: Any, last: Any) -> None:
        self.highest = max(self.highest, last)
        before = self.lanes.get((producer, lane), (0, 0))
        self.lanes[producer, lane] = max(before, (committed, last))

    def _take_schema(self, producer: Any, schema_id: Any, keys: Any) -> None:
        self.schemas[producer, schema_id] = keys

    def _take_sink(self, name: Any, origin: Any, cursor: Any, planned: Any, rejected: Any) -> None:
        self.highest = max(self.highest, cursor, planned or 0)
        before = self.sinks.get(name)
        if before is None or (cursor, planned or 0) >= (before.cursor, before.planned or 0):
            self.sinks[name] = SinkState(origin, cursor, planned, rejected)


def batch_bytes(pages: Pages, head: BatchHead) -> tuple[bytes, bool]:
    """The bytes of a batch, zeros for what cannot be read, and whether they are what was written."""
    best = b""
    cell = pages.cell(head.place)
    for view in range(pages.views - 1, -1, -1):
        if cell is None:
            break
        payload = pages.payload(cell, view)
        values = columns(payload, cell.size)
        data = values[-1] if values and len(values) == BATCH_COLUMNS else b""
        data = data if isinstance(data, bytes) else b""
        if len(data) == head.size and crc32(data) == head.content:
            return data, True
        best = max(best, data, key=len)
    return best[: head.size] + bytes(max(0, head.size - len(best))), False
