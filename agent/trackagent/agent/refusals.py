"""What a hub's log says of those it refuses: each reason of each host once in a while, and not more lines
than somebody can read, whatever a broken or hostile node does, and few enough of one host that others are
told of as well."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger(__name__)

EVERY_S = 600.0
# Of all, and of one host: a reason may name a run or a range, of which a node can make up any number.
MOST_LINES, MOST_LINES_OF_A_HOST = 50, 10


class Refusals:
    """Tells of refusals, in one thread. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._told: set[tuple[str, str]] = set()
        self._lines: Counter[str] = Counter()
        self._untold = 0

    def tell(self, host: str, why: str) -> None:
        """A host is refused; `why` holds nothing secret."""
        if self._clock() - self._since >= EVERY_S:
            if self._untold:
                logger.warning("%d more refusals of other nodes were not told", self._untold)
            self._since, self._untold = self._clock(), 0
            self._told.clear()
            self._lines.clear()
        if (host, why) in self._told:
            return
        if self._lines[host] >= MOST_LINES_OF_A_HOST or len(self._told) >= MOST_LINES:
            self._untold += 1
            return
        self._told.add((host, why))
        self._lines[host] += 1
        logger.warning("refused %s: %s", host, why)
        if self._lines[host] == MOST_LINES_OF_A_HOST:
            self._end(f"refusals of {host}")
        if len(self._told) == MOST_LINES:
            self._end("refusals of other nodes")

    def _end(self, what: str) -> None:
        left_s = self._since + EVERY_S - self._clock()
        logger.warning("further %s are not told for %.0f s", what, left_s)
