"""The bytes of a record, the unit of everything that travels: one log call, one record.

A record starts at a multiple of 8 and is padded with zeros to the next one. All numbers are little-endian:

    0   u32   length: bytes of the whole record without padding; written last, so that 0 says
              "not published" and a reader sees whole records or none
    4   u32   CRC-32 (as in zlib) of bytes 8 to length
    8   u8    kind, see Kind
    9   u8    flags, 0 today
    10  u16   schema id (METRICS and SCHEMA), else 0
    12  u32   count: number of values or keys (METRICS, SCHEMA, NAMED), else 0
    16  i64   step, NO_STEP where the record has none
    24  i64   time, nanoseconds since 1970-01-01 UTC
    32        payload, by kind

Payloads: METRICS, `count` float64 in the order of the schema's keys. SCHEMA, `count` keys in UTF-8
joined by newlines (a key holds no control characters). NAMED, `count` float64 and then the keys as
in SCHEMA: metrics that carry their own names, used when a producer has more key sets than schema
ids. All others: a JSON object.

A schema id means the same keys for all of a producer's life, and its SCHEMA record stands in every segment
before the first METRICS record that uses it: a segment can be read alone.

Functions here are pure and know no files; `scan` trusts nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from zlib import crc32

from trackagent.client.errors import ValueRefused

HEAD_BYTES = 32
MAX_RECORD_BYTES = 256 * 1024
MAX_SCHEMAS = 1024
SEARCH_BYTES = 4 * 1024 * 1024
NO_STEP = -(2**63)

HEAD = struct.Struct("<IIBBHIqq")
_BODY = struct.Struct("<BBHIqq")


class Kind(IntEnum):
    """What a record says; the payload's form follows from it."""

    SCHEMA = 1
    METRICS = 2
    NAMED = 3
    PARAMS = 4  # {key: text}
    TAGS = 5  # {key: text}
    EVENT = 6  # {"level": text, "message": text, ...}
    FINISH = (
        7  # {"status": "finished|failed|killed", "error": text, "records": metric records logged}
    )
    LOSS = 8  # {reason: records refused so far, by this producer}
    # Log calls refused between two that got through: {"reason": text, "first_step": n, "last_step": n,
    # "first_time_ns": n, "last_time_ns": n, "records": n}; with the same reason and first time: it has grown.
    GAP = 9


@dataclass(frozen=True, slots=True)
class Record:
    """One decoded record; `values` for the metric kinds, `data` for the JSON kinds."""

    kind: Kind
    step: int
    time_ns: int
    schema_id: int = 0
    keys: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [start, end) that hold no readable record, and why."""

    start: int
    end: int
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What a range of bytes holds: offsets of valid records in order, the end of data, the bad
    parts between."""

    offsets: list[int]
    end: int
    damage: list[Damage]


def padded(length: int) -> int:
    """`length` rounded up to where the next record starts."""
    return (length + 7) & ~7


Packer = tuple[Callable[..., bytes], int, int]


def metrics_packer(schema_id: int, count: int) -> Packer:
    """What packs METRICS records of one schema: `pack(head, step, time_ns, *values)` gives bytes 8 to end,
    then the size with padding, and `head` (bytes 8 to 16 as one number)."""
    head = int.from_bytes(struct.pack("<BBHI", Kind.METRICS, 0, schema_id, count), "little")
    return struct.Struct(f"<Qqq{count}d").pack, HEAD_BYTES + 8 * count, head


def too_large(length: int, limit: int) -> ValueRefused:
    """What to raise for a record of `length` bytes."""
    return ValueRefused(
        "record too large",
        f"a record of {length} bytes is over the limit of {limit}: log fewer keys at once",
    )


def encode(
    kind: Kind, payload: bytes, *, step: int, time_ns: int, schema_id: int = 0, count: int = 0
) -> bytes:
    """One whole record with length, checksum and padding. ValueRefused when it is larger than
    MAX_RECORD_BYTES.
    """
    length = HEAD_BYTES + len(payload)
    if length > MAX_RECORD_BYTES:
        raise too_large(length, MAX_RECORD_BYTES)
    body = _BODY.pack(kind, 0, schema_id, count, step, time_ns) + payload
    return struct.pack("<II", length, crc32(body)) + body + bytes(padded(length) - length)


def encode_json(kind: Kind, data: Mapping[str, Any], *, step: int, time_ns: int) -> bytes:
    """One whole record of a JSON kind."""
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return encode(kind, payload, step=step, time_ns=time_ns)


def encode_schema(schema_id: int, keys: Sequence[str], *, time_ns: int) -> bytes:
    """One whole SCHEMA record."""
    return encode(
        Kind.SCHEMA,
        "\n".join(keys).encode(),
        step=NO_STEP,
        time_ns=time_ns,
        schema_id=schema_id,
        count=len(keys),
    )


def encode_named(keys: Sequence[str], values: Sequence[float], *, step: int, time_ns: int) -> bytes:
    """One whole NAMED record."""
    payload = struct.pack(f"<{len(values)}d", *values) + "\n".join(keys).encode()
    return encode(Kind.NAMED, payload, step=step, time_ns=time_ns, count=len(values))


def decode(data: bytes | memoryview, offset: int) -> Record:
    """The record at `offset`, whose head and checksum `scan` has found good. ValueError when its payload
    contradicts its head."""
    length, _, kind, _, schema_id, count, step, time_ns = HEAD.unpack_from(data, offset)
    payload = bytes(data[offset + HEAD_BYTES : offset + length])
    if kind == Kind.METRICS:
        if len(payload) != 8 * count:
            raise ValueError(f"{count} values in {len(payload)} bytes")
        return Record(
            Kind.METRICS, step, time_ns, schema_id, values=struct.unpack(f"<{count}d", payload)
        )
    if kind in (Kind.SCHEMA, Kind.NAMED):
        if kind == Kind.NAMED and len(payload) < 8 * count:
            raise ValueError(f"{count} values in {len(payload)} bytes")
        values = struct.unpack_from(f"<{count}d", payload) if kind == Kind.NAMED else ()
        keys = tuple(payload[8 * len(values) :].decode().split("\n"))
        if len(keys) != count:
            raise ValueError(f"{len(keys)} keys where the head says {count}")
        return Record(Kind(kind), step, time_ns, schema_id, keys=keys, values=values)
    try:
        content = json.loads(payload)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("the payload is no JSON object")
    return Record(Kind(kind), step, time_ns, data=content)


def is_valid(data: bytes | memoryview, offset: int) -> bool:
    """Whether a whole record with the right checksum starts at `offset`."""
    if offset + HEAD_BYTES > len(data):
        return False
    length, crc = HEAD.unpack_from(data, offset)[:2]
    if not HEAD_BYTES <= length <= MAX_RECORD_BYTES or offset + length > len(data):
        return False
    return bool(crc32(data[offset + 8 : offset + length]) == crc)


def scan(data: bytes | memoryview, start: int = 0, end: int | None = None) -> Scan:
    """Finds the records in data[start:end] (start: where a record begins or began).

    Never raises on content. Data ends at the first place after which no valid record starts: the
    zeros of an unused rest, or a record that was being written when its process died. Bytes between
    valid records are damage. Takes time in proportion to the bytes, whatever they are: when damage
    imitates records too often, all that follows counts as damage.
    """
    stop = len(data) if end is None else end
    unpack = HEAD.unpack_from
    offsets: list[int] = []
    damage: list[Damage] = []
    search: _Search | None = None
    at = start
    while at + HEAD_BYTES <= stop:
        length, crc = unpack(data, at)[:2]
        if (
            HEAD_BYTES <= length <= MAX_RECORD_BYTES
            and at + length <= stop
            and crc32(data[at + 8 : at + length]) == crc
        ):
            offsets.append(at)
            at += (length + 7) & ~7
            continue
        if search is None:
            search = _Search(data, at, stop)
        found = search.next_record(at + 8)
        if found is None:
            break
        damage.append(Damage(at, found, _what_is_wrong(length)))
        at = found
    return Scan(offsets, min(at, stop), damage)


class _Search:
    """Looks for where records go on after damage."""

    def __init__(self, data: bytes | memoryview, start: int, stop: int) -> None:
        self._data = data
        self._stop = stop
        # Only zeros follow this.
        self._last = min(start + len(bytes(data[start:stop]).rstrip(b"\0")), stop - HEAD_BYTES + 1)
        self._budget = SEARCH_BYTES + 16 * (stop - start)

    def next_record(self, at: int) -> int | None:
        """The first multiple of 8 from `at` on where a valid record starts; the end when too many checksums
        had to be computed to tell."""
        for offset in range(at, self._last, 8):
            length, crc = HEAD.unpack_from(self._data, offset)[:2]
            if not HEAD_BYTES <= length <= MAX_RECORD_BYTES or offset + length > self._stop:
                continue
            self._budget -= length
            if self._budget < 0:
                return self._stop
            if crc32(self._data[offset + 8 : offset + length]) == crc:
                return offset
        return None


def _what_is_wrong(length: int) -> str:
    if length == 0:
        return "zeroed"
    plausible = HEAD_BYTES <= length <= MAX_RECORD_BYTES
    return "checksum mismatch" if plausible else "length out of range"
