"""The bytes of records: what is written is read back, and what is damaged is found, whatever it is."""

from __future__ import annotations

import math
import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackagent.client import record
from trackagent.client.errors import ValueRefused
from trackagent.client.record import HEAD_BYTES, NO_STEP, Damage, Kind, Record

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(width=64)
KEYS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20),
    min_size=1,
    max_size=10,
)
TIME_NS = 1_700_000_000_123_456_789


def bits(values: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def pack(schema_id: int, step: int, time_ns: int, *values: float) -> bytes:
    """A METRICS record as log() writes it."""
    packer, size, head = record.metrics_packer(schema_id, len(values))
    body = packer(head, step, time_ns, *values)
    return struct.pack("<II", size, crc32(body)) + body


def some_records(count: int) -> list[bytes]:
    """Records of several kinds and sizes."""
    made = [record.encode_schema(0, ("loss", "lr"), time_ns=TIME_NS)]
    for i in range(1, count):
        if i % 3:
            made.append(pack(0, i, TIME_NS, float(i), 0.5))
        else:
            made.append(record.encode_json(Kind.TAGS, {"k": "v" * i}, step=NO_STEP, time_ns=i))
    return made[:count]


# --- round trips


@given(INT64, INT64, st.lists(FLOATS, max_size=20), st.integers(0, record.MAX_SCHEMAS - 1))
def test_metrics_come_back_bit_for_bit(
    step: int, time_ns: int, values: list[float], schema_id: int
) -> None:
    found = record.decode(pack(schema_id, step, time_ns, *values), 0)
    assert (found.kind, found.step, found.time_ns) == (Kind.METRICS, step, time_ns)
    assert found.schema_id == schema_id
    assert bits(found.values) == bits(tuple(values))


def test_the_bits_of_a_nan_stay() -> None:
    payload = struct.pack("<Q", 0x7FF8_DEAD_BEEF_0001)
    found = record.decode(pack(0, 0, 0, *struct.unpack("<d", payload)), 0)
    assert bits(found.values) == payload


@given(KEYS, st.integers(0, 2**16 - 1))
def test_a_schema_comes_back(keys: list[str], schema_id: int) -> None:
    found = record.decode(record.encode_schema(schema_id, keys, time_ns=TIME_NS), 0)
    assert found == Record(Kind.SCHEMA, NO_STEP, TIME_NS, schema_id, keys=tuple(keys))


@given(st.dictionaries(KEYS.map(lambda keys: keys[0]), FLOATS, min_size=1), INT64)
def test_named_metrics_come_back(metrics: dict[str, float], step: int) -> None:
    encoded = record.encode_named([*metrics], [*metrics.values()], step=step, time_ns=TIME_NS)
    found = record.decode(encoded, 0)
    assert (found.kind, found.step, found.keys) == (Kind.NAMED, step, tuple(metrics))
    assert bits(found.values) == bits(tuple(metrics.values()))


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
)
def test_json_records_come_back(data: dict[str, str]) -> None:
    for kind in (Kind.PARAMS, Kind.TAGS, Kind.EVENT, Kind.FINISH, Kind.LOSS):
        encoded = record.encode_json(kind, data, step=3, time_ns=TIME_NS)
        assert record.decode(encoded, 0) == Record(kind, 3, TIME_NS, data=data)


def test_a_lone_surrogate_in_json_becomes_a_question_mark() -> None:
    encoded = record.encode_json(Kind.TAGS, {"k": "a\ud800b"}, step=NO_STEP, time_ns=0)
    assert record.decode(encoded, 0).data == {"k": "a?b"}


@given(st.integers(0, 500))
def test_every_record_ends_at_a_multiple_of_8(size: int) -> None:
    encoded = record.encode(Kind.TAGS, b"x" * size, step=0, time_ns=0)
    assert len(encoded) == record.padded(HEAD_BYTES + size)
    assert len(encoded) % 8 == 0


def test_the_largest_record_is_read() -> None:
    data = record.encode(
        Kind.TAGS, b"x" * (record.MAX_RECORD_BYTES - HEAD_BYTES), step=0, time_ns=0
    )
    assert record.scan(data).offsets == [0]


def test_a_larger_record_is_refused() -> None:
    with pytest.raises(ValueRefused, match="a record of 262145 bytes is over the limit of 262144"):
        record.encode(
            Kind.TAGS, b"x" * (record.MAX_RECORD_BYTES - HEAD_BYTES + 1), step=0, time_ns=0
        )


# --- scan: whole records


def test_scan_finds_every_record_in_order() -> None:
    made = some_records(20)
    scan = record.scan(b"".join(made))
    starts = [sum(map(len, made[:i])) for i in range(len(made))]
    assert (scan.offsets, scan.end, scan.damage) == (starts, sum(map(len, made)), [])


def test_scan_of_nothing_finds_nothing() -> None:
    assert record.scan(b"") == record.Scan([], 0, [])


def test_the_unused_rest_of_a_segment_is_its_end() -> None:
    data = b"".join(some_records(5))
    scan = record.scan(data + bytes(100_000))
    assert (len(scan.offsets), scan.end, scan.damage) == (5, len(data), [])


def test_scan_begins_and_ends_where_it_is_told() -> None:
    made = some_records(6)
    data = b"".join(made)
    start, end = len(made[0]), len(data) - len(made[5])
    scan = record.scan(data, start, end)
    assert (scan.offsets[0], len(scan.offsets), scan.end) == (start, 4, end)


@given(st.data())
def test_a_record_that_was_being_written_is_the_end_and_no_damage(data: st.DataObject) -> None:
    made = some_records(8)
    whole, last = b"".join(made[:-1]), made[-1]
    # The payload is written first and the length last: some of the payload may stand there, the length not.
    written = data.draw(st.integers(8, len(last)))
    scan = record.scan(whole + bytes(8) + last[8:written] + bytes(512))
    assert (len(scan.offsets), scan.end, scan.damage) == (7, len(whole), [])


# --- scan: damage


@given(st.binary(max_size=2000), st.integers(0, 100))
def test_scan_never_raises_on_garbage(garbage: bytes, start: int) -> None:
    scan = record.scan(garbage, start)
    assert scan.end <= max(len(garbage), start)


@given(st.data())
def test_undamaged_records_are_found_beside_flipped_bytes(data: st.DataObject) -> None:
    made = some_records(10)
    stream = bytearray(b"".join(made))
    hit = data.draw(st.sets(st.integers(0, len(made) - 1), min_size=1, max_size=3), "damaged")
    starts = [sum(map(len, made[:i])) for i in range(len(made))]
    for number in hit:
        # Any byte but the padding, which nothing protects and nobody reads.
        length = int.from_bytes(made[number][:4], "little")
        at = data.draw(st.integers(0, length - 1), "byte")
        stream[starts[number] + at] ^= data.draw(st.integers(1, 255), "change")
    scan = record.scan(bytes(stream))
    intact = [start for number, start in enumerate(starts) if number not in hit]
    assert scan.offsets == intact


@given(st.data())
def test_undamaged_records_are_found_beside_zeroed_bytes(data: st.DataObject) -> None:
    made = some_records(10)
    starts = [sum(map(len, made[:i])) for i in range(len(made))]
    first = data.draw(st.integers(0, 8), "first")
    last = data.draw(st.integers(first, 8), "last")
    stream = bytearray(b"".join(made))
    stream[starts[first] : starts[last + 1]] = bytes(starts[last + 1] - starts[first])
    scan = record.scan(bytes(stream))
    assert scan.offsets == starts[:first] + starts[last + 1 :]
    assert scan.damage == [Damage(starts[first], starts[last + 1], "zeroed")]


@given(st.data())
def test_a_cut_stream_ends_with_its_last_whole_record(data: st.DataObject) -> None:
    made = some_records(10)
    stream = b"".join(made)
    cut = data.draw(st.integers(0, len(stream)))
    scan = record.scan(stream[:cut])
    ends = [sum(map(len, made[: i + 1])) for i in range(len(made))]
    # The padding of the last one may be missing: nothing is in it.
    lengths = [int.from_bytes(one[:4], "little") for one in made]
    whole = [
        end
        for end, one, length in zip(ends, made, lengths, strict=True)
        if end - len(one) + length <= cut
    ]
    assert len(scan.offsets) == len(whole)
    assert scan.damage == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (struct.pack("<I", 31), "length out of range"),
        (struct.pack("<I", record.MAX_RECORD_BYTES + 1), "length out of range"),
        (bytes(4), "zeroed"),
        (struct.pack("<I", 48), "checksum mismatch"),
    ],
    ids=["too short", "too long", "zero", "another length"],
)
def test_damage_says_what_is_wrong(change: bytes, reason: str) -> None:
    first, second, third = (pack(0, i, TIME_NS, 1.0) for i in range(3))
    stream = first + change + second[4:] + third
    scan = record.scan(stream)
    assert scan.damage == [Damage(len(first), len(first) + len(second), reason)]
    assert scan.offsets == [0, len(first) + len(second)]


class Summed:
    """crc32, and how many bytes it was given."""

    def __init__(self) -> None:
        self.size = 0

    def __call__(self, data: bytes) -> int:
        self.size += len(data)
        return crc32(data)


def test_damage_that_looks_like_long_records_everywhere_is_searched_in_linear_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summed = Summed()
    monkeypatch.setattr(record, "crc32", summed)
    decoys = struct.pack("<II", 200_000, 1) * (1024 * 1024 // 8)
    first = pack(0, 1, TIME_NS, 1.0)
    stream = first + decoys
    scan = record.scan(stream)
    assert summed.size < 32 * len(stream)
    assert (scan.offsets, scan.end) == ([0], len(stream))
    assert scan.damage == [Damage(len(first), len(stream), "checksum mismatch")]


def test_a_record_after_some_that_look_like_long_ones_is_found() -> None:
    decoys = struct.pack("<II", 100_000, 1) * 20
    stream = decoys + pack(0, 1, TIME_NS, 1.0) + bytes(200_000)
    assert record.scan(stream).offsets == [len(decoys)]


def test_many_damaged_parts_are_searched_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    summed = Summed()
    monkeypatch.setattr(record, "crc32", summed)
    good = pack(0, 1, TIME_NS, *range(60))
    stream = (good + b"\xff" * 64) * 20_000
    scan = record.scan(stream)
    assert summed.size < 2 * len(stream)
    assert (len(scan.offsets), len(scan.damage)) == (20_000, 19_999)


# --- decode


@given(
    kind=st.integers(0, 255),
    count=st.integers(0, 2**32 - 1) | st.integers(0, 10),
    payload=st.binary(max_size=100),
)
def test_a_payload_that_contradicts_its_head_is_a_value_error(
    kind: int, count: int, payload: bytes
) -> None:
    body = struct.pack("<BBHIqq", kind, 0, 0, count, 1, 2) + payload
    data = struct.pack("<II", HEAD_BYTES + len(payload), crc32(body)) + body
    assert record.scan(data).offsets == [0]
    try:
        found = record.decode(data, 0)
    except ValueError:
        return
    assert found.kind == kind


def test_json_that_is_nested_too_deeply_is_a_value_error() -> None:
    data = record.encode(Kind.TAGS, b"[" * 100_000, step=0, time_ns=0)
    with pytest.raises(ValueError, match="nested too deeply"):
        record.decode(data, 0)


def test_the_longest_floats_are_no_special_case() -> None:
    values = (math.pi, -0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308)
    assert bits(record.decode(pack(0, 0, 0, *values), 0).values) == bits(values)
