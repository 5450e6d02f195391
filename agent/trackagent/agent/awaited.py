"""The ranks of other nodes from which a hub has heard, and of which no end has come: whom it waits for, a
while, when it is told to stop with its job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

# Who was not heard of for so long is not waited for: their node may be gone.
HEARD_S = 60.0
MAX_PRODUCERS = 100_000


class Awaited:
    """In one thread. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # When each was heard of, in that order.
        self._heard: dict[bytes, float] = {}

    def note(self, heard: Iterable[bytes], ended: Iterable[bytes]) -> None:
        """Something of these producers came, and the ends of those."""
        now = self._clock()
        for producer_id in heard:
            self._heard.pop(producer_id, None)
            self._heard[producer_id] = now
        for producer_id in ended:
            self._heard.pop(producer_id, None)
        while len(self._heard) > MAX_PRODUCERS:
            del self._heard[next(iter(self._heard))]

    def count(self) -> int:
        """How many are still to end."""
        since = self._clock() - HEARD_S
        while self._heard and next(iter(self._heard.values())) < since:
            del self._heard[next(iter(self._heard))]
        return len(self._heard)
