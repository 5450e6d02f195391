"""Decoding: what the bytes say, to the bit, and no bytes that it cannot take."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trackagent.agent.store as store
from tests.agent.samples import (
    LOSS_KEYS,
    RUN_ID,
    TIME_NS,
    losses,
    metrics,
    metrics_of_bits,
    payload,
    producer,
    said,
    schema,
)
from tests.fuzz import examples
from trackagent.agent import decode as decode_module
from trackagent.agent.decode import MAX_KEYS_TOGETHER, decode
from trackagent.agent.spool import Delivery, SpooledBatch
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    EventData,
    Gap,
    Loss,
    Points,
    ProducerEnd,
    Setting,
)
from trackagent.client import record
from trackagent.client.record import NO_STEP, Kind

ID = producer().producer_id
KEYS: Mapping[int, tuple[str, ...]] = {0: LOSS_KEYS, 1: ("accuracy",), 2: ("twice", "twice")}


def gap_data(**changes: object) -> bytes:
    """The payload of a GAP record."""
    data = {"reason": "full", "first_step": -3, "last_step": 8, "records": 5}
    return json.dumps(data | {"first_time_ns": 1, "last_time_ns": 2} | changes).encode()


def delivery(*batches: bytes, first: int = 1) -> Delivery:
    """One lane of one producer in these batches."""
    offsets = [sum(map(len, batches[:number])) for number in range(len(batches))]
    return Delivery(
        BatchId("origin", first, first + len(batches) - 1),
        [
            SpooledBatch(first + number, 1, producer(), 0, offsets[number], data)
            for number, data in enumerate(batches)
        ],
    )


def decoded(*batches: bytes) -> Batch:
    return decode(delivery(*batches), lambda number, schema_id: KEYS.get(schema_id))


def steps(batch: Batch) -> list[int]:
    """The steps of all points."""
    return [step for points in batch.points for step in points.steps.tolist()]


def same(one: Batch, other: Batch) -> bool:
    """Equal to the bit."""

    def plain(points: Points) -> tuple[object, ...]:
        arrays = (points.steps, points.times_ns, points.values)
        return (points.producer_id, points.keys, *((a.shape, a.tobytes()) for a in arrays))

    def rest(batch: Batch) -> tuple[object, ...]:
        fields = ("id", "producers", "params", "tags", "events", "ends", "losses", "metric_records")
        return tuple(repr(getattr(batch, name)) for name in fields)

    return (rest(one), [*map(plain, one.points)]) == (rest(other), [*map(plain, other.points)])


def in_order(*batches: Batch) -> dict[tuple[str, ...], list[tuple[int, int, bytes]]]:
    """By keys, step, time and values of each record."""
    found: dict[tuple[str, ...], list[tuple[int, int, bytes]]] = {}
    for points in (points for batch in batches for points in batch.points):
        values = (row.tobytes() for row in points.values.T)
        rows = zip(points.steps.tolist(), points.times_ns.tolist(), values, strict=True)
        found.setdefault(points.keys, []).extend(rows)
    return found


# --- metrics

BITS = {
    "zero": struct.pack("<d", 0.0),
    "negative zero": struct.pack("<d", -0.0),
    "infinity": struct.pack("<d", float("inf")),
    "negative infinity": struct.pack("<d", float("-inf")),
    "quiet NaN": bytes.fromhex("000000000000f87f"),
    "negative NaN with a payload": bytes.fromhex("efbeadde0000f8ff"),
    "signalling NaN": bytes.fromhex("010000000000f07f"),
    "smallest": bytes.fromhex("0100000000000000"),
}


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_a_value_is_kept_to_the_bit(bits: bytes) -> None:
    batch = decoded(metrics_of_bits(1, 0, bits))
    assert batch.points[0].values.tobytes() == bits


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_a_value_with_its_own_name_is_kept_to_the_bit(bits: bytes) -> None:
    batch = decoded(payload(Kind.NAMED, bits + b"name", count=1))
    assert batch.points[0].values.tobytes() == bits


def test_records_of_one_schema_share_their_arrays() -> None:
    (points,) = decoded(metrics(0, 1, 0.5, 0.1), metrics(0, 2, 0.25, 0.1)).points
    assert (points.keys, points.steps.tolist(), points.values.tolist()) == (
        LOSS_KEYS,
        [1, 2],
        [[0.5, 0.25], [0.1, 0.1]],
    )


def test_times_are_kept() -> None:
    (points,) = decoded(metrics(1, 7, 0.5)).points
    assert points.times_ns.tolist() == [TIME_NS + 7]


def test_steps_may_be_any_64_bits() -> None:
    extremes = [2**63 - 1, -(2**63)]
    records = (
        record.encode(Kind.METRICS, bytes(8), step=step, time_ns=0, schema_id=1, count=1)
        for step in extremes
    )
    assert steps(decoded(b"".join(records))) == extremes


def test_the_order_is_that_of_arrival_not_of_steps() -> None:
    batch = decoded(metrics(1, 5, 0.0) + metrics(1, 3, 0.0), metrics(1, 4, 0.0))
    assert steps(batch) == [5, 3, 4]


def test_interleaved_schemas_keep_each_their_order() -> None:
    data = b"".join(
        metrics(0, step, 0.0, 0.0) if step % 2 else metrics(1, step, 0.0) for step in range(6)
    )
    found = {points.keys: points.steps.tolist() for points in decoded(data).points}
    assert found == {LOSS_KEYS: [1, 3, 5], ("accuracy",): [0, 2, 4]}


def test_records_that_carry_their_names_are_points_like_others() -> None:
    batch = decoded(record.encode_named(("a", "b"), (1.0, 2.0), step=3, time_ns=TIME_NS))
    (points,) = batch.points
    assert (points.keys, points.steps.tolist(), points.values.tolist()) == (
        ("a", "b"),
        [3],
        [[1.0], [2.0]],
    )


def test_every_metric_record_is_counted_for_its_producer() -> None:
    named = record.encode_named(("a",), (1.0,), step=0, time_ns=TIME_NS)
    assert decoded(losses(range(5)) + named + metrics(1, 0, 0.0)).metric_records == {ID: 7}


def test_a_record_of_very_many_keys_is_split_by_keys() -> None:
    keys = tuple(f"k{number}" for number in range(MAX_KEYS_TOGETHER + 1))
    batch = decoded(record.encode_named(keys, range(len(keys)), step=0, time_ns=TIME_NS))
    assert [(points.keys, points.values[:, 0].tolist()) for points in batch.points] == [
        (keys[:MAX_KEYS_TOGETHER], [float(n) for n in range(MAX_KEYS_TOGETHER)]),
        (keys[MAX_KEYS_TOGETHER:], [float(MAX_KEYS_TOGETHER)]),
    ]


def test_a_split_record_counts_once() -> None:
    keys = tuple(f"k{number}" for number in range(MAX_KEYS_TOGETHER + 1))
    named = record.encode_named(keys, range(len(keys)), step=0, time_ns=TIME_NS)
    assert decoded(named).metric_records == {ID: 1}


def test_producers_are_named_once_each() -> None:
    batches = [
        SpooledBatch(number, rank, producer(rank), 0, 0, metrics(1, 0, 0.0))
        for number, rank in enumerate((1, 0, 1))
    ]
    batch = decode(Delivery(BatchId("o", 1, 3), batches), lambda *_: ("accuracy",))
    assert batch.producers == [producer(1), producer(0)]


def test_the_id_is_that_of_the_delivery() -> None:
    assert decoded(metrics(1, 0, 0.0)).id == BatchId("origin", 1, 1)


# --- what is said in JSON


def test_params() -> None:
    batch = decoded(said(Kind.PARAMS, {"lr": "3e-4", "größe": "✓"}))
    assert batch.params == [
        Setting(ID, "lr", "3e-4", TIME_NS),
        Setting(ID, "größe", "✓", TIME_NS),
    ]


def test_tags() -> None:
    assert decoded(said(Kind.TAGS, {"state": "good"})).tags == [
        Setting(ID, "state", "good", TIME_NS)
    ]


def test_a_setting_that_is_no_text_becomes_one() -> None:
    assert decoded(said(Kind.PARAMS, {"lr": 3})).params == [Setting(ID, "lr", "3", TIME_NS)]


def test_an_event_with_a_step_and_fields() -> None:
    data = {"level": "warning", "message": "hot", "gpu": 3}
    assert decoded(said(Kind.EVENT, data, step=9)).events == [
        EventData(ID, TIME_NS, "warning", "hot", 9, {"gpu": 3})
    ]


def test_an_event_without_a_step() -> None:
    data = {"level": "info", "message": "begun"}
    assert decoded(said(Kind.EVENT, data, step=NO_STEP)).events == [
        EventData(ID, TIME_NS, "info", "begun", None, {})
    ]


def test_an_end() -> None:
    data = {"status": "failed", "error": "ValueError: no", "records": 12}
    assert decoded(said(Kind.FINISH, data)).ends == [
        ProducerEnd(ID, TIME_NS, "failed", "ValueError: no", 12)
    ]


def test_losses() -> None:
    assert decoded(said(Kind.LOSS, {"journal full": 3, "bad step": 1})).losses == [
        Loss(ID, "journal full", 3),
        Loss(ID, "bad step", 1),
    ]


def test_gaps() -> None:
    gaps = decoded(payload(Kind.GAP, gap_data())).gaps
    assert gaps == [Gap(ID, "full", -3, 8, 1, 2, 5)]


# --- what cannot be read


def complaint(batch: Batch) -> EventData:
    """The one event, which says what could not be read."""
    (event,) = batch.events
    return event


def broken(data: bytes, at: int) -> bytes:
    """`data` with the byte at `at` turned over."""
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


ONE = metrics(1, 0, 0.0)


@pytest.mark.parametrize("at", range(len(ONE)))
def test_a_damaged_byte_costs_the_record_it_stands_in_and_no_other(at: int) -> None:
    data = b"".join(metrics(1, step, 0.0) for step in range(3))
    assert steps(decoded(broken(data, len(ONE) + at))) == [0, 2]


def test_damage_is_told_with_its_size_and_reason() -> None:
    data = broken(ONE + ONE + ONE, len(ONE) + 32)
    event = complaint(decoded(data))
    assert (event.level, event.message) == (
        "error",
        f"unreadable records: {len(ONE)} bytes: checksum mismatch",
    )


def test_damage_is_told_with_its_place() -> None:
    good = ONE + ONE
    event = complaint(decoded(good, broken(good, 32)))
    assert event.data == {"lane": 0, "offset": len(good), "parts": 1}


def test_damage_of_a_batch_is_one_event() -> None:
    data = b"".join(broken(ONE, 32) + ONE for _ in range(50))
    assert complaint(decoded(data)).data["parts"] == 50


def test_damage_is_told_at_the_time_of_the_last_record_that_can_be_read() -> None:
    event = complaint(decoded(metrics(1, 5, 0.0) + broken(ONE, 32) + metrics(1, 7, 0.0)))
    assert event.time_ns == TIME_NS + 7


def test_a_damaged_end_is_told() -> None:
    event = complaint(decoded(ONE + broken(ONE, 32)))
    assert event.message == f"unreadable records: {len(ONE)} bytes at the end of a batch"


def test_a_batch_of_nothing_readable_is_told() -> None:
    assert (
        complaint(decoded(bytes(64))).message
        == "unreadable records: 64 bytes at the end of a batch"
    )


def test_records_of_an_unknown_schema_are_counted() -> None:
    data = metrics(9, 0, 0.0) + metrics(9, 1, 0.0) + ONE
    batch = decoded(data)
    assert complaint(batch).message == "unreadable records: 2 records of schema 9"


def test_records_of_an_unknown_schema_count_as_lost() -> None:
    data = metrics(9, 0, 0.0) + metrics(9, 1, 0.0) + ONE
    assert decoded(data).losses == [Loss(ID, "unreadable records", 2, more=True)]


def test_records_of_an_unknown_schema_do_not_count_as_stored() -> None:
    assert decoded(metrics(9, 0, 0.0) + ONE).metric_records == {ID: 1}


def test_a_record_with_another_number_of_values_than_keys_is_told() -> None:
    batch = decoded(metrics(0, 0, 1.0, 2.0, 3.0) + ONE)
    assert (complaint(batch).message, steps(batch)) == (
        "unreadable records: 1 records of schema 0",
        [0],
    )


def test_a_record_shorter_than_its_head_says_costs_no_other_of_its_schema() -> None:
    batch = decoded(payload(Kind.METRICS, b"", schema_id=1, count=1) + metrics(1, 4, 0.0))
    assert (complaint(batch).message, steps(batch)) == (
        "unreadable records: 1 records of schema 1",
        [4],
    )


def test_a_schema_with_a_key_twice_is_told() -> None:
    batch = decoded(metrics(2, 0, 1.0, 2.0))
    assert (complaint(batch).message, batch.points) == (
        "unreadable records: 1 records of schema 2",
        [],
    )


MALFORMED = {
    "no JSON": (Kind.PARAMS, b"{"),
    "no object": (Kind.TAGS, b"[1, 2]"),
    "no UTF-8": (Kind.PARAMS, b'{"a": "\xff"}'),
    "a lone surrogate": (Kind.TAGS, rb'{"a": "\ud800"}'),
    "a lone surrogate in a key": (Kind.PARAMS, rb'{"\udfff": ""}'),
    "a lone surrogate deep down": (Kind.EVENT, rb'{"level":"info","message":"","x":["\ud800"]}'),
    "nested too deep": (Kind.PARAMS, b'{"a":' * 40_000 + b"1" + b"}" * 40_000),
    "nested lists": (Kind.EVENT, b"[" * 100_000),
    "an event nested 100 deep": (
        Kind.EVENT,
        b'{"level":"info","message":"","x":' + b"[" * 100 + b"]" * 100 + b"}",
    ),
    "an event without a level": (Kind.EVENT, b'{"message": "x"}'),
    "an event without a message": (Kind.EVENT, b'{"level": "info"}'),
    "an event of an odd level": (Kind.EVENT, b'{"level": "fatal", "message": ""}'),
    "a level that is no text": (Kind.EVENT, b'{"level": [{}], "message": ""}'),
    "an end without a status": (Kind.FINISH, b'{"error": "", "records": 1}'),
    "an odd status": (Kind.FINISH, b'{"status": "gone", "error": "", "records": 1}'),
    "an end without a number": (Kind.FINISH, b'{"status": "killed", "error": ""}'),
    "an end with an infinite number": (
        Kind.FINISH,
        b'{"status": "killed", "error": "", "records": 1e999}',
    ),
    "an end with a huge number": (
        Kind.FINISH,
        b'{"status": "killed", "error": "", "records": 9223372036854775808}',
    ),
    "an end with a list": (Kind.FINISH, b'{"status": "killed", "error": "", "records": []}'),
    "a gap without a reason": (Kind.GAP, gap_data(reason=None)),
    "a gap of nothing": (Kind.GAP, gap_data(records="many")),
    "a negative gap": (Kind.GAP, gap_data(records=-1)),
    "a gap that ends before it begins": (Kind.GAP, gap_data(first_step=9, last_step=8)),
    "a gap at a huge step": (Kind.GAP, gap_data(last_step=1 << 63)),
    "a loss of nothing": (Kind.LOSS, b'{"full": null}'),
    "a negative loss": (Kind.LOSS, b'{"full": -1}'),
    "a huge loss": (Kind.LOSS, b'{"full": 1' + b"0" * 40 + b"}"),
    "a loss of too many digits": (Kind.LOSS, b'{"full": ' + b"1" * 10_000 + b"}"),
    # Sums of such would not fit a store, and no more of the run would be taken.
    "a loss that cannot be true": (Kind.LOSS, b'{"full": 9223372036854775807}'),
    "an end with a number that cannot be true": (
        Kind.FINISH,
        b'{"status": "killed", "error": "", "records": 9223372036854775807}',
    ),
    "a gap that cannot be true": (Kind.GAP, gap_data(records=2**63 - 1)),
    "an unknown kind": (99, b"{}"),
    "kind 0": (0, b"{}"),
    "fewer values than the head says": (Kind.NAMED, b"1234567"),
    "names that are no UTF-8": (Kind.NAMED, bytes(8) + b"\xff"),
    "a name that is empty": (Kind.NAMED, bytes(8)),
    "too few keys": (Kind.SCHEMA, b"\xff"),
}


@pytest.mark.parametrize(("kind", "content"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_record_is_told_and_costs_no_other(kind: int, content: bytes) -> None:
    named = {"count": 1} if kind in (Kind.NAMED, Kind.SCHEMA) else {}
    batch = decoded(ONE + payload(kind, content, **named) + ONE)
    assert (complaint(batch).data["parts"], steps(batch)) == (1, [0, 0])


@pytest.mark.parametrize(("kind", "content"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_record_says_nothing(kind: int, content: bytes) -> None:
    named = {"count": 1} if kind in (Kind.NAMED, Kind.SCHEMA) else {}
    batch = decoded(payload(kind, content, **named))
    spoken = (batch.params, batch.tags, batch.points, batch.ends)
    assert [*map(len, spoken)] == [0] * 4


@pytest.mark.parametrize(("kind", "content"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_record_counts_as_lost(kind: int, content: bytes) -> None:
    named = {"count": 1} if kind in (Kind.NAMED, Kind.SCHEMA) else {}
    batch = decoded(payload(kind, content, **named))
    assert batch.losses == [Loss(ID, "unreadable records", 1, more=True)]


def test_a_named_record_of_four_milliard_values_is_told() -> None:
    assert complaint(decoded(payload(Kind.NAMED, b"", count=2**32 - 1))).level == "error"


def test_a_metrics_record_of_four_milliard_values_is_told() -> None:
    batch = decoded(payload(Kind.METRICS, bytes(8), schema_id=1, count=2**32 - 1))
    assert complaint(batch).message == "unreadable records: 1 records of schema 1"


def test_a_long_reason_is_cut() -> None:
    data = {"level": "x" * 100_000, "message": ""}
    assert len(complaint(decoded(said(Kind.EVENT, data))).message) < 500


# --- any bytes at all

VALID = (
    schema(0, *LOSS_KEYS)
    + losses(range(3))
    + metrics(1, 4, -0.0)
    + record.encode_named(("a", "b"), (1.0, 2.0), step=3, time_ns=TIME_NS)
    + said(Kind.PARAMS, {"lr": "3e-4"})
    + said(Kind.TAGS, {"t": "x"})
    + said(Kind.EVENT, {"level": "info", "message": "m", "n": 1})
    + said(Kind.LOSS, {"full": 3})
    + payload(Kind.GAP, gap_data())
    + said(Kind.FINISH, {"status": "finished", "error": "", "records": 5})
)
OFFSETS = record.scan(VALID).offsets


def remade(data: bytes, offset: int, changes: list[tuple[int, int]]) -> bytes:
    """The record at `offset` with bytes changed (place and value), and a checksum that says it is good."""
    length = record.HEAD.unpack_from(data, offset)[0]
    body = bytearray(data[offset + 8 : offset + length])
    for place, value in changes:
        body[place % len(body)] = value
    kind, _, schema_id, count, step, time_ns = struct.unpack_from("<BBHIqq", body)
    return record.encode(
        kind, bytes(body[24:]), step=step, time_ns=time_ns, schema_id=schema_id, count=count
    )


CHANGES = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8)
TEXTS = st.text(st.sampled_from('a"\0\n✓\ud800'), max_size=3)
NUMBERS = st.sampled_from([0, -1, 2**63, 10**30, 0.5, float("inf"), float("nan"), True, None])
JSON = st.recursive(
    NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
WORDS = st.sampled_from(["level", "message", "status", "error", "records", "x"])
JSON_RECORDS = st.builds(
    lambda kind, data: payload(kind, json.dumps(data).encode()),
    st.sampled_from([Kind.PARAMS, Kind.TAGS, Kind.EVENT, Kind.FINISH, Kind.LOSS, Kind.GAP]),
    st.dictionaries(WORDS | TEXTS, JSON | st.sampled_from(["info", "killed"]), max_size=5),
)


@given(st.binary(max_size=400))
def test_any_bytes_decode(data: bytes) -> None:
    assert len(decoded(data).events) == (len(data) > 0)


@given(CHANGES)
def test_damaged_records_decode_to_no_more_than_there_was(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(VALID)
    for place, value in changes:
        damaged[place * 7 % len(damaged)] = value
    assert sum(decoded(bytes(damaged)).metric_records.values()) <= 5


@given(st.data(), CHANGES)
def test_any_record_with_a_good_checksum_decodes(
    data: st.DataObject, changes: list[tuple[int, int]]
) -> None:
    offset = data.draw(st.sampled_from(OFFSETS))
    batch = decoded(ONE + remade(VALID, offset, changes) + ONE)
    assert batch.metric_records[ID] >= 2


@given(JSON_RECORDS)
def test_any_json_decodes(encoded: bytes) -> None:
    assert decoded(encoded + ONE).metric_records == {ID: 1}


# What a batch of a lane may be.
PARTS = [
    metrics(0, 1, 0.5, 0.25),
    metrics(0, 2, 1.5, 0.25) + metrics(0, 3, 2.5, 0.25),
    metrics(1, 4, 0.75),
    metrics(0, 5, 3.5, 0.25) + metrics(1, 6, 1.75),
    metrics(9, 7, 1.0),
    said(Kind.PARAMS, {"lr": "0.1"}),
    metrics(0, 8, 4.5, 0.25) + said(Kind.TAGS, {"state": "b"}),
    broken(metrics(0, 9, 5.5, 0.25) + metrics(0, 10, 6.5, 0.25), 40),
    metrics(0, 11, 7.5, 0.25)[:-8],
]


@given(st.data(), CHANGES)
def test_a_delivery_decodes_to_the_same_batch_every_time(
    data: st.DataObject, changes: list[tuple[int, int]]
) -> None:
    offset = data.draw(st.sampled_from(OFFSETS))
    batches = (VALID, remade(VALID, offset, changes), broken(VALID, changes[0][0] % len(VALID)))
    assert same(decoded(*batches), decoded(*batches))


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6), st.sampled_from([64, 1 << 18]))
def test_batches_of_a_delivery_say_what_each_of_them_says_alone(
    parts: list[bytes], together_bytes: int
) -> None:
    whole = delivery(*parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "TOGETHER_BYTES", together_bytes)
        batch = decode(whole, lambda _, id_: KEYS.get(id_))
    alone = [
        decode(Delivery(whole.id, [one]), lambda _, id_: KEYS.get(id_)) for one in whole.batches
    ]
    for name in ("params", "tags", "events", "ends", "losses", "gaps"):
        assert getattr(batch, name) == [item for one in alone for item in getattr(one, name)]
    assert in_order(batch) == in_order(*alone)
    assert sum(batch.metric_records.values()) == sum(
        sum(one.metric_records.values()) for one in alone
    )


@examples(5)
@given(st.lists(st.tuples(st.sampled_from(OFFSETS), CHANGES), min_size=30, max_size=30))
def test_the_store_takes_whatever_a_record_with_a_good_checksum_says(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[int, list[tuple[int, int]]]]
) -> None:
    # One record that a store refuses would put everybody's records of that delivery aside.
    writer = store.open_writer(tmp_path_factory.mktemp("store") / "store.db")
    for number, (offset, changes) in enumerate(records, 1):
        data = remade(VALID, offset, changes)
        writer.write(decode(delivery(data, first=number), lambda _, id_: KEYS.get(id_)))
    writer.close()


@pytest.mark.parametrize(("kind", "content"), MALFORMED.values(), ids=MALFORMED)
def test_the_store_takes_a_batch_with_a_malformed_record(
    tmp_path: Path, kind: int, content: bytes
) -> None:
    named = {"count": 1} if kind in (Kind.NAMED, Kind.SCHEMA) else {}
    writer = store.open_writer(tmp_path / "store.db")
    writer.write(decoded(ONE + payload(kind, content, **named)))
    writer.close()
    reader = store.open_reader(tmp_path / "store.db")
    assert reader.run(RUN_ID).records_stored == 1
    reader.close()
