"""Journal bytes that no client writes: valid records changed in every way, most with a good checksum."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

from hypothesis import strategies as st

from trackagent.client.record import HEAD_BYTES, MAX_RECORD_BYTES, NO_STEP, Kind

INT64 = st.integers(-(2**63), 2**63 - 1)
ENDS = st.sampled_from([0, 1, -1, 2**53, 2**62, 2**63 - 1, NO_STEP, NO_STEP + 1])
STEPS = ENDS | INT64
TIMES = st.sampled_from([1_700_000_000_000_000_000, 0, -1, 2**63 - 1, NO_STEP]) | INT64
FLOATS = st.floats(width=64)


def whole(
    kind: int,
    payload: bytes,
    *,
    count: int = 0,
    schema_id: int = 0,
    step: int = 0,
    time_ns: int = 1,
) -> bytes:
    """A record with a good checksum, whatever its content."""
    body = struct.pack("<BBHIqq", kind, 0, schema_id, count, step, time_ns) + payload
    length = 8 + len(body)
    return struct.pack("<II", length, crc32(body)) + body + bytes(-length % 8)


# --- JSON, as text: json.dumps writes neither duplicate keys nor lone surrogates by halves

NUMBERS = st.sampled_from(
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "-0.0",
        "1e999",
        "1E-999",
        str(2**63),
        str(-(2**63) - 1),
        "9" * 400,
        "9" * 5000,
        "0.1",
    ]
) | INT64.map(str)
STRINGS = st.sampled_from(
    [
        '""',
        '"\\ud800"',
        '"\\udfff\\ud800"',
        '"\\u0000"',
        '"\\u001b[31m"',
        '"a\\nb"',
        '"[red]"',
        '"\\u202e"',
        '"finished"',
        '"info"',
        '"%s"',
        f'"{"x" * 7000}"',
        f'"{chr(128512) * 300}"',
    ]
) | st.text(st.characters(codec="utf-8"), max_size=20).map(
    lambda text: json.dumps(text, ensure_ascii=False)
)
SCALARS = NUMBERS | STRINGS | st.sampled_from(["true", "false", "null"])


def _object(pairs: Sequence[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


def _nested(levels: int) -> str:
    return "[" * levels + "]" * levels


VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(STRINGS, inner), max_size=4).map(_object)
    ),
    max_leaves=8,
) | st.sampled_from([40, 63, 64, 65, 66, 500, 5000]).map(_nested)

# What a record of each JSON kind must say.
FIELDS: dict[Kind, dict[str, str]] = {
    Kind.PARAMS: {"lr": '"0.1"'},
    Kind.TAGS: {"note": '"x"'},
    Kind.EVENT: {"level": '"info"', "message": '"m"', "more": "1"},
    Kind.FINISH: {"status": '"failed"', "error": '"e"', "records": "3"},
    Kind.LOSS: {"full": "3"},
    Kind.GAP: {
        "reason": '"full"',
        "first_step": "1",
        "last_step": "2",
        "first_time_ns": "1",
        "last_time_ns": "2",
        "records": "2",
    },
}


@st.composite
def _json_records(draw: st.DrawFn) -> bytes:
    """A record of a JSON kind of whose fields some are missing, doubled, or something else."""
    kind = draw(st.sampled_from(list(FIELDS)))
    pairs: list[tuple[str, str]] = []
    for name, good in FIELDS[kind].items():
        change = draw(st.sampled_from(["none", "none", "other", "other", "double", "missing"]))
        if change != "missing":
            pairs.append((f'"{name}"', good if change in ("none", "double") else draw(VALUES)))
        if change == "double":
            pairs.append((f'"{name}"', draw(VALUES)))
    pairs += draw(st.lists(st.tuples(STRINGS, VALUES), max_size=3))
    text = draw(st.sampled_from([_object(pairs)] * 8 + [_object(pairs)[:-1], draw(VALUES)]))
    return whole(kind, _text(text)[:100_000], step=draw(STEPS), time_ns=draw(TIMES))


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# --- metrics

KEYS = (
    st.sampled_from(
        ["loss", "loss", "lr", "", "a\0b", "[red]", "\x1b[31m", "k" * 3000, "-" * 40, "%s"]
    )
    | st.sampled_from(["train/loss", "\u202e", "a,b\r", "'", "=cmd()", "\udcff"])
    | st.text(max_size=5)
)


@st.composite
def _metric_records(draw: st.DrawFn) -> bytes:
    keys = draw(st.lists(KEYS, max_size=4))
    named = "\n".join(keys).encode("utf-8", "surrogatepass")
    count = draw(st.sampled_from([len(keys)] * 8 + [0, 1, len(keys) + 1, 2**32 - 1, 2**31]))
    values = draw(st.lists(FLOATS, min_size=len(keys), max_size=len(keys)))
    numbers = struct.pack(f"<{len(values)}d", *values)
    head = {"step": draw(STEPS), "time_ns": draw(TIMES), "count": count}
    id_ = draw(st.sampled_from([0, 1, 2, 1023, 65535]))
    schema = whole(Kind.SCHEMA, named, schema_id=id_, **head)
    metrics = whole(Kind.METRICS, numbers, schema_id=id_, **head)
    other = whole(Kind.METRICS, numbers, schema_id=draw(st.integers(0, 3)), **head)
    return draw(
        st.sampled_from(
            [
                schema + metrics,
                schema + other + metrics,
                metrics,
                schema,
                whole(Kind.NAMED, numbers + named, **head),
                whole(Kind.NAMED, numbers, **head),
            ]
        )
    )


def _many_keys(kind: Kind, keys: int) -> bytes:
    names = "\n".join(f"{key:x}" for key in range(keys)).encode()
    if kind == Kind.NAMED:
        return whole(kind, bytes(8 * keys) + names, count=keys)
    return whole(kind, names, count=keys) + whole(Kind.METRICS, bytes(8 * keys), count=keys)


# Large ones, made once.
LARGE = [
    _many_keys(Kind.SCHEMA, 30_000),
    _many_keys(Kind.SCHEMA, 4097),
    _many_keys(Kind.NAMED, 15_000),
    whole(Kind.SCHEMA, b"\n".join([b""] * 100_000), count=100_000),
    whole(
        Kind.EVENT,
        b'{"level":"info","message":"m","more":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ),
    whole(Kind.TAGS, b"{" + b",".join(b'"%x":""' % key for key in range(20_000)) + b"}"),
    whole(Kind.LOSS, b"{" + b",".join(b'"%x":1' % key for key in range(20_000)) + b"}"),
    whole(Kind.LOSS, b'{"' + b"r" * 200_000 + b'":9223372036854775807}'),
    whole(Kind.GAP, b'{"reason":"' + b"r" * 200_000 + b'"}'),
    whole(Kind.PARAMS, b'{"n":' + b"7" * 250_000 + b"}"),
]
RECORDS = (
    _json_records()
    | _metric_records()
    | st.sampled_from(LARGE)
    | st.builds(
        whole,
        st.integers(0, 255),
        st.binary(max_size=60),
        count=st.integers(0, 2**32 - 1) | st.integers(0, 8),
        schema_id=st.integers(0, 65535),
        step=STEPS,
        time_ns=TIMES,
    )
)
LENGTHS = st.sampled_from(
    [0, 1, 31, 32, 33, MAX_RECORD_BYTES, MAX_RECORD_BYTES + 1, 2**31, 2**32 - 1]
)


def sealed(data: bytes) -> bytes:
    """`data` with the checksum of each record, as the lengths say where they are, made right."""
    stream = bytearray(data)
    at = 0
    while at + HEAD_BYTES <= len(stream):
        length = int.from_bytes(stream[at : at + 4], "little")
        if not HEAD_BYTES <= length <= MAX_RECORD_BYTES or at + length > len(stream):
            break
        stream[at + 4 : at + 8] = crc32(stream[at + 8 : at + length]).to_bytes(4, "little")
        at += (length + 7) & ~7
    return bytes(stream)


def _flip(draw: st.DrawFn, data: bytearray) -> None:
    # Most where structure is: in the heads.
    at = draw(st.integers(0, min(len(data), 200) - 1) | st.integers(0, len(data) - 1))
    data[at] ^= draw(st.integers(1, 255))


def _splice(draw: st.DrawFn, data: bytearray) -> None:
    start = draw(st.integers(0, len(data)))
    piece = data[start : start + draw(st.integers(0, 300))]
    at = draw(st.integers(0, len(data)))
    data[at:at] = piece


def _cut(draw: st.DrawFn, data: bytearray) -> None:
    at = draw(st.integers(0, len(data)))
    del data[at : at + draw(st.integers(0, 64))]


def _extend(draw: st.DrawFn, data: bytearray) -> None:
    data += draw(st.binary(max_size=100) | st.sampled_from([bytes(4096), b"\xff" * 500]))


def _relength(draw: st.DrawFn, data: bytearray) -> None:
    at = 8 * draw(st.integers(0, min(len(data), 400) // 8))
    data[at : at + 4] = draw(LENGTHS).to_bytes(4, "little")


def _nest(draw: st.DrawFn, data: bytearray) -> None:
    """The records within the payload of one."""
    data[:] = whole(draw(st.integers(0, 10)), bytes(data[: MAX_RECORD_BYTES - HEAD_BYTES]))


_CHANGES: list[Callable[[st.DrawFn, bytearray], Any]] = [
    _flip,
    _splice,
    _cut,
    _extend,
    _relength,
    _nest,
]


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    """Some records after each other, changed or not, sealed or not, padded to whole words."""
    data = bytearray(b"".join(draw(st.lists(RECORDS, min_size=1, max_size=6))))
    for change in draw(st.lists(st.sampled_from(_CHANGES), max_size=3)):
        if data:
            change(draw, data)
    data += bytes(-len(data) % 8)
    return sealed(bytes(data)) if draw(st.booleans()) else bytes(data)


STREAMS = _streams() | st.binary(max_size=600)
