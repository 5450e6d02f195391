"""What a user may hand to `log()`: keys, values, steps and times, checked and made plain.

The fast path of `log()` takes dicts of Python floats, ints, bools and numpy scalars whose keys were seen
before; everything else comes through here. Each refusal is a ValueRefused that names the key and what to do.
"""

from __future__ import annotations

import math
import operator
import reprlib
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from trackagent.client.errors import ValueRefused

MAX_KEY_CHARACTERS = 250
MAX_TEXT_CHARACTERS = 6000
_INT64 = 2**63
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# Short, and safe: what is refused may be huge, and its own repr may raise.
_short = reprlib.Repr()
_short.maxother = _short.maxstring = 80
_shown = _short.repr


def check_key(key: object, what: str = "metric key") -> str:
    """`key` if it can be one: text of 1 to 250 characters without control characters."""
    if not isinstance(key, str):
        raise ValueRefused(f"bad {what}", f"the {what} {_shown(key)} is no text: use a str")
    if not key:
        raise ValueRefused(f"bad {what}", f"an empty {what}: give it a name")
    if len(key) > MAX_KEY_CHARACTERS:
        raise ValueRefused(
            f"bad {what}",
            f"the {what} {key[:40]!r}... has {len(key)} characters: use at most {MAX_KEY_CHARACTERS}",
        )
    if not key.isprintable() and any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in key):
        raise ValueRefused(
            f"bad {what}", f"the {what} {key!r} holds control characters: leave them out"
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueRefused(
            f"bad {what}", f"the {what} {key!r} cannot be written as UTF-8"
        ) from None
    return key


def to_float(key: str, value: Any) -> float:
    """`value` as float64, bit-exact where it is one: anything `float()` takes, and tensors or arrays of
    one element. Never waits for a device: a tensor that is not in the CPU's memory is refused.
    """
    if type(value) is float:
        return value
    try:
        if isinstance(value, (float, int)):
            return float(value)
        if hasattr(value, "is_cpu"):  # torch, whose float() would wait for another device
            if not value.is_cpu:
                raise ValueRefused(
                    "device tensor",
                    f"{key!r} is a tensor on {value.device}, and reading it would make the training "
                    "loop wait: log tensor.item() where that is acceptable",
                )
            return float(value.item())
        if hasattr(value, "shape"):  # numpy
            return float(value.item())
        return float(value)
    except ValueRefused:
        raise
    except Exception:  # noqa: BLE001 - whatever the value's own code raises
        shape = getattr(value, "shape", None)
        what = f"of shape {tuple(shape)}" if shape else _shown(value)
        raise ValueRefused(
            "not a number",
            f"{key!r} is a {type(value).__name__}, {what}, which is no number: log a float",
        ) from None


def to_step(step: Any) -> int:
    """`step` as int: anything that is a whole number."""
    if type(step) is int:
        number = step
    else:
        try:
            whole = isinstance(step, float) and step.is_integer()
            number = int(step) if whole else operator.index(step)
        except Exception:  # noqa: BLE001 - whatever the step's own code raises
            raise ValueRefused("bad step", f"the step {_shown(step)} is no whole number") from None
    if not -_INT64 <= number < _INT64:
        raise ValueRefused("bad step", f"the step {number} does not fit 64 bits")
    return number


def to_time_ns(timestamp: Any) -> int:
    """Nanoseconds since 1970-01-01 UTC: of a datetime (local time if naive), of seconds as a
    number, or now."""
    if timestamp is None:
        return time.time_ns()
    try:
        if isinstance(timestamp, datetime):
            since = timestamp.astimezone(timezone.utc) - _EPOCH
            nanoseconds = since // timedelta(microseconds=1) * 1000
        elif isinstance(timestamp, int):
            nanoseconds = timestamp * 1_000_000_000
        else:
            seconds = float(timestamp)
            whole = math.floor(seconds)
            # Not seconds * 1e9: a float of today's nanoseconds is exact to 256 only.
            nanoseconds = whole * 1_000_000_000 + round((seconds - whole) * 1e9)
    except Exception:  # noqa: BLE001 - whatever the timestamp's own code raises
        nanoseconds = _INT64
    if not -_INT64 < nanoseconds < _INT64:
        raise ValueRefused(
            "bad timestamp",
            f"the timestamp {_shown(timestamp)} is no time: use seconds since 1970, or a datetime",
        )
    return nanoseconds


def to_text(value: Any) -> tuple[str, bool]:
    """`value` as str() shows it, and whether it had to be cut to 6000 characters."""
    text = str(value).encode("utf-8", "replace").decode()
    return text[:MAX_TEXT_CHARACTERS], len(text) > MAX_TEXT_CHARACTERS


def flatten(params: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as one, their keys joined by dots; an empty mapping stays as a value."""
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value
