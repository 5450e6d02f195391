"""What a hub's log says of those it refuses: each reason of each host once in a while, and not more lines
than somebody can read, whatever a broken or hostile node does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

EVERY_S = 600.0
MOST_LINES = 50


class Refusals:
    """Tells of refusals, in one thread. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._told: set[tuple[str, str]] = set()
        self._untold = 0

    def tell(self, host: str, why: str) -> None:
        """A host is refused; `why` holds nothing secret."""
        if self._clock() - self._since >= EVERY_S:
            if self._untold:
                logger.warning("%d more refusals of other nodes were not told", self._untold)
            self._since, self._untold = self._clock(), 0
            self._told.clear()
        if (host, why) in self._told:
            return
        if len(self._told) >= MOST_LINES:
            if not self._untold:
                logger.warning(
                    "further refusals of other nodes are not told for %.0f s",
                    self._since + EVERY_S - self._clock(),
                )
            self._untold += 1
            return
        self._told.add((host, why))
        logger.warning("refused %s: %s", host, why)
