"""From journal bytes to what they say: a delivery of the spool becomes a batch for a store.

Pure: the same delivery always gives the same batch. Metric records, which are nearly all, are never looked
at one by one, apart from their checksum: those of one schema become arrays in a few numpy calls.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trackagent.agent.notices import UNREADABLE
from trackagent.agent.spool import AGENT_LANE, Delivery, SpooledBatch
from trackagent.agent.spooltables import FORWARDED_LANE
from trackagent.agent.store.contract import (
    Batch,
    EventData,
    Floats,
    Gap,
    Ints,
    Loss,
    Points,
    ProducerEnd,
    ProducerInfo,
    Setting,
)
from trackagent.client import record
from trackagent.client.record import NO_STEP, Kind

# The keys of a schema id of a producer (by its number in the spool).
Keys = Callable[[int, int], "tuple[str, ...] | None"]

LEVELS = ("info", "warning", "error")
STATUSES = ("finished", "failed", "killed")
# Short batches of a lane are decoded together, about so much at once: most of it is the same work for one.
TOGETHER_BYTES = 256 * 1024
# Records with more keys become several Points: stores limit their columns.
MAX_KEYS_TOGETHER = 4096
# Containers within containers in what an event carries.
MAX_NESTED = 64
# What one producer may say that it logged or lost.
MAX_RECORDS = 1 << 40
_SHOWN_PARTS = 10
_SHOWN_CHARACTERS = 200


@dataclass(slots=True)
class _Decoded:
    producers: dict[bytes, ProducerInfo] = field(default_factory=dict)
    params: list[Setting] = field(default_factory=list)
    tags: list[Setting] = field(default_factory=list)
    events: list[EventData] = field(default_factory=list)
    ends: list[ProducerEnd] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    metric_records: dict[bytes, int] = field(default_factory=lambda: defaultdict(int))
    # (producer, keys) → arrays: steps (n,), times (n,), values (n, keys)
    points: dict[tuple[bytes, tuple[str, ...]], list[tuple[Ints, Ints, Floats]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def take_metrics(self, other: _Decoded) -> None:
        for series, arrays in other.points.items():
            self.points[series] += arrays
        for producer_id, records in other.metric_records.items():
            self.metric_records[producer_id] += records


def decode(delivery: Delivery, keys: Keys) -> Batch:
    """What `delivery` says; what other agents forwarded is not looked into. Records that cannot be read are
    left out and counted as lost, and an event in their run says what and why."""
    decoded = _Decoded()
    parts = [one for one in delivery.batches if one.lane == FORWARDED_LANE]
    own = [one for one in delivery.batches if one.lane != FORWARDED_LANE]
    for spooled in own:
        decoded.producers[spooled.producer.producer_id] = spooled.producer
    # By the number of the first of them, so that what a lane says stays in its order.
    together: dict[int, _Decoded] = {}
    covered: set[int] = set()
    for part in _parts(own):
        if len(part) > 1 and (found := _decoded_together(part, keys)) is not None:
            together[part[0].number] = found
            covered.update(spooled.number for spooled in part)
    for spooled in own:
        if spooled.number in together:
            decoded.take_metrics(together[spooled.number])
        elif spooled.number not in covered:
            _decode_batch(spooled, keys, decoded)
    return Batch(
        id=delivery.id,
        producers=list(decoded.producers.values()),
        params=decoded.params,
        tags=decoded.tags,
        events=decoded.events,
        points=[part for item in decoded.points.items() for part in _joined(*item)],
        ends=decoded.ends,
        losses=decoded.losses,
        gaps=decoded.gaps,
        metric_records=dict(decoded.metric_records),
        parts=[(one.producer, one.journal_bytes) for one in parts],
    )


def _parts(batches: Sequence[SpooledBatch]) -> Iterator[list[SpooledBatch]]:
    """Batches that follow each other in their lane, up to about TOGETHER_BYTES of them."""
    parts: dict[tuple[int, int], list[SpooledBatch]] = {}
    sizes: dict[tuple[int, int], int] = {}
    for spooled in batches:
        lane = (spooled.producer_number, spooled.lane)
        part = parts.get(lane)
        if part is not None:
            before = part[-1]
            end = before.first_offset + len(before.journal_bytes)
            if spooled.first_offset != end or sizes[lane] >= TOGETHER_BYTES:
                yield parts.pop(lane)
                part = None
        if part is None:
            part = parts[lane] = []
            sizes[lane] = 0
        part.append(spooled)
        sizes[lane] += len(spooled.journal_bytes)
    yield from parts.values()


def _decoded_together(part: Sequence[SpooledBatch], keys: Keys) -> _Decoded | None:
    """What a lane's batches say that are nothing but metric records without a fault; None where they are not:
    then each is looked at by itself."""
    data = b"".join(spooled.journal_bytes for spooled in part)
    scan = record.scan(data)
    if scan.damage or scan.end < len(data):
        return None
    offsets = np.array(scan.offsets, dtype=np.int64)
    if not (np.frombuffer(data, dtype=np.uint8)[offsets + 8] == Kind.METRICS).all():
        return None
    found = _Decoded()
    return None if _decode_metrics(part[0], data, offsets, keys, found) else found


def _joined(
    series: tuple[bytes, tuple[str, ...]], parts: Sequence[tuple[Ints, Ints, Floats]]
) -> Iterator[Points]:
    producer_id, keys = series
    steps, times_ns, values = parts[0]
    if len(parts) > 1:
        steps = np.concatenate([steps for steps, _, _ in parts])
        times_ns = np.concatenate([times for _, times, _ in parts])
        values = np.concatenate([values for _, _, values in parts])
    values = values.T
    for first in range(0, len(keys), MAX_KEYS_TOGETHER):
        columns = slice(first, first + MAX_KEYS_TOGETHER)
        yield Points(
            producer_id, keys[columns], steps, times_ns, np.ascontiguousarray(values[columns])
        )


def _decode_batch(spooled: SpooledBatch, keys: Keys, out: _Decoded) -> None:
    data = spooled.journal_bytes
    scan = record.scan(data)
    # How many records at least, and what.
    unreadable = [(1, f"{part.end - part.start} bytes: {part.reason}") for part in scan.damage]
    if scan.end < len(data):
        unreadable.append((1, f"{len(data) - scan.end} bytes at the end of a batch"))
    if scan.offsets:
        offsets = np.array(scan.offsets, dtype=np.int64)
        octets = np.frombuffer(data, dtype=np.uint8)
        kinds = octets[offsets + 8]
        metrics = offsets[kinds == Kind.METRICS]
        unreadable += _decode_metrics(spooled, data, metrics, keys, out)
        for offset in offsets[kinds != Kind.METRICS].tolist():
            try:
                _decode_other(spooled, record.decode(data, offset), out)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                reason = f"{error!r:.{_SHOWN_CHARACTERS}}"
                unreadable.append((1, f"a record of kind {data[offset + 8]}: {reason}"))
    if unreadable:
        records = sum(number for number, _ in unreadable)
        parts = [what for _, what in unreadable]
        out.losses.append(Loss(spooled.producer.producer_id, UNREADABLE, records, more=True))
        out.events.append(
            EventData(
                producer_id=spooled.producer.producer_id,
                time_ns=_last_time(data, scan.offsets),
                level="error",
                message=f"{UNREADABLE}: {'; '.join(parts[:_SHOWN_PARTS])}",
                data={
                    "lane": spooled.lane,
                    "offset": spooled.first_offset,
                    "parts": len(parts),
                },
            )
        )


def _decode_metrics(
    spooled: SpooledBatch, data: bytes, offsets: Ints, keys: Keys, out: _Decoded
) -> list[tuple[int, str]]:
    """All METRICS records, which start at `offsets` of `data`, of a batch or of those that follow it too;
    returns how many could not be read, and of what."""
    unreadable: list[tuple[int, str]] = []
    # Records start at multiples of 8, so all of their fields lie in these two views.
    words = np.frombuffer(data, dtype="<i8", count=len(data) // 8)
    numbers = words.view("<f8")
    heads = words[offsets // 8 + 1]
    producer_id = spooled.producer.producer_id
    for head in sorted(set(heads.tolist())):
        schema_id = head >> 16 & 0xFFFF
        count = head >> 32 & 0xFFFFFFFF
        starts = offsets[heads == head] // 8
        names = keys(spooled.producer_number, schema_id)
        whole = words[starts] & 0xFFFFFFFF == record.HEAD_BYTES + 8 * count
        if names is None or len(names) != count or not _distinct(names):
            whole[:] = False
        if not whole.all():
            bad = len(starts) - int(whole.sum())
            unreadable.append((bad, f"{bad} records of schema {schema_id}"))
        starts = starts[whole]
        if names is None or not len(starts):
            continue
        values = numbers[starts[:, None] + np.arange(4, 4 + count)]
        out.points[producer_id, names].append((words[starts + 2], words[starts + 3], values))
        out.metric_records[producer_id] += len(starts)
    return unreadable


def _decode_other(spooled: SpooledBatch, found: record.Record, out: _Decoded) -> None:
    producer_id, time_ns = spooled.producer.producer_id, found.time_ns
    data: dict[str, Any] = dict(found.data or {})
    # JSON may spell text that has no UTF-8; one such record must not make a store refuse the whole batch.
    json.dumps(data, ensure_ascii=False).encode()
    # Nor make one that reads the run run into the limit of recursion.
    if nested(data, MAX_NESTED):
        raise ValueError(f"nested more than {MAX_NESTED} deep")
    if found.kind == Kind.NAMED:
        if not _distinct(found.keys):
            raise ValueError("a key is empty or there twice")
        values = np.array([found.values])
        steps, times = np.array([found.step]), np.array([time_ns])
        out.points[producer_id, found.keys].append((steps, times, values))
        out.metric_records[producer_id] += 1
    elif found.kind in (Kind.PARAMS, Kind.TAGS):
        settings = out.params if found.kind == Kind.PARAMS else out.tags
        settings += [Setting(producer_id, str(k), str(v), time_ns) for k, v in data.items()]
    elif found.kind == Kind.EVENT:
        level, message = data.pop("level"), data.pop("message")
        step = None if found.step == NO_STEP else found.step
        if level not in LEVELS:
            raise ValueError(f"level {level!r}")
        out.events.append(EventData(producer_id, time_ns, level, str(message), step, data))
    elif found.kind == Kind.FINISH:
        status, logged = data["status"], _records(data["records"], low=-1)
        if status not in STATUSES:
            raise ValueError(f"status {status!r}")
        out.ends.append(ProducerEnd(producer_id, time_ns, status, str(data["error"]), logged))
    elif found.kind == Kind.LOSS:
        # A producer counts from its beginning; what the agent itself says comes on top each time.
        more = spooled.lane == AGENT_LANE
        out.losses += [Loss(producer_id, reason, _records(n), more) for reason, n in data.items()]
    elif found.kind == Kind.GAP:
        places = ("first_step", "last_step", "first_time_ns", "last_time_ns")
        figures = {name: _number(data[name]) for name in places}
        if figures["first_step"] > figures["last_step"]:
            raise ValueError("a gap that ends before it begins")
        records = _records(data["records"])
        if not isinstance(data["reason"], str):
            raise TypeError(f"the reason {data['reason']!r}")
        out.gaps.append(Gap(producer_id, data["reason"], **figures, records=records))


def _distinct(keys: Sequence[str]) -> bool:
    return len(set(keys)) == len(keys) and "" not in keys


def nested(value: Any, levels: int) -> bool:
    """Whether there are containers more than `levels` deep in each other."""
    row = [value]
    for _ in range(levels + 1):
        row = [
            item
            for outer in row
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(row)


def _number(value: Any) -> int:
    """A step or a time; OverflowError when it is none that fits a store."""
    number = int(value)
    if not NO_STEP <= number < 1 << 63:
        raise OverflowError(f"the number {value!r}")
    return number


def _records(value: Any, low: int = 0) -> int:
    """A number of records; OverflowError for one that cannot be true: sums of them must fit a store."""
    number = int(value)
    if not low <= number < MAX_RECORDS:
        raise OverflowError(f"the number {value!r}")
    return number


def _last_time(data: bytes, offsets: Sequence[int]) -> int:
    """A time for an event about a batch, the same whenever it is decoded: that of its last readable
    record."""
    return int(record.HEAD.unpack_from(data, offsets[-1])[7]) if offsets else 0
