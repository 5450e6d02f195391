"""What a run refused: counted by reason, and where in the steps it happened.

A **gap** is a stretch of refused log calls between two that got through. It is known by its reason and the
time of its first call, and may be written again while it grows: what reads it keeps the largest.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from time import time_ns

from trackagent.client import record
from trackagent.client.journal import Journal, Lane
from trackagent.client.record import Kind

# Refusals noted before they are counted.
MAX_NOTED = 1000
# Gaps that wait to be written; more of them become one.
MAX_OPEN_GAPS = 16


@dataclass(slots=True)
class _Gap:
    reason: str
    first_step: int
    last_step: int
    first_time_ns: int
    last_time_ns: int
    stored: int  # metric records published when it began: it ends when there is another one
    records: int = 0
    written: int = 0

    def encode(self) -> bytes:
        data = {
            "reason": self.reason,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "first_time_ns": self.first_time_ns,
            "last_time_ns": self.last_time_ns,
            "records": self.records,
        }
        return record.encode_json(Kind.GAP, data, step=self.first_step, time_ns=self.last_time_ns)


class Refusals:
    """Of one producer. `add` and `count` on any thread and in signal handlers; `write` on one thread at a
    time. Bounded: a number a reason, and a few gaps.
    """

    def __init__(self) -> None:
        self._noted: deque[tuple[str, int | None, int, int]] = deque()
        self._counting = threading.Lock()
        self._lost: dict[str, int] = {}
        self._lost_written: dict[str, int] = {}
        self._gaps: list[_Gap] = []

    def add(self, reason: str, step: int | None, stored: int) -> None:
        """Notes one refusal. step: of a log call of which nothing was kept, else None. stored: metric
        records published so far."""
        self._noted.append((reason, step, time_ns(), stored))
        if len(self._noted) > MAX_NOTED:
            self.count()

    def count(self) -> None:
        """Counts what is noted. Whoever comes second need not wait: the first one counts its refusals too,
        or the next one does."""
        if self._counting.acquire(blocking=False):
            try:
                while self._noted:
                    reason, step, when_ns, stored = self._noted.popleft()
                    self._lost[reason] = self._lost.get(reason, 0) + 1
                    if step is not None:
                        self._place(reason, step, when_ns, stored)
            finally:
                self._counting.release()

    def _place(self, reason: str, step: int, when_ns: int, stored: int) -> None:
        last = next((gap for gap in reversed(self._gaps) if gap.reason == reason), None)
        if last is None or (last.stored != stored and len(self._gaps) < MAX_OPEN_GAPS):
            # Those that are written and have ended need not be kept.
            self._gaps = [gap for gap in self._gaps if gap.records != gap.written]
            last = _Gap(reason, step, step, when_ns, when_ns, stored)
            self._gaps.append(last)
        last.first_step = min(last.first_step, step)
        last.last_step = max(last.last_step, step)
        last.last_time_ns = max(last.last_time_ns, when_ns)
        last.stored = stored
        last.records += 1

    @property
    def unwritten(self) -> bool:
        """Whether `write` has anything to say."""
        grown = any(gap.records != gap.written for gap in list(self._gaps))
        return bool(self._noted) or self._lost != self._lost_written or grown

    def write(self, journal: Journal, lane: Lane, *, last: bool = False) -> None:
        """Writes the counts and gaps that are not in the journal yet.

        In a full journal they go into the room that each segment keeps for them: at first, and when twice as
        many were lost as it says so far, or always when they are the `last` ones. JournalError otherwise, or
        when that is full too; then they are to be written later.
        """
        self.count()
        due = last or sum(self._lost.values()) >= 2 * sum(self._lost_written.values())
        lost = dict(self._lost)
        if lost != self._lost_written:
            loss = record.encode_json(Kind.LOSS, lost, step=record.NO_STEP, time_ns=time_ns())
            journal.write(lane, loss, last_words=due)
            self._lost_written = lost
        for gap in list(self._gaps):
            records = gap.records  # before it is encoded: it may grow meanwhile
            if records != gap.written:
                journal.write(lane, gap.encode(), last_words=due)
                gap.written = records
