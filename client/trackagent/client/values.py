"""What a user may hand to `log()`: keys, values, steps and times, checked and made plain.

The fast path of `log()` takes dicts of Python floats, ints, bools and numpy scalars whose keys were seen
before; everything else comes through here, and tensors on a GPU go on to device.py. Each refusal is a
ValueRefused that names the key and what to do.
"""

from __future__ import annotations

import math
import operator
import reprlib
import sys
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
class _Short(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        # Also in a list: a tensor's own repr would wait for its device.
        return f"<tensor on {x.device}>" if _is_on_device(x) else super().repr_instance(x, level)


_short = _Short()
_short.maxother = _short.maxstring = 80
shown = _short.repr


def check_key(key: object, what: str = "metric key") -> str:
    """`key` if it can be one: text of 1 to 250 characters without control characters."""
    if not isinstance(key, str):
        raise ValueRefused(f"bad {what}", f"the {what} {shown(key)} is no text: use a str")
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
            value = _local(key, value)
            if not value.is_cpu:
                problem = (
                    _would_wait(repr(key), value) + "log tensor.item() where that is acceptable"
                )
                raise ValueRefused("device tensor", problem)
            return float(value.item())
        if hasattr(value, "shape"):  # numpy
            return float(value.item())
        return float(value)
    except ValueRefused:
        raise
    except Exception:  # noqa: BLE001 - whatever the value's own code raises
        shape = getattr(value, "shape", None)
        what = f"of shape {tuple(shape)}" if shape else shown(value)
        raise _no_number(key, value, what) from None


def is_on_gpu(value: Any) -> bool:
    """Whether `value` is a torch tensor on a CUDA or ROCm device."""
    try:
        return getattr(value, "is_cuda", False) is True
    except Exception:  # noqa: BLE001 - whatever the value's own code raises
        return False


def to_copy(key: str, value: Any) -> Any:
    """The plain tensor of one real number that a copy of `value`, a tensor on a GPU, is to be made of."""
    try:
        tensor = _plain(key, _local(key, value))
        if tensor.numel() != 1:
            raise _no_number(key, value, f"of shape {tuple(tensor.shape)}")
        if tensor.is_complex():
            raise _no_number(key, value, f"of {tensor.dtype}")
    except ValueRefused:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the value's own code raises
        raise _no_number(key, value, f"which fails with {shown(error)}") from None
    return tensor


def _plain(key: str, tensor: Any) -> Any:
    """The tensor without its class: no code of the class runs when it is copied."""
    torch: Any = sys.modules.get("torch")
    if torch is None or type(tensor) is torch.Tensor or not isinstance(tensor, torch.Tensor):
        return tensor
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ValueRefused(
            "device tensor",
            f"{key!r} is a {type(tensor).__name__}, whose value need not lie in memory: log a plain tensor, "
            "or tensor.item()",
        )
    return tensor.as_subclass(torch.Tensor)


def _is_on_device(value: Any) -> bool:
    """Whether it is a torch tensor that is not in the CPU's memory."""
    try:
        return getattr(value, "is_cpu", True) is False
    except Exception:  # noqa: BLE001 - whatever the value's own code raises
        return False


def _would_wait(what: str, tensor: Any) -> str:
    return (
        f"{what} is a tensor on {tensor.device}, and reading it would make the training loop wait: "
    )


def _local(key: str, tensor: Any) -> Any:
    """What this process has of a torch tensor, which must be all of it: to get the rest would wait for other
    ranks."""
    if hasattr(tensor, "to_local"):  # DTensor
        if not all(one.is_replicate() for one in tensor.placements):
            raise ValueRefused(
                "part of a tensor",
                f"{key!r} is a DTensor of which this rank has a part {tensor.placements}, and getting the "
                "rest would make it wait for others: log tensor.full_tensor(), called on every rank",
            )
        tensor = tensor.to_local()
    if hasattr(tensor, "trigger_wait"):  # AsyncCollectiveTensor
        raise ValueRefused(
            "unfinished collective",
            f"{key!r} is the result of a collective operation that may not have ended: log tensor.wait()",
        )
    return tensor


def _no_number(key: str, value: Any, what: str) -> ValueRefused:
    return ValueRefused(
        "not a number",
        f"{key!r} is a {type(value).__name__}, {what}, which is no number: log a float",
    )


def to_step(step: Any) -> int:
    """`step` as int: anything that is a whole number."""
    if type(step) is int:
        number = step
    elif _is_on_device(step):
        raise ValueRefused("bad step", _would_wait("the step", step) + "give an int")
    else:
        try:
            whole = isinstance(step, float) and step.is_integer()
            number = int(step) if whole else operator.index(step)
        except Exception:  # noqa: BLE001 - whatever the step's own code raises
            raise ValueRefused("bad step", f"the step {shown(step)} is no whole number") from None
    if not -_INT64 <= number < _INT64:
        raise ValueRefused("bad step", f"the step {number} does not fit 64 bits")
    return number


def to_time_ns(timestamp: Any) -> int:
    """Nanoseconds since 1970-01-01 UTC: of a datetime (local time if naive), of seconds as a
    number, or now."""
    if timestamp is None:
        return time.time_ns()
    if _is_on_device(timestamp):
        problem = _would_wait("the timestamp", timestamp) + "give seconds since 1970, or a datetime"
        raise ValueRefused("bad timestamp", problem)
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
            f"the timestamp {shown(timestamp)} is no time: use seconds since 1970, or a datetime",
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
