"""What an agent tells its hub of a batch: in columns, and compressed (hub.proto says the bytes).

A hub that stores what it gets opens the parts; one that passes them on leaves them as they are. Decoding
believes nothing: sizes are bounded before anything is unpacked, every reference and every field is checked,
and a producer is one only if producers.py says so. So a part that was taken can be stored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from trackagent.agent import producers
from trackagent.agent.decode import (
    LEVELS,
    MAX_KEYS_TOGETHER,
    MAX_NESTED,
    MAX_RECORDS,
    STATUSES,
    nested,
)
from trackagent.agent.errors import AgentError
from trackagent.agent.notices import UNREADABLE
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
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
from trackagent.protos.v1 import agent_pb2, hub_pb2

# Of a part's content, unpacked.
MAX_CONTENT_BYTES = 64 * 1024 * 1024
# zstd's own scale; 1 takes a third of the time of 3 and is a twentieth larger on such columns.
_LEVEL = 1
# Producers that need not be checked again.
_REMEMBERED = 16_384
_LISTS = ("params", "tags", "events", "points", "ends", "losses", "gaps")


class BadContent(AgentError):
    """The content of a part cannot be believed; the message says what of it."""


def encode(batch: Batch) -> bytes:
    """Everything that a batch says, but for its ids."""
    content = hub_pb2.Content(history=bool(batch.history))
    number = {info.producer_id: at for at, info in enumerate(batch.producers)}
    content.producers.extend(map(producers.to_message, batch.producers))
    content.metric_records.extend(
        batch.metric_records.get(info.producer_id, 0) for info in batch.producers
    )
    for points in batch.points:
        content.columns.add(
            producer=number[points.producer_id],
            keys="\n".join(points.keys),
            steps=_differences(points.steps),
            times=_differences(points.times_ns),
            values=np.ascontiguousarray(points.values, dtype="<f8").tobytes(),
            reduced=points.reduced,
        )
    for settings, said in ((content.params, batch.params), (content.tags, batch.tags)):
        for setting in said:
            settings.add(producer=number[setting.producer_id], **_without_producer(setting))
    for event in batch.events:
        fields = _without_producer(event)
        fields["data"] = json.dumps(event.data) if event.data else ""
        content.events.add(producer=number[event.producer_id], **fields)
    for end in batch.ends:
        content.ends.add(producer=number[end.producer_id], **_without_producer(end))
    for loss in batch.losses:
        content.losses.add(producer=number[loss.producer_id], **_without_producer(loss))
    for gap in batch.gaps:
        content.gaps.add(producer=number[gap.producer_id], **_without_producer(gap))
    return zstandard.ZstdCompressor(level=_LEVEL).compress(content.SerializeToString())


def opened(batch: Batch) -> Batch:
    """The batch with what its parts say, which are then what it includes. A part that cannot be read, though
    it could when it was taken, is counted as lost."""
    producers_, metric_records = (
        {info.producer_id: info for info in batch.producers},
        dict(batch.metric_records),
    )
    lists: dict[str, Any] = {name: list(getattr(batch, name)) for name in _LISTS}
    includes, history = list(batch.includes), batch.history
    for forwarder, data in batch.parts:
        try:
            part = hub_pb2.Part.FromString(data)
            includes.append(BatchId(part.origin, part.first, part.last))
            inner = decode(part.content, includes[-1])
        except (BadContent, DecodeError) as error:
            producers_[forwarder.producer_id] = forwarder
            lists["losses"].append(Loss(forwarder.producer_id, UNREADABLE, 1, more=True))
            message = (
                f"{UNREADABLE}: {len(data)} bytes that node {forwarder.node} had forwarded: {error}"
            )
            lists["events"].append(
                EventData(forwarder.producer_id, time.time_ns(), "error", message)
            )
            continue
        producers_ |= {info.producer_id: info for info in inner.producers}
        history |= inner.history
        for name, items in lists.items():
            items.extend(getattr(inner, name))
        for id_, records in inner.metric_records.items():
            metric_records[id_] = metric_records.get(id_, 0) + records
    return replace(
        batch,
        producers=list(producers_.values()),
        metric_records=metric_records,
        includes=includes,
        history=history,
        parts=(),
        **lists,
    )


def decode(content: bytes, id_: BatchId, limit: int = MAX_CONTENT_BYTES) -> Batch:
    """The batch that `content` is of, with this id. BadContent otherwise, also for more than `limit` bytes
    unpacked."""
    message = hub_pb2.Content()
    try:
        message.ParseFromString(_unpacked(content, limit))
        return _believed(message, id_)
    except DecodeError:
        raise BadContent("its content is no Content message") from None
    except (producers.BadIdentity, ValueError, TypeError, OverflowError, IndexError) as error:
        raise BadContent(f"its content cannot be believed: {error!s:.300}") from None


def unpacked_bytes(content: bytes) -> int:
    """How large `content` says that it is unpacked; the greatest number where it does not say that, or is not
    compressed at all. `decode` unpacks no more."""
    try:
        return int(zstandard.get_frame_parameters(content).content_size)
    except zstandard.ZstdError:
        return zstandard.CONTENTSIZE_UNKNOWN


def _unpacked(content: bytes, limit: int) -> bytes:
    try:
        size = zstandard.get_frame_parameters(content).content_size
        if size > limit:  # also where it is not said: CONTENTSIZE_UNKNOWN is the greatest number
            raise BadContent(f"its content would be larger than {limit} bytes")
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(
            content, max_output_size=limit, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise BadContent(f"its content is not compressed with zstd: {error}") from None


def _believed(content: hub_pb2.Content, id_: BatchId) -> Batch:
    infos = [_info(message.SerializeToString(deterministic=True)) for message in content.producers]
    ids = [info.producer_id for info in infos]
    if len(set(ids)) != len(ids):
        raise ValueError("a producer is there twice")
    if len(content.metric_records) != len(ids):
        raise ValueError("metric records are not counted for each producer")
    return Batch(
        id=id_,
        producers=infos,
        params=_settings(ids, content.params),
        tags=_settings(ids, content.tags),
        events=[_event(ids, event) for event in content.events],
        points=[_points(ids, columns) for columns in content.columns],
        ends=[_end(ids, end) for end in content.ends],
        losses=[
            Loss(_one(ids, loss.producer), loss.reason, _records(loss.records), loss.more)
            for loss in content.losses
        ],
        gaps=[_gap(ids, gap) for gap in content.gaps],
        metric_records={
            id_: _records(records)
            for id_, records in zip(ids, content.metric_records, strict=True)
            if records
        },
        history=frozenset(ids if content.history else ()),
    )


@lru_cache(maxsize=_REMEMBERED)
def _info(message: bytes) -> ProducerInfo:
    """Remembered: agents say the same of the same ranks with every part, and to check it takes longer than
    all the rest of it."""
    return producers.from_message(agent_pb2.Producer.FromString(message))


def _one(ids: Sequence[bytes], number: int) -> bytes:
    """The producer at a position, which protobuf has made sure is not negative."""
    return ids[number]


def _points(ids: Sequence[bytes], columns: hub_pb2.Columns) -> Points:
    keys = tuple(columns.keys.split("\n"))
    if len(keys) > MAX_KEYS_TOGETHER or len(set(keys)) != len(keys) or "" in keys:
        raise ValueError("keys are too many, empty or there twice")
    steps, times_ns = _sums(columns.steps), _sums(columns.times)
    values: Floats = np.frombuffer(columns.values, dtype="<f8").astype(np.float64)
    if len(times_ns) != len(steps) or len(values) != len(keys) * len(steps):
        raise ValueError("columns are not equally long")
    by_key = values.reshape(len(keys), len(steps))
    return Points(_one(ids, columns.producer), keys, steps, times_ns, by_key, columns.reduced)


def _settings(ids: Sequence[bytes], settings: Any) -> list[Setting]:
    return [Setting(_one(ids, one.producer), one.key, one.value, one.time_ns) for one in settings]


def _event(ids: Sequence[bytes], event: hub_pb2.Event) -> EventData:
    if event.level not in LEVELS:
        raise ValueError(f"the level {event.level!r:.80}")
    try:
        data = json.loads(event.data) if event.data else {}
    except RecursionError:
        raise ValueError("the data of an event is nested too deep to be read") from None
    if not isinstance(data, dict) or nested(data, MAX_NESTED):
        raise ValueError("the data of an event is no table, or nested too deep")
    step = event.step if event.HasField("step") else None
    return EventData(
        _one(ids, event.producer), event.time_ns, event.level, event.message, step, data
    )


def _end(ids: Sequence[bytes], end: hub_pb2.End) -> ProducerEnd:
    if end.status not in STATUSES:
        raise ValueError(f"the status {end.status!r:.80}")
    logged = -1 if end.logged == -1 else _records(end.logged)
    return ProducerEnd(_one(ids, end.producer), end.time_ns, end.status, end.error, logged)


def _gap(ids: Sequence[bytes], gap: hub_pb2.Gap) -> Gap:
    if gap.first_step > gap.last_step:
        raise ValueError("a gap that ends before it begins")
    return Gap(
        _one(ids, gap.producer),
        gap.reason,
        gap.first_step,
        gap.last_step,
        gap.first_time_ns,
        gap.last_time_ns,
        _records(gap.records),
    )


def _records(number: int) -> int:
    if not 0 <= number < MAX_RECORDS:
        raise OverflowError(f"{number} records")
    return number


def _differences(values: Ints) -> list[int]:
    # Of integers of any size: the difference of two that fit 64 bits may not, and wraps around.
    found: list[int] = np.diff(values, prepend=0).tolist()
    return found


def _sums(differences: Sequence[int]) -> Ints:
    array = np.array(differences, dtype=np.int64)
    return array.cumsum(dtype=np.int64) if len(array) > 1 else array


def _without_producer(said: Any) -> dict[str, Any]:
    fields = {name: getattr(said, name) for name in said.__slots__ if name != "producer_id"}
    return {name: value for name, value in fields.items() if value is not None}
