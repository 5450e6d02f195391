"""What the kernel tells in files: read without opening them anew, and counters as rates.

Names in it (devices, interfaces) become parts of keys, so they are made harmless and their number is bounded.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

# What one kind of device may add to the series of a node.
MAX_NAMES = 32
MAX_NAME_CHARACTERS = 64
_UNSAFE = re.compile(r"[^A-Za-z0-9_.:-]")
# Between samples that are closer than this, a rate says nothing.
_MIN_SECONDS = 0.1


class KernelFile:
    """A file of /proc, /sys or a control group, kept open: each `read` has it written anew. OSError, also at
    construction. in_pieces: the kernel gives it a page at a time, as it does with lists of devices."""

    def __init__(self, path: Path, max_bytes: int = 64 * 1024, *, in_pieces: bool = False) -> None:
        self._max_bytes = max_bytes
        self._in_pieces = in_pieces
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def read(self) -> bytes:
        """Its content, cut off at the number of bytes given."""
        data = os.pread(self._descriptor, self._max_bytes, 0)
        while self._in_pieces and 0 < len(data) < self._max_bytes:
            more = os.pread(self._descriptor, self._max_bytes - len(data), len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        self._close()


class Rates:
    """Counters as rates, from one sample to the next."""

    def __init__(self) -> None:
        self._before: Mapping[str, float] = {}
        self._at = 0.0

    def per_second(self, counters: Mapping[str, float], now: float) -> dict[str, float]:
        """How much each has grown in a second since the call before; nothing of one that is new, or that has
        begun anew. now: seconds, monotonic."""
        seconds = now - self._at
        before, self._before, self._at = self._before, counters, now
        if seconds < _MIN_SECONDS:
            return {}
        return {
            name: (count - before[name]) / seconds
            for name, count in counters.items()
            if name in before and count >= before[name]
        }


def part(name: str) -> str:
    """A name that the system gives, as a part of a key."""
    return _UNSAFE.sub("_", name)[:MAX_NAME_CHARACTERS] or "_"


def bounded(names: Iterable[str]) -> list[str]:
    """The first of them by name, as many as may become series."""
    return sorted(names)[:MAX_NAMES]
