"""Columns as bytes: int64 and float64 arrays, lossless to the bit (NaN payloads and -0.0 included).

A column is

    0   u8    version, 1
    1   u8    encoding, see Encoding
    2   u32   CRC-32 of bytes 0 to 2 and 6 to the end
    6   u32   n, number of values
    10        payload, by encoding; all numbers little-endian

CONSTANT  u64 bits of the value
LINEAR    i64 start, i64 stride: value i is start + i * stride, modulo 2**64
WORDS     words, see below: the int64 values, or the bits of the float64 values
SINGLE    words: the bits of float32 values that equal the float64 values to the bit
DECIMAL   u8 e, words: int64 k with k / 10**e equal to the float64 values to the bit
RAW       n * 8 bytes

Words are unsigned 64-bit numbers: u8 order (0, 1, 2: how often the difference with the predecessor was
taken), u8 zigzag (1: words are folded so that small negative numbers are small), u64 base (subtracted from
every word), `order` u64 first values, u8 width, u8 joined, and then `width` byte planes, lowest byte first. A
plane is u8 kind and then: the byte itself (SAME), n bytes (STORED), or u32 length and that much raw deflate
(DEFLATED). Splitting words into planes keeps the noise of a mantissa out of the compressor, which could
only slow down on it. In short columns (joined 1) all planes together are written as if they were one.

Functions here are pure. Decoding trusts nothing: whatever the bytes are, it returns the `n` values asked
for or raises ColumnDamaged, and allocates in proportion to `n` only.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from trackagent.agent.store.contract import Floats, Ints

VERSION = 1
HEAD = struct.Struct("<BBII")
_CRC_AT = 2
_WORDS = struct.Struct("<BBQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PAIR = struct.Struct("<QQ")

_SAMPLE_WORDS = 1024
_SHORT = 512
_NOISE_BITS = 7.6  # a plane with more entropy a byte than this is stored: deflate gains under 5 %
_DEFLATE_LEVEL = 1  # on byte planes, higher levels gain a few per cent for several times the time
_MOST_DECIMALS = 9  # nanoseconds as seconds

# Tried in turn: order of differences, zigzag, base (the least word subtracted).
_FORMS = (
    (0, False, False),
    (1, True, False),
    (1, False, True),
    (2, True, False),
)

Words = npt.NDArray[np.uint64]
_Bytes = npt.NDArray[np.uint8]


class ColumnDamaged(Exception):
    """These bytes are not the column that they should be; the message says why."""


class Encoding(IntEnum):
    """How the values of a column are kept."""

    CONSTANT = 1
    LINEAR = 2
    WORDS = 3
    SINGLE = 4
    DECIMAL = 5
    RAW = 6


class _Plane(IntEnum):
    SAME = 0
    STORED = 1
    DEFLATED = 2


def encode_ints(values: Ints) -> bytes:
    """The column of int64 values (n,); n < 2**32."""
    words = np.ascontiguousarray(values, dtype="<i8").view("<u8")
    n = len(words)
    if n == 0:
        return _column(Encoding.RAW, 0, b"")
    strides = words[1:] - words[:-1]
    if n == 1 or bool((strides == strides[0]).all()):
        stride = int(strides[0]) if n > 1 else 0
        if stride == 0:
            return _column(Encoding.CONSTANT, n, _U64.pack(int(words[0])))
        return _column(Encoding.LINEAR, n, _PAIR.pack(int(words[0]), stride))
    return _smallest([(Encoding.WORDS, b"", words)], words)


def encode_floats(values: Floats) -> bytes:
    """The column of float64 values (n,); n < 2**32."""
    values = np.ascontiguousarray(values, dtype="<f8")
    bits: Words = values.view("<u8")
    n = len(bits)
    if n == 0:
        return _column(Encoding.RAW, 0, b"")
    if bool((bits == bits[0]).all()):
        return _column(Encoding.CONSTANT, n, _U64.pack(int(bits[0])))
    return _smallest(_float_forms(values, bits), bits)


def decode_ints(data: bytes, n: int) -> Ints:
    """The `n` int64 values of a column written by `encode_ints`. Raises ColumnDamaged."""
    encoding, payload = _opened(data, n)
    if encoding is Encoding.LINEAR:
        if len(payload) != _PAIR.size:
            raise ColumnDamaged("a linear column of the wrong length")
        start, stride = _PAIR.unpack(payload)
        return (np.uint64(start) + np.arange(n, dtype="<u8") * np.uint64(stride)).view("<i8")
    if encoding is Encoding.WORDS:
        return _unpack_words(payload, n).view("<i8")
    return _plain(encoding, payload, n).view("<i8")


def decode_floats(data: bytes, n: int) -> Floats:
    """The `n` float64 values of a column written by `encode_floats`. Raises ColumnDamaged."""
    encoding, payload = _opened(data, n)
    if encoding is Encoding.WORDS:
        return _unpack_words(payload, n).view("<f8")
    if encoding is Encoding.SINGLE:
        # Widening keeps the bits: the encoder compared them for every value.
        with np.errstate(all="ignore"):
            return _unpack_words(payload, n).astype("<u4").view("<f4").astype("<f8")
    if encoding is Encoding.DECIMAL:
        if not payload or payload[0] > _MOST_DECIMALS:
            raise ColumnDamaged("a decimal column without its decimals")
        return _from_decimal(_unpack_words(payload[1:], n).view("<i8"), payload[0])
    return _plain(encoding, payload, n).view("<f8")


def check(data: bytes, n: int) -> None:
    """Raises ColumnDamaged where the checksum or the head says that this is no column of `n` values."""
    _opened(data, n)


# --- head and plain payloads -----------------------------------------------------------------------


def _column(encoding: Encoding, n: int, payload: bytes) -> bytes:
    tail = _U32.pack(n) + payload
    head = bytes([VERSION, encoding])
    return head + _U32.pack(zlib.crc32(tail, zlib.crc32(head))) + tail


def _opened(data: bytes, n: int) -> tuple[Encoding, memoryview]:
    view = memoryview(data)
    if len(view) < HEAD.size:
        raise ColumnDamaged(f"{len(view)} bytes are too short for a column")
    version, tag, crc, count = HEAD.unpack_from(view)
    if zlib.crc32(view[_CRC_AT + 4 :], zlib.crc32(view[:_CRC_AT])) != crc:
        raise ColumnDamaged("the checksum does not match")
    if version != VERSION:
        raise ColumnDamaged(f"version {version} of the format is not known")
    if count != n:
        raise ColumnDamaged(f"{count} values where {n} should be")
    try:
        return Encoding(tag), view[HEAD.size :]
    except ValueError:
        raise ColumnDamaged(f"encoding {tag} is not known") from None


def _plain(encoding: Encoding, payload: memoryview, n: int) -> Words:
    if encoding is Encoding.CONSTANT and len(payload) == _U64.size:
        return np.full(n, _U64.unpack(payload)[0], dtype="<u8")
    if encoding is Encoding.RAW and len(payload) == 8 * n:
        return np.frombuffer(payload, dtype="<u8").copy()
    raise ColumnDamaged(f"{len(payload)} bytes do not make a column of {n} values")


# --- what float64 values can also be written as ----------------------------------------------------

_Candidate = tuple[Encoding, bytes, Words]


def _float_forms(values: Floats, bits: Words) -> list[_Candidate]:
    """Encodings that give these values back to the bit; the bits themselves only where nothing else does."""
    found: list[_Candidate] = []
    with np.errstate(all="ignore"):  # overflow and NaN show as bits that differ
        decimal = _as_decimal(values, bits)
        if decimal is not None:
            found.append(decimal)
        single = values.astype("<f4")
        if bool((single.astype("<f8").view("<u8") == bits).all()):
            found.append((Encoding.SINGLE, b"", single.view("<u4").astype("<u8")))
    return found or [(Encoding.WORDS, b"", bits)]


def _as_decimal(values: Floats, bits: Words) -> _Candidate | None:
    """With the fewest decimals that do. What has few has nine as well, so most columns fail at once."""
    few = slice(0, 16)
    for decimals in (0, _MOST_DECIMALS, *range(1, _MOST_DECIMALS)):
        if _whole(values[few], bits[few], decimals) is None:
            if decimals == _MOST_DECIMALS:
                return None
        elif decimals < _MOST_DECIMALS:
            whole = _whole(values, bits, decimals)
            if whole is not None:
                return Encoding.DECIMAL, bytes([decimals]), whole
    whole = _whole(values, bits, _MOST_DECIMALS)
    return None if whole is None else (Encoding.DECIMAL, bytes([_MOST_DECIMALS]), whole)


def _whole(values: Floats, bits: Words, decimals: int) -> Words | None:
    """The whole numbers k with k / 10**decimals equal to the values to the bit, or None."""
    whole = np.rint(values * 10.0**decimals).astype("<i8")
    if bool((_from_decimal(whole, decimals).view("<u8") == bits).all()):
        return whole.view("<u8")
    return None


def _from_decimal(whole: Ints, decimals: int) -> Floats:
    values = whole.astype("<f8")
    if decimals:
        values /= 10.0**decimals
    return values


# --- words -----------------------------------------------------------------------------------------


def _smallest(candidates: list[_Candidate], plain: Words) -> bytes:
    """The column in the form whose planes carry least entropy; RAW where that is no gain."""
    n = len(plain)
    chosen: tuple[Encoding, bytes, Words, Floats | None] | None = None
    least = 0.0
    for encoding, prefix, words in candidates:
        for order, zigzag, based in _FORMS if n > 2 else _FORMS[:1]:
            head, form = _differences(words, order, zigzag=zigzag, based=based)
            # What to choose by is half the time of writing a short column, so there it is something simpler.
            entropies = None if n < _SHORT else _entropies(form)
            bits = _magnitude(form) if entropies is None else float(entropies.sum())
            if chosen is None or bits < least:
                least, chosen = bits, (encoding, prefix + head, form, entropies)
    assert chosen is not None, "at least one candidate"
    encoding, head, form, entropies = chosen
    payload = head + (_joined(form) if entropies is None else _planes(form, entropies))
    if len(payload) >= 8 * n:
        return _column(Encoding.RAW, n, plain.tobytes())
    return _column(encoding, n, payload)


def _differences(words: Words, order: int, *, zigzag: bool, based: bool) -> tuple[bytes, Words]:
    """What undoes `order` differences, and the words after them, `order` fewer."""
    form = words
    firsts = b""
    for _ in range(order):
        firsts += _U64.pack(int(form[0]))
        form = form[1:] - form[:-1]
    base = 0
    if zigzag:
        form = (form << np.uint64(1)) ^ (form.view("<i8") >> np.int64(63)).view("<u8")
    if based:
        least = form.view("<i8").min()
        base = int(least.view("<u8"))
        form = form - np.uint64(base)
    return _WORDS.pack(order, zigzag, base) + firsts, form


def _magnitude(form: Words) -> float:
    """Bits a value that the words would take one by one."""
    return float(np.log2((form - form.min()).astype(np.float64) + 1.0).mean())


def _entropies(form: Words) -> Floats:
    """Estimated bits a value for each byte plane, lowest first, without the highest ones that are all 0."""
    width = max(1, (int(form.max()).bit_length() + 7) // 8)
    sample = form[:: max(1, len(form) // _SAMPLE_WORDS)]
    planes = np.ascontiguousarray(sample).view("u1").reshape(len(sample), 8)[:, :width]
    offsets = np.arange(width, dtype=np.intp) * 256
    counts = np.bincount((planes + offsets).ravel(), minlength=256 * width).reshape(width, 256)
    shares = counts / len(sample)
    logs = np.log2(shares, where=counts > 0, out=np.zeros_like(shares))
    entropies: Floats = -(shares * logs).sum(axis=1)
    return entropies


def _planes(form: Words, entropies: Floats) -> bytes:
    width = len(entropies)
    rows = np.ascontiguousarray(form.view("u1").reshape(len(form), 8)[:, :width].T)
    parts = [bytes([width, 0])]
    for row, entropy in zip(rows, entropies.tolist(), strict=True):
        if entropy < 0.1 and bool((row == row[0]).all()):
            parts.append(bytes([_Plane.SAME, row[0]]))
            continue
        parts.append(_plane(row.tobytes(), deflated=entropy < _NOISE_BITS))
    return b"".join(parts)


def _joined(form: Words) -> bytes:
    width = max(1, (int(form.max()).bit_length() + 7) // 8)
    rows = form.view("u1").reshape(len(form), 8)[:, :width].T
    return bytes([width, 1]) + _plane(rows.tobytes(), deflated=True)


def _plane(row: bytes, *, deflated: bool) -> bytes:
    if deflated:
        deflater = zlib.compressobj(_DEFLATE_LEVEL, zlib.DEFLATED, -15)
        packed = deflater.compress(row) + deflater.flush()
        if len(packed) + _U32.size < len(row):
            return bytes([_Plane.DEFLATED]) + _U32.pack(len(packed)) + packed
    return bytes([_Plane.STORED]) + row


def _unpack_words(payload: memoryview, n: int) -> Words:
    if len(payload) < _WORDS.size:
        raise ColumnDamaged("the words are cut off")
    order, zigzag, base = _WORDS.unpack_from(payload)
    at = _WORDS.size + order * _U64.size
    if order > 2 or zigzag > 1 or order > n or len(payload) < at:
        raise ColumnDamaged("the words have no known form")
    firsts = [int(first) for first in np.frombuffer(payload[_WORDS.size : at], dtype="<u8")]
    form = _unpack_planes(payload[at:], n - order)
    if base:
        form += np.uint64(base)
    if zigzag:
        form = (form >> np.uint64(1)) ^ (np.uint64(0) - (form & np.uint64(1)))
    for first in reversed(firsts):
        whole = np.empty(len(form) + 1, dtype="<u8")
        whole[0] = first
        whole[1:] = form
        form = np.cumsum(whole, dtype="<u8")
    return form


def _unpack_planes(payload: memoryview, n: int) -> Words:
    width, joined = (payload[0], payload[1]) if len(payload) >= 2 else (0, 0)
    if not 1 <= width <= 8 or joined > 1:
        raise ColumnDamaged(f"a width of {width} bytes")
    rows: _Bytes = np.zeros((n, 8), dtype="u1")
    at = 2
    if joined:
        row, at = _unpack_plane(payload, at, n * width)
        rows[:, :width] = row.reshape(width, n).T
    else:
        for position in range(width):
            rows[:, position], at = _unpack_plane(payload, at, n)
    if at != len(payload):
        raise ColumnDamaged("bytes are left over after the planes")
    return rows.view("<u8").reshape(n)


def _unpack_plane(payload: memoryview, at: int, n: int) -> tuple[_Bytes, int]:
    """The plane of n bytes (SAME: of one) at a place, and the place after it."""
    if at + 2 > len(payload):
        raise ColumnDamaged("the planes are cut off")
    kind = payload[at]
    at += 1
    if kind == _Plane.SAME:
        return np.frombuffer(payload[at : at + 1], dtype="u1"), at + 1
    if kind == _Plane.STORED:
        return _exactly(payload[at : at + n], n), at + n
    if kind == _Plane.DEFLATED and at + _U32.size <= len(payload):
        (length,) = _U32.unpack_from(payload, at)
        at += _U32.size
        return _exactly(_inflated(payload[at : at + length], n), n), at + length
    raise ColumnDamaged(f"plane kind {kind} is not known")


def _inflated(packed: memoryview, n: int) -> bytes:
    inflater = zlib.decompressobj(-15)
    try:
        # One byte more than there should be shows a plane that is too long without ever holding it.
        return inflater.decompress(packed, n + 1)
    except zlib.error as error:
        raise ColumnDamaged(f"a plane does not inflate: {error}") from None


def _exactly(row: bytes | memoryview, n: int) -> _Bytes:
    if len(row) != n:
        raise ColumnDamaged(f"a plane of {len(row)} bytes where {n} should be")
    return np.frombuffer(row, dtype="u1")
