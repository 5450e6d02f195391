"""The pipeline: from the spool to a sink, one thread for each, so that a slow sink holds no other up.

A delivery ends in one of three ways. Accepted: the spool's cursor moves on. Rejected for good: its
journal bytes are set aside under `dead-letters/` with the reason, and the cursor moves on. Kept: it
is tried again, with the same id, after a back-off. So is what fails on this side, in the spool or in
setting aside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from trackagent.agent.decode import decode
from trackagent.agent.sinks.contract import Sink
from trackagent.agent.spool import Delivery, Spool
from trackagent.agent.store.contract import Rejected

logger = logging.getLogger(__name__)

T = TypeVar("T")

DELIVERY_BYTES = 8 * 1024 * 1024
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 30.0
MAX_BACKOFF_STOPPING_S = 1.0
IDLE_WORK_S = 0.1


class _TimeIsUp(Exception):
    """Told to stop, and the time for it has passed."""


class Pipeline(threading.Thread):
    """Feeds one sink. `interval_s`: how long records may wait so that more of them go together."""

    def __init__(self, spool: Spool, sink: Sink, *, interval_s: float, dead_letters: Path) -> None:
        super().__init__(name=f"pipeline-{sink.name}", daemon=True)
        self.state = "idle"
        self.error = ""
        self._spool = spool
        self._sink = sink
        self._interval_s = interval_s
        self._dead_letters = dead_letters / sink.name
        self._lost: dict[tuple[bytes, str], int] = {}
        self._deadline: float | None = None
        self._stopping = threading.Event()
        spool.add_sink(sink.name).result()

    @property
    def sink_name(self) -> str:
        """The name under which the spool keeps this sink's cursor."""
        return self._sink.name

    def lost(self) -> dict[str, int]:
        """Losses that producers reported since this agent started, by reason."""
        lost: dict[str, int] = {}
        for (_, reason), records in list(self._lost.items()):
            lost[reason] = lost.get(reason, 0) + records
        return lost

    def stop(self, timeout_s: float) -> None:
        """Delivers what is spooled, for at most about `timeout_s`, and closes the sink; the rest
        stays spooled."""
        self._deadline = time.monotonic() + timeout_s
        self._stopping.set()
        self._spool.wake()
        self.join()

    def run(self) -> None:
        with contextlib.suppress(_TimeIsUp):
            self._feed()
        self.state = "stopped"
        self._sink.close()

    def _feed(self) -> None:
        """Until told to stop and either nothing is left or the time is up."""
        seen = 0
        idle_work = True
        while True:
            began = time.monotonic()
            delivery = self._until_done(self._next)
            if delivery is not None:
                self._deliver(delivery)
                idle_work = True
                # A full delivery means that there is more: go on at once. Else the time in which records
                # gather is the sink's own.
                if sum(len(batch.journal_bytes) for batch in delivery.batches) < DELIVERY_BYTES:
                    idle_work = self._idle()
                    self._stopping.wait(max(0.0, began + self._interval_s - time.monotonic()))
            elif self._stopping.is_set():
                break
            elif idle_work:
                idle_work = self._idle()
            else:
                seen = self._spool.wait(seen, 0.5)

    def _next(self) -> Delivery | None:
        return self._spool.next_delivery(self._sink.name, DELIVERY_BYTES).result()

    def _idle(self) -> bool:
        try:
            return self._sink.idle(IDLE_WORK_S)
        except Exception:
            logger.exception("sink %s: its work between deliveries failed", self._sink.name)
            return False

    def _deliver(self, delivery: Delivery) -> None:
        """Until the delivery is accepted or rejected."""

        def attempt() -> None:
            self.state = "delivering"
            rejected = False
            batch = decode(delivery, self._spool.keys)
            try:
                self._sink.deliver(batch)
            except Rejected as error:
                self._set_aside(delivery, str(error))
                rejected = True
            self._spool.delivered(self._sink.name, delivery.id.last, rejected=rejected).result()
            for loss in batch.losses:
                known = self._lost.get((loss.producer_id, loss.reason), 0)
                records = known + loss.records if loss.more else max(known, loss.records)
                self._lost[loss.producer_id, loss.reason] = records

        self._until_done(attempt)

    def _until_done(self, operation: Callable[[], T]) -> T:
        """What `operation` returns; as long as it raises, it is tried again, until the time is up."""
        backoff_s = FIRST_BACKOFF_S
        while self._deadline is None or time.monotonic() < self._deadline:
            try:
                result = operation()
            except Exception as error:  # noqa: BLE001 - kept, whatever it was: the sink's contract
                self.state, self.error = "retrying", f"{type(error).__name__}: {error}"
                logger.warning("sink %s: %s; trying again", self._sink.name, self.error)
                self._pause(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            else:
                self.state, self.error = "idle", ""
                return result
        raise _TimeIsUp

    def _pause(self, seconds: float) -> None:
        """Waits; being told to stop ends it, and makes later ones short."""
        if self._deadline is None:
            self._stopping.wait(seconds)
        else:
            left = self._deadline - time.monotonic()
            time.sleep(max(0.0, min(seconds, left, MAX_BACKOFF_STOPPING_S)))

    def _set_aside(self, delivery: Delivery, reason: str) -> None:
        """Writes the delivery into a folder of its own: one file of journal bytes a batch, and why."""
        folder = self._dead_letters / f"{delivery.id.origin}-{delivery.id.first}-{delivery.id.last}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for batch in delivery.batches:
            (folder / f"{batch.number}.records").write_bytes(batch.journal_bytes)
        about = {
            "reason": reason,
            "batches": [
                {
                    "number": batch.number,
                    "lane": batch.lane,
                    "first_offset": batch.first_offset,
                    "producer": {
                        **asdict(batch.producer),
                        "producer_id": batch.producer.producer_id.hex(),
                    },
                }
                for batch in delivery.batches
            ],
        }
        (folder / "about.json").write_text(json.dumps(about, indent=2))
        logger.error(
            "sink %s rejects batches %d to %d for good: %s; they are kept in %s",
            self._sink.name,
            delivery.id.first,
            delivery.id.last,
            reason,
            folder,
        )
