"""What may be logged and what is refused, with which words."""

from __future__ import annotations

import math
import struct
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackagent.client import values
from trackagent.client.errors import ValueRefused
from trackagent.client.values import check_key, flatten, to_float, to_step, to_text, to_time_ns


class Float:
    def __init__(self, value: object) -> None:
        self.value = value

    def __float__(self) -> Any:
        return self.value


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def refusal(function: Any, *arguments: Any) -> ValueRefused:
    with pytest.raises(ValueRefused) as caught:
        function(*arguments)
    return caught.value


NAN_WITH_PAYLOAD: float = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_DEAD_BEEF))[0]
BITS = (0.1, -0.0, math.inf, -math.inf, math.nan, NAN_WITH_PAYLOAD, 5e-324, 1.7976931348623157e308)

# --- values


@pytest.mark.parametrize(
    "wrap",
    [
        float,
        np.float64,
        np.array,
        lambda v: np.array([v]),
    ],
    ids=["float", "numpy scalar", "0-d array", "array of one"],
)
@pytest.mark.parametrize("value", BITS, ids=repr)
def test_a_float64_keeps_its_bits(wrap: Any, value: float) -> None:
    assert bits(to_float("k", wrap(value))) == bits(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (False, 0.0),
        (7, 7.0),
        (2**53, 2.0**53),
        (-(10**300), -1e300),
        (Decimal("0.25"), 0.25),
        (Fraction(1, 8), 0.125),
        pytest.param(Float(2.5), 2.5, id="Float"),
    ],
    ids=repr,
)
def test_python_numbers_are_taken(value: Any, expected: float) -> None:
    assert to_float("k", value) == expected


NUMPY_TYPES = [
    np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
    np.float16, np.float32, np.float64, np.longdouble, np.longlong, np.intc,
]  # fmt: skip


@pytest.mark.parametrize("kind", NUMPY_TYPES, ids=lambda kind: kind.__name__)
def test_numpy_scalars_of_every_type_are_taken(kind: Any) -> None:
    assert to_float("k", kind(1)) == 1.0


@pytest.mark.parametrize("kind", NUMPY_TYPES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_numpy_arrays_of_one_element_are_taken(kind: Any, shape: tuple[int, ...]) -> None:
    assert to_float("k", np.ones(shape, kind)) == 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("high", "'k' is a str, 'high', which is no number: log a float"),
        (b"high", "'k' is a bytes, b'high', which is no number: log a float"),
        (None, "'k' is a NoneType, None, which is no number: log a float"),
        ([1.0], "'k' is a list, [1.0], which is no number: log a float"),
        ((1.0,), "'k' is a tuple, (1.0,), which is no number: log a float"),
        ({"a": 1.0}, "'k' is a dict, {'a': 1.0}, which is no number: log a float"),
        (1j, "'k' is a complex, 1j, which is no number: log a float"),
        (
            np.complex128(1j),
            f"'k' is a complex128, {np.complex128(1j)!r}, which is no number: log a float",
        ),
        (np.zeros(3), "'k' is a ndarray, of shape (3,), which is no number: log a float"),
        (np.zeros((2, 0)), "'k' is a ndarray, of shape (2, 0), which is no number: log a float"),
        (
            np.array("a"),
            "'k' is a ndarray, array('a', dtype='<U1'), which is no number: log a float",
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_number_is_refused(value: Any, message: str) -> None:
    refused = refusal(to_float, "k", value)
    assert (refused.reason, str(refused)) == ("not a number", message)


def test_an_integer_beyond_float64_is_refused() -> None:
    assert refusal(to_float, "k", 10**400).reason == "not a number"


@pytest.mark.parametrize(
    "value", ["x" * 10_000, [0.5] * 10_000, {i: i for i in range(10_000)}], ids=type
)
def test_a_long_value_is_shown_shortened(value: Any) -> None:
    assert len(str(refusal(to_float, "k", value))) < 150


# --- keys


@pytest.mark.parametrize(
    "key", ["loss", "train/loss", "ä", "损失", "a b", "π=3", "k" * 250, "\u00a0", "-", "🔥"]
)
def test_text_is_a_key(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "an empty metric key: give it a name"),
        (
            "k" * 251,
            f"the metric key {'k' * 40!r}... has 251 characters: use at most 250",
        ),
        ("a\nb", "the metric key 'a\\nb' holds control characters: leave them out"),
        ("a\x00", "the metric key 'a\\x00' holds control characters: leave them out"),
        ("\x7f", "the metric key '\\x7f' holds control characters: leave them out"),
        ("\x9f", "the metric key '\\x9f' holds control characters: leave them out"),
        ("\ud800", "the metric key '\\ud800' cannot be written as UTF-8"),
        (3, "the metric key 3 is no text: use a str"),
        (None, "the metric key None is no text: use a str"),
        (b"loss", "the metric key b'loss' is no text: use a str"),
        (("a",), "the metric key ('a',) is no text: use a str"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_key_is_refused(key: Any, message: str) -> None:
    refused = refusal(check_key, key)
    assert (refused.reason, str(refused)) == ("bad metric key", message)


@given(st.text())
def test_a_key_is_taken_or_refused_and_nothing_else_happens(key: str) -> None:
    try:
        taken = check_key(key)
    except ValueRefused:
        return
    assert "\n" not in taken
    assert taken.encode().decode() == key


# --- steps


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0),
        (-5, -5),
        (3.0, 3),
        (True, 1),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (np.int64(9), 9),
        (np.uint8(200), 200),
        (np.float64(4.0), 4),
        (np.array(6), 6),
    ],
    ids=repr,
)
def test_whole_numbers_are_steps(step: Any, expected: int) -> None:
    assert (to_step(step), type(to_step(step))) == (expected, int)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (3.5, "the step 3.5 is no whole number"),
        (math.nan, "the step nan is no whole number"),
        (math.inf, "the step inf is no whole number"),
        ("3", "the step '3' is no whole number"),
        ([3], "the step [3] is no whole number"),
        (2**63, "the step 9223372036854775808 does not fit 64 bits"),
        (-(2**63) - 1, "the step -9223372036854775809 does not fit 64 bits"),
        (1e30, "the step 1000000000000000019884624838656 does not fit 64 bits"),
    ],
    ids=repr,
)
def test_other_steps_are_refused(step: Any, message: str) -> None:
    refused = refusal(to_step, step)
    assert (refused.reason, str(refused)) == ("bad step", message)


# --- times

FIRST_DAY = datetime(1, 1, 1)  # noqa: DTZ001  local time
LAST_DAY = datetime(9999, 12, 31)  # noqa: DTZ001
UTC_DAY = datetime(2024, 2, 29, 12, 30, 0, 250_000, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        (0, 0),
        (1_700_000_000, 1_700_000_000_000_000_000),
        (1.5, 1_500_000_000),
        (-2.5, -2_500_000_000),
        (1_700_000_000.25, 1_700_000_000_250_000_000),
        (UTC_DAY, 1_709_209_800_250_000_000),
        (UTC_DAY.replace(microsecond=123_457), 1_709_209_800_123_457_000),
        (UTC_DAY.astimezone(timezone(timedelta(hours=9))), 1_709_209_800_250_000_000),
        (np.float64(1.5), 1_500_000_000),
        (np.int64(2), 2_000_000_000),
    ],
    ids=repr,
)
def test_seconds_and_datetimes_are_times(timestamp: Any, expected: int) -> None:
    assert to_time_ns(timestamp) == expected


def test_a_naive_datetime_is_local_time() -> None:
    assert to_time_ns(UTC_DAY.astimezone().replace(tzinfo=None)) == to_time_ns(UTC_DAY)


def test_no_timestamp_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values.time, "time_ns", lambda: 42)
    assert to_time_ns(None) == 42


@pytest.mark.parametrize(
    "timestamp",
    ["yesterday", math.nan, math.inf, 1e300, 10**30, [1], FIRST_DAY, LAST_DAY, len],
    ids=lambda value: repr(value)[:30],
)
def test_other_times_are_refused(timestamp: Any) -> None:
    refused = refusal(to_time_ns, timestamp)
    assert refused.reason == "bad timestamp"
    assert str(refused) == (
        f"the timestamp {timestamp!r} is no time: use seconds since 1970, or a datetime"
    )


# --- texts


def test_a_value_is_kept_as_str_shows_it() -> None:
    assert to_text(0.1) == ("0.1", False)


def test_6000_characters_are_kept() -> None:
    assert to_text("ä" * 6000) == ("ä" * 6000, False)


def test_a_longer_text_is_cut() -> None:
    assert to_text("ä" * 6001) == ("ä" * 6000, True)


def test_what_utf8_cannot_hold_is_replaced() -> None:
    assert to_text("a\ud800b") == ("a?b", False)


def test_nested_params_become_dotted_keys() -> None:
    params = {"model": {"depth": 3, "act": {"name": "gelu"}}, "lr": 0.1, "empty": {}, 1: {2: "x"}}
    assert list(flatten(params)) == [
        ("model.depth", 3),
        ("model.act.name", "gelu"),
        ("lr", 0.1),
        ("empty", {}),
        ("1.2", "x"),
    ]
