"""What other agents forward, on its way into the spool: a spool that is new asks what is known of before.

A hub whose spool is lost, and whose store is not, must not take a part again that the store has. So the
first time that it hears of an origin, it asks the store, or the hub that everything goes to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from trackagent.agent.sinks.contract import Remembers
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import BatchId

Ranges = Sequence[tuple[int, int]]
# Origins that were asked about; then all are asked about again.
_REMEMBERED = 100_000
# Who asks may wait for the disk, or for another hub.
_ASKING = 4


class AtTheHub:
    """What came before by the word of a hub: the last of an origin, by whatever way. Any thread may ask; the
    sink is for one, so that it is asked by one at a time."""

    def __init__(self, hub: Remembers) -> None:
        self._hub = hub
        self._lock = threading.Lock()

    def __call__(self, origin: str) -> Ranges:
        with self._lock:
            last = self._hub.last_accepted(origin)
        return [(last, last)] if last else []  # what lies before may be missing


class Arrivals:
    """Takes parts into the spool. before: which ranges of an origin came before this spool; what it raises
    keeps the part where it is. passes_on: nothing is asked for a part, and no part is taken for one that
    came before: whoever gets it next keeps it once, and need not be there now. Futures fail with what
    `before` raises, and as Spool.accept does. Any thread may call."""

    def __init__(
        self, spool: Spool, before: Callable[[str], Ranges], *, passes_on: bool = False
    ) -> None:
        self._passes_on = passes_on
        self._spool = spool
        self._before = before
        self._lock = threading.Lock()
        # Since the spool last forgot something.
        self._asked: set[str] = set()
        self._forgettings = spool.forgettings
        self._askers = ThreadPoolExecutor(_ASKING, thread_name_prefix="arrivals")

    def accept(self, id_: BatchId, part: bytes, node: str) -> Future[None]:
        """As Spool.accept."""
        if self._passes_on:
            return self._spool.accept(id_, part, node)
        forgettings = self._spool.forgettings
        if self._was_asked(id_.origin):
            return self._spool.accept(id_, part, node, forgettings=forgettings)
        return self._askers.submit(self._accept, id_, part, node)

    def arrived(self, origin: str) -> Future[list[tuple[int, int]]]:
        """As Spool.arrived, with what is known of before."""
        if self._was_asked(origin):
            return self._spool.arrived(origin)
        return self._askers.submit(self._arrived, origin)

    def close(self) -> None:
        self._askers.shutdown()

    def _accept(self, id_: BatchId, part: bytes, node: str) -> None:
        forgettings = self._spool.forgettings
        self._ask(id_.origin)
        self._spool.accept(id_, part, node, forgettings=forgettings).result()

    def _arrived(self, origin: str) -> list[tuple[int, int]]:
        if self._passes_on:
            return self._spool.arrived(origin).result() or list(self._before(origin))
        self._ask(origin)
        return self._spool.arrived(origin).result()

    def _ask(self, origin: str) -> None:
        forgettings = self._spool.forgettings
        if not self._spool.arrived(origin).result():
            self._spool.note_arrived(origin, self._before(origin)).result()
        with self._lock:
            if len(self._asked) >= _REMEMBERED:
                self._asked.clear()
            if self._spool.forgettings == forgettings:
                self._asked.add(origin)

    def _was_asked(self, origin: str) -> bool:
        with self._lock:
            if self._forgettings != self._spool.forgettings:
                self._forgettings = self._spool.forgettings
                self._asked.clear()
            return origin in self._asked
