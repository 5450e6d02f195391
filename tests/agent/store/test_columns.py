"""Columns as bytes: what comes back is what went in, to the bit, and damage is always noticed."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from trackagent.agent.store.columns import (
    HEAD,
    ColumnDamaged,
    Encoding,
    decode_floats,
    decode_ints,
    encode_floats,
    encode_ints,
)

RANDOM = np.random.default_rng(7)
NOISE = RANDOM.normal(size=3000)

any_bits = st_numpy.arrays(np.uint64, st.integers(0, 300))
float_lists = st.lists(
    st.one_of(
        st.floats(),
        st.floats(width=32),
        st.integers(-(2**60), 2**60).map(float),
        st.integers(-(10**12), 10**12).map(lambda whole: whole / 10**9),
        st.sampled_from([-0.0, 0.0, float("inf"), float("-inf")]),
    ),
    max_size=200,
)


def encoding(column: bytes) -> Encoding:
    return Encoding(column[1])


def sealed(column: bytes) -> bytes:
    """The column with a checksum that matches: damage that a checksum does not show."""
    crc = zlib.crc32(column[6:], zlib.crc32(column[:2]))
    return column[:2] + crc.to_bytes(4, "little") + column[6:]


@given(any_bits)
def test_any_float_bits_come_back(bits: np.ndarray) -> None:
    values = bits.view(np.float64)
    assert decode_floats(encode_floats(values), len(values)).tobytes() == values.tobytes()


@given(float_lists)
def test_float_values_come_back(listed: list[float]) -> None:
    values = np.array(listed, dtype=np.float64)
    assert decode_floats(encode_floats(values), len(values)).tobytes() == values.tobytes()


@given(st_numpy.arrays(np.float32, st.integers(0, 300)))
def test_float32_values_come_back(single: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        values = single.astype(np.float64)
    assert decode_floats(encode_floats(values), len(values)).tobytes() == values.tobytes()


@given(any_bits)
def test_any_ints_come_back(bits: np.ndarray) -> None:
    values = bits.view(np.int64)
    assert decode_ints(encode_ints(values), len(values)).tobytes() == values.tobytes()


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**62), 2**62), st.integers(0, 100))
def test_linear_ints_come_back_also_around_the_end_of_the_range(
    start: int, stride: int, n: int
) -> None:
    whole = (start + np.arange(n, dtype=object) * stride) % 2**64
    values = whole.astype(np.uint64).view(np.int64)
    assert decode_ints(encode_ints(values), n).tobytes() == values.tobytes()


@given(st.binary(max_size=200), st.integers(0, 100))
def test_any_bytes_decode_or_are_damaged(data: bytes, n: int) -> None:
    for decode in (decode_ints, decode_floats):
        try:
            assert len(decode(data, n)) == n
        except ColumnDamaged:
            pass


@given(st.data())
def test_a_column_with_any_byte_changed_under_a_right_checksum_decodes_or_is_damaged(
    data: st.DataObject,
) -> None:
    values = data.draw(st.sampled_from([NOISE[:90], np.rint(NOISE * 1e4)[:90] / 1e3]))
    column = bytearray(encode_floats(values))
    column[data.draw(st.integers(HEAD.size, len(column) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert len(decode_floats(sealed(bytes(column)), 90)) == 90
    except ColumnDamaged:
        pass


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full(3000, 0.1), Encoding.CONSTANT),
        (np.full(3000, np.nan), Encoding.CONSTANT),
        (np.rint(NOISE * 1000) + 0.0, Encoding.DECIMAL),
        (np.rint(NOISE * 1e9) / 1e9, Encoding.DECIMAL),
        (NOISE.astype(np.float32).astype(np.float64), Encoding.SINGLE),
        (np.where(NOISE > 2, np.nan, NOISE.astype(np.float32).astype(np.float64)), Encoding.SINGLE),
        (NOISE, Encoding.WORDS),
        (RANDOM.integers(0, 2**64, 3000, dtype=np.uint64).view(np.float64), Encoding.RAW),
    ],
)
def test_floats_are_kept_in_the_encoding_that_suits_them(
    values: np.ndarray, expected: Encoding
) -> None:
    assert encoding(encode_floats(values)) == expected


def test_steps_take_a_few_bytes_in_all() -> None:
    assert len(encode_ints(np.arange(10**6, dtype=np.int64) * 10)) == HEAD.size + 16


def test_times_take_what_their_jitter_takes() -> None:
    jitter = RANDOM.integers(-(2**15), 2**15, 50_000)
    times = 1_700_000_000_000_000_000 + np.cumsum(100_000_000 + jitter)
    assert len(encode_ints(times)) < 2.1 * len(times)


def test_losses_in_float32_take_under_four_bytes() -> None:
    losses = (2 + NOISE * 0.1).astype(np.float32).astype(np.float64)
    assert len(encode_floats(losses)) < 4 * len(losses)


def test_a_smooth_schedule_takes_under_three_bytes() -> None:
    schedule = 3e-4 * (1 + np.cos(np.pi * np.arange(65_536) / 200_000))
    assert len(encode_floats(schedule)) < 3 * len(schedule)


def test_noise_takes_at_most_a_head_more_than_its_bits() -> None:
    bits = RANDOM.integers(0, 2**64, 3000, dtype=np.uint64)
    assert len(encode_floats(bits.view(np.float64))) == HEAD.size + 8 * len(bits)


def test_a_changed_byte_is_damage() -> None:
    column = bytearray(encode_floats(NOISE))
    column[100] ^= 1
    with pytest.raises(ColumnDamaged, match="checksum"):
        decode_floats(bytes(column), len(NOISE))


def test_a_cut_column_is_damage() -> None:
    with pytest.raises(ColumnDamaged):
        decode_floats(encode_floats(NOISE)[:-1], len(NOISE))


def test_a_column_of_another_length_is_damage() -> None:
    with pytest.raises(ColumnDamaged, match="3000 values where 2999 should be"):
        decode_floats(encode_floats(NOISE), 2999)


def test_a_column_of_an_unknown_version_is_damage() -> None:
    column = sealed(b"\x02" + encode_floats(NOISE)[1:])
    with pytest.raises(ColumnDamaged, match="version 2"):
        decode_floats(column, len(NOISE))


def test_a_plane_that_would_inflate_far_beyond_its_length_is_damage() -> None:
    column = encode_floats(NOISE.astype(np.float32).astype(np.float64))
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflater.compress(bytes(50_000_000)) + deflater.flush()
    words = b"\0\0" + bytes(8)
    plane = b"\x02" + len(bomb).to_bytes(4, "little") + bomb
    with pytest.raises(ColumnDamaged, match="a plane of 3001 bytes"):
        decode_floats(sealed(column[: HEAD.size] + words + b"\x01\x00" + plane), len(NOISE))
