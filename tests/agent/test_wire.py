"""A batch as one agent tells it to another: it arrives as it was, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.samples import producer
from tests.agent.store.batches import end, event, loss, param, points
from trackagent.agent.store.contract import Batch, BatchId, Gap, Points
from trackagent.agent.wire import BadContent, decode, encode, opened
from trackagent.protos.v1 import hub_pb2

ID = BatchId("ab" * 16, 3, 9)
R0 = producer(0, groups=(("dp", "1"), ("tp", "0")))
R1 = producer(1, forked=True, reduced="", sampled="")
EVERYTHING = Batch(
    ID,
    [R0, R1],
    params=[param(R0, "lr", "1", 5)],
    tags=[param(R1, "note", "größe ✓", 6)],
    events=[event(R0, "a spike", step=4), event(R1, "no step"), event(R1, "at no time", step=0)],
    points=[
        points(R0, range(100)),
        dataclasses.replace(points(R1, [-5, 7], keys=("a", "b")), reduced=True),
    ],
    ends=[end(R0, "failed", error="boom", logged=-1), end(R1, logged=7)],
    losses=[loss(R0, "full", 4), loss(R1, "new", 1, more=True)],
    gaps=[Gap(R0.producer_id, "full", -3, 9, 1, 2, 4)],
    metric_records={R0.producer_id: 100},
)


def same(left: Batch, right: Batch) -> bool:
    return repr(_plain(left)) == repr(_plain(right))


def _plain(batch: Batch) -> dict[str, Any]:
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    fields["producers"] = sorted(batch.producers, key=lambda info: info.producer_id)
    fields["points"] = [
        (
            one.producer_id,
            one.keys,
            one.steps.tolist(),
            one.times_ns.tolist(),
            one.values.tobytes(),
            one.reduced,
        )
        for one in batch.points
    ]
    return {
        name: list(said) if isinstance(said, (list, tuple)) else said
        for name, said in fields.items()
    }


def content(change: Callable[[hub_pb2.Content], object]) -> bytes:
    """That of EVERYTHING with a change."""
    message = hub_pb2.Content.FromString(zstandard.decompress(encode(EVERYTHING)))
    change(message)
    return zstandard.compress(message.SerializeToString())


def test_a_batch_arrives_as_it_was() -> None:
    assert same(decode(encode(EVERYTHING), ID), EVERYTHING)


def test_what_was_copied_from_a_store_arrives_as_such() -> None:
    ids = frozenset(info.producer_id for info in EVERYTHING.producers)
    old = dataclasses.replace(EVERYTHING, history=ids)
    assert decode(encode(old), ID).history == ids
    own = Batch(BatchId("ef" * 16, 7, 8), parts=[(producer(5), part(old))])
    assert opened(own).history == ids


def test_an_empty_batch_arrives() -> None:
    assert same(decode(encode(Batch(ID)), ID), Batch(ID))


@given(
    st.lists(
        st.tuples(
            st.integers(-(1 << 63), (1 << 63) - 1),
            st.integers(-(1 << 63), (1 << 63) - 1),
            st.integers(0, (1 << 64) - 1),
        ),
        max_size=20,
    )
)
def test_every_step_time_and_bit_of_a_value_arrives(rows: list[tuple[int, int, int]]) -> None:
    values = np.array([[bits for _, _, bits in rows]], dtype=np.uint64).view(np.float64)
    sent = Points(
        R0.producer_id,
        ("loss",),
        np.array([step for step, _, _ in rows], dtype=np.int64),
        np.array([time for _, time, _ in rows], dtype=np.int64),
        values,
    )
    batch = Batch(ID, [R0], points=[sent])
    assert same(decode(encode(batch), ID), batch)


BAD: list[tuple[str, Callable[[hub_pb2.Content], object]]] = [
    ("expected 1 to", lambda content: setattr(content.producers[0], "attempt", 0)),
    ("out of range", lambda content: setattr(content.columns[0], "producer", 2)),
    ("out of range", lambda content: setattr(content.events[0], "producer", 4_000_000_000)),
    ("a producer is there twice", lambda content: content.producers.append(content.producers[0])),
    ("not counted for each", lambda content: content.metric_records.append(1)),
    ("not equally long", lambda content: content.columns[0].steps.append(1)),
    ("not equally long", lambda content: content.columns[0].times.pop()),
    ("not equally long", lambda content: setattr(content.columns[0], "values", bytes(8))),
    ("multiple of element size", lambda content: setattr(content.columns[0], "values", bytes(7))),
    ("empty or there twice", lambda content: setattr(content.columns[1], "keys", "a\na")),
    ("empty or there twice", lambda content: setattr(content.columns[0], "keys", "")),
    ("the level", lambda content: setattr(content.events[0], "level", "fatal")),
    ("Expecting", lambda content: setattr(content.events[0], "data", "{")),
    ("no table", lambda content: setattr(content.events[0], "data", "[1]")),
    (
        "nested too deep",
        lambda content: setattr(content.events[0], "data", '{"a":' * 70 + "1" + "}" * 70),
    ),
    ("nested too deep", lambda content: setattr(content.events[0], "data", "[" * 100_000)),
    ("the status", lambda content: setattr(content.ends[0], "status", "asleep")),
    ("records", lambda content: setattr(content.ends[0], "logged", -2)),
    ("records", lambda content: setattr(content.losses[0], "records", 1 << 50)),
    ("ends before it begins", lambda content: setattr(content.gaps[0], "first_step", 10)),
]


@pytest.mark.parametrize(("message", "change"), BAD)
def test_what_cannot_be_is_refused(
    message: str, change: Callable[[hub_pb2.Content], object]
) -> None:
    with pytest.raises(BadContent, match=message):
        decode(content(change), ID)


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(BadContent):
        decode(data, ID)


@given(st.data())
def test_a_content_with_any_byte_changed_is_a_batch_or_refused(data: st.DataObject) -> None:
    plain = bytearray(zstandard.decompress(encode(EVERYTHING)))
    for _ in range(data.draw(st.integers(1, 3))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    try:
        batch = decode(zstandard.compress(bytes(plain)), ID)
    except BadContent:
        return
    assert {one.producer_id for one in batch.points} <= {one.producer_id for one in batch.producers}


def test_more_than_the_limit_is_not_unpacked() -> None:
    bomb = zstandard.compress(bytes(1 << 20))
    with pytest.raises(BadContent, match="larger than 65536 bytes"):
        decode(bomb, ID, limit=1 << 16)


def test_a_size_that_is_not_said_is_not_unpacked() -> None:
    packer = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(BadContent, match="larger than"):
        decode(packer.compress(bytes(64)), ID)


def test_a_size_that_is_a_lie_is_refused() -> None:
    packed = bytearray(zstandard.compress(bytes(1 << 20)))
    at = packed.index(struct.pack("<I", 1 << 20))
    packed[at : at + 4] = struct.pack("<I", 1 << 10)
    with pytest.raises(BadContent):
        decode(bytes(packed), ID)


def part(batch: Batch) -> bytes:
    id_ = batch.id
    return hub_pb2.Part(
        origin=id_.origin, first=id_.first, last=id_.last, content=encode(batch)
    ).SerializeToString()


def test_parts_are_opened_into_the_batch_that_brought_them() -> None:
    forwarder = producer(5, sampled="node b")
    other = Batch(
        BatchId("cd" * 16, 1, 1),
        [R0],
        points=[points(R0, [100])],
        metric_records={R0.producer_id: 1},
    )
    own = Batch(BatchId("ef" * 16, 7, 8), [R1], tags=[param(R1, "a", "b")])
    found = opened(
        dataclasses.replace(own, parts=[(forwarder, part(EVERYTHING)), (forwarder, part(other))])
    )
    assert found.id == own.id
    assert found.includes == [EVERYTHING.id, other.id]
    assert found.parts == ()
    assert found.tags == [*own.tags, *EVERYTHING.tags]
    assert sum(len(one.steps) for one in found.points) == 103
    assert found.metric_records == {R0.producer_id: 101}
    assert {info.producer_id for info in found.producers} == {R0.producer_id, R1.producer_id}


def test_a_part_that_cannot_be_read_any_more_is_told_and_counted() -> None:
    forwarder = producer(5, sampled="node b")
    found = opened(Batch(ID, parts=[(forwarder, b"garbage"), (forwarder, part(EVERYTHING))]))
    assert found.losses[0].records == 1
    assert "that node host-a had forwarded" in found.events[0].message
    assert len(found.points) == len(EVERYTHING.points)
