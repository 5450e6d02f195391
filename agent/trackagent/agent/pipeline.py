"""The pipeline: from the spool to a sink, one thread for each, so that a slow sink holds no other up.

A delivery ends in one of three ways. Accepted: the spool's cursor moves on. Rejected for good: it is halved
until the batches that the sink cannot take stand alone; these become dead letters (deadletters.py), an event
in their run says so, and everything else flows on. Kept: it is tried again, with the same id, after a
back-off. So is what fails on this side, in the spool or in setting aside; and when dead letters are at their
cap, the rejected batch itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from trackagent.agent import notices
from trackagent.agent.deadletters import DeadLetter, DeadLetters
from trackagent.agent.decode import Keys, decode
from trackagent.agent.errors import AgentError
from trackagent.agent.reducing import Reducer
from trackagent.agent.sinks.contract import Away, Gathers, Remembers, Sink, says_something
from trackagent.agent.spool import AGENT_LANE, Delivered, Delivery, Spool, SpooledBatch, UnknownSink
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    EventData,
    Loss,
    ProducerEnd,
    ProducerInfo,
    Rejected,
)
from trackagent.agent.wire import opened
from trackagent.client import record
from trackagent.client.record import Kind

logger = logging.getLogger(__name__)

T = TypeVar("T")

DELIVERY_BYTES = 8 * 1024 * 1024
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 30.0
MAX_BACKOFF_STOPPING_S = 1.0
# How often the log has one and the same reason for which a sink does not get on.
TELL_AGAIN_S = 60.0
IDLE_WORK_S = 0.1
# How long a delivery may wait for what ranks send, to share its commit: they send together, every 175 ms.
SHARING_S = 0.2
# How often dead letters that people want delivered again are looked for.
RETRY_INTERVAL_S = 0.5
# After a rejection deliveries are small; they double until they have this many batches.
MANY_BATCHES = 4096
# The reason by which records that a sink has lost are counted.
GONE = "lost by the store"
_END_GONE = "it has ended; how it ended was lost with the store"


class _TimeIsUp(Exception):
    """Told to stop, and the time for it has passed."""


class Observer(Protocol):
    """Sees what a sink gets, on the pipeline's thread: quick, and raises nothing."""

    def take(self, batch: Batch) -> None:
        """The sink has accepted this batch."""
        ...

    def caught_up(self) -> None:
        """The sink has everything that was received until now."""
        ...


class Pipeline(threading.Thread):
    """Feeds one sink. `interval_s`: how long records may wait so that more of them go together.
    `dead_letters`: the sink's. `reducer`: what becomes of batches before the sink gets them; None: nothing.
    `observer` sees them as they were logged. wanted: whose batches the sink gets; with the others it is done
    at once. opens: whether it gets what other agents forwarded as it was logged, or unread. from_now: one of
    several hubs, which each get something else: its batches have ids that no other sink's have, and when
    it is new it gets nothing of what is spooled already. max_backoff_s: how long until it tries again, at
    most."""

    def __init__(
        self,
        spool: Spool,
        sink: Sink,
        *,
        interval_s: float,
        dead_letters: DeadLetters,
        observer: Observer | None = None,
        reducer: Reducer | None = None,
        wanted: Callable[[ProducerInfo], bool] | None = None,
        opens: bool = True,
        from_now: bool = False,
        max_backoff_s: float = MAX_BACKOFF_S,
    ) -> None:
        super().__init__(name=f"pipeline-{sink.name}", daemon=True)
        self.state = "idle"
        self.error = ""
        # When the sink last took something, time.time_ns(); 0: not since the start.
        self.accepted_ns = 0
        self._spool = spool
        self._sink = sink
        self._interval_s = interval_s
        self._letters = dead_letters
        self._observer = observer
        self._reducer = reducer
        self._wanted = wanted
        self._opens = opens
        self._apart = from_now
        self._max_backoff_s = max_backoff_s
        # Batches of a delivery at most, None: any number.
        self._most: int | None = None
        # Where that begins, right before what comes next, of which there was nothing for the sink. The next
        # batch's range covers it, so that the sink has no hole there.
        self._passed: int | None = None
        self._retry_at = 0.0
        self._doubtful = False
        self._deadline: float | None = None
        self._stopping = threading.Event()
        spool.add_sink(sink.name, from_now=from_now, apart=self._apart).result()

    @property
    def sink_name(self) -> str:
        """The name under which the spool keeps this sink's cursor."""
        return self._sink.name

    def dead_letters(self) -> tuple[int, int]:
        """How many this sink has, and what they take on the disk."""
        return self._letters.count()

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
        self._until_done(self._reconcile)
        seen = 0
        idle_work = True
        sharing = False
        while True:
            self._retry_letters()
            patience_s = self._patience_s() if sharing else 0.0
            delivery = self._until_done(partial(self._next, patience_s))
            sharing = False
            if delivery is not None:
                began = time.monotonic()
                # A full delivery, or one kept small, means that there is more: go on at once. Else the time
                # in which records gather is the sink's own.
                size = sum(len(batch.journal_bytes) for batch in delivery.batches)
                self._deliver(delivery, hurried=size >= DELIVERY_BYTES)
                idle_work = True
                if size < DELIVERY_BYTES and self._most is None:
                    self._tell_caught_up()
                    idle_work = self._idle()
                    self._stopping.wait(max(0.0, began + self._gather_s() - time.monotonic()))
                    sharing = True
            elif self._stopping.is_set():
                break
            elif idle_work:
                self._tell_caught_up()
                idle_work = self._idle()
            else:
                self._tell_caught_up()
                seen = self._spool.wait(seen, 0.5)

    def _tell_caught_up(self) -> None:
        if self._observer is not None:
            self._observer.caught_up()

    def _reconcile(self) -> None:
        """The sink's own word for what it has counts where the spool knows of less."""
        self._passed = None
        origin = self._origin()
        if isinstance(self._sink, Remembers):
            last = self._sink.last_accepted(origin)
            self._spool.reconcile_sink(self._sink.name, origin, last).result()
            self._tell_what_is_gone(origin, last)

    def _origin(self) -> str:
        return self._spool.add_sink(self._sink.name, apart=self._apart).result()

    def _look_again(self) -> None:
        """Who was away may have lost what it had. What it has beyond the cursor is what is delivered next."""
        if self._doubtful and isinstance(self._sink, Remembers):
            origin = self._origin()
            self._tell_what_is_gone(origin, self._sink.last_accepted(origin))
        self._doubtful = False

    def _tell_what_is_gone(self, origin: str, last: int) -> None:
        """A sink may have lost what it had accepted: its file is gone, an older copy of it came back, its log
        was cut off. The runs are told once, however often this is begun; never under the ids of what is
        missing: that may be at another agent yet, and come. Who has ended ends there too: where the sink
        still has the end, or gets it yet, that one counts."""
        aside = self._letters.numbers(origin)
        missing = self._spool.delivered_after(self._sink.name, last, aside).result()
        if self._wanted is not None:
            # Of samples nobody knows since when they were wanted.
            missing = [one for one in missing if self._wanted(one.info) and not one.info.sampled]
        if not missing:
            return
        until = max(one.last for one in missing)
        what = (
            f"sink {self._sink.name} does not have any more what it had accepted (batches {last + 1} to "
            f"{until})"
        )
        logger.error("%s; %d producers are concerned", what, len(missing))
        runs: dict[str, list[Delivered]] = {}
        for one in missing:
            runs.setdefault(one.info.run_id, []).append(one)
        for run_id, ones in runs.items():
            notice = _notice(_origin_of_notice(origin, last, until, run_id), what, ones)
            try:
                self._sink.deliver(notice)
            except Rejected as error:  # it is in the log, and the other runs are not to wait
                logger.error("the run %s cannot be told what is missing of it: %s", run_id, error)

    def _patience_s(self) -> float:
        return 0.0 if self._stopping.is_set() else min(SHARING_S, self._interval_s)

    def _gather_s(self) -> float:
        asked_s = self._sink.gather_s if isinstance(self._sink, Gathers) else 0.0
        return max(self._interval_s, asked_s)

    def _next(self, patience_s: float) -> Delivery | None:
        try:
            return self._spool.next_delivery(
                self._sink.name, DELIVERY_BYTES, self._most, patience_s=patience_s
            ).result()
        except UnknownSink:
            self._reconcile()
            raise

    def _idle(self) -> bool:
        try:
            return self._sink.idle(IDLE_WORK_S)
        except Exception:
            logger.exception("sink %s: its work between deliveries failed", self._sink.name)
            return False

    def _deliver(self, delivery: Delivery, *, hurried: bool) -> None:
        """Until the delivery is accepted, halved or set aside. hurried: the next one is to follow at once."""
        hurried = hurried or self._most is not None

        def attempt() -> None:
            self._retry_letters()
            self._look_again()
            self.state = "delivering"
            try:
                self._pass_on(delivery)
            except Rejected as error:
                if len(delivery.batches) > 1:
                    self._halve(delivery)
                else:
                    self._set_aside(delivery, str(error))
            else:
                patience_s = 0.0 if hurried else self._patience_s()
                self._spool.delivered(
                    self._sink.name, delivery.id.last, patience_s=patience_s
                ).result()
                self.accepted_ns = time.time_ns()
                if self._most is not None:
                    self._most = 2 * self._most if self._most < MANY_BATCHES else None

        self._until_done(attempt)

    def _pass_on(self, delivery: Delivery) -> None:
        if self._wanted is not None:
            wanted = [one for one in delivery.batches if self._wanted(one.producer)]
            if not wanted:
                self._pass_over(delivery.id.first)
                return
            delivery = replace(delivery, batches=wanted)
        batch = self._read(delivery, self._spool.keys)
        reduced = self._reduced(batch)
        self._sink.deliver(replace(reduced, id=self._widened(delivery.id)))
        if self._opens or says_something(reduced):
            self._passed = None
        else:
            self._pass_over(delivery.id.first)
        if self._observer is not None:
            self._observer.take(batch)

    def _pass_over(self, first: int) -> None:
        self._passed = first if self._passed is None else min(self._passed, first)

    def _widened(self, id_: BatchId) -> BatchId:
        """After a crash it is not known what was passed over: the range then lies in the one of before."""
        first = id_.first if self._passed is None else min(self._passed, id_.first)
        return replace(id_, first=first)

    def _read(self, delivery: Delivery, keys: Keys) -> Batch:
        batch = decode(delivery, keys)
        return opened(batch) if self._opens else batch

    def _reduced(self, batch: Batch) -> Batch:
        return batch if self._reducer is None else self._reducer.reduced(batch)

    def _halve(self, delivery: Delivery) -> None:
        """Of a delivery that the sink has rejected it has kept nothing: so its range may become another. That
        is written down before it is delivered, like every range."""
        self._most = len(delivery.batches) // 2
        last = delivery.batches[self._most - 1].number
        self._spool.shorten(self._sink.name, last).result()

    def _set_aside(self, delivery: Delivery, reason: str) -> None:
        """The one batch of the delivery becomes a dead letter, and its run is told."""
        (batch,) = delivery.batches
        self._most = 1
        self._passed = None
        letter = self._letters.keep(delivery.id.origin, batch, reason, self._schemas_of(batch))
        # What the agent itself says about a rejection may be rejected too; that is not told again.
        own_records = (
            []
            if batch.lane == AGENT_LANE
            else [(batch.producer.producer_id, notices.rejected(letter))]
        )
        self._spool.delivered(
            self._sink.name, delivery.id.last, rejected=True, own_records=own_records
        ).result()
        logger.error(
            "sink %s rejects batch %d for good: %s; it is kept as dead letter %s (see `trackagent "
            "dead-letters show %s`)",
            self._sink.name,
            batch.number,
            reason,
            letter.id,
            letter.id,
        )

    def _schemas_of(self, batch: SpooledBatch) -> dict[int, tuple[str, ...]]:
        """The keys of the schemas that the batch's metric records use."""
        data = batch.journal_bytes
        offsets = record.scan(data).offsets
        used = {
            int.from_bytes(data[offset + 10 : offset + 12], "little")
            for offset in offsets
            if data[offset + 8] == Kind.METRICS
        }
        keys = {number: self._spool.keys(batch.producer_number, number) for number in sorted(used)}
        return {number: found for number, found in keys.items() if found is not None}

    # --- dead letters that people want delivered again

    def _retry_letters(self) -> None:
        """Delivers those that are marked, under the id they had, once each."""
        if time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + RETRY_INTERVAL_S
        try:
            for letter in self._letters.marked():
                self._deliver_again(letter)
        except Exception as error:  # noqa: BLE001 - the letter stays marked, whatever it was
            logger.warning(
                "sink %s: dead letters to be delivered again have to wait: %s; trying again",
                self._sink.name,
                error,
            )
            self._retry_at = time.monotonic() + MAX_BACKOFF_S

    def _deliver_again(self, letter: DeadLetter) -> None:
        batch = self._reduced(self._read(letter.delivery(), letter.keys))
        message = f"dead letter {letter.id} was delivered to sink {self._sink.name} after all"
        told = EventData(letter.producer.producer_id, time.time_ns(), "info", message)
        try:
            # With its content, so that it is told once.
            self._sink.deliver(replace(batch, events=[*batch.events, told]))
        except Rejected as error:
            self._letters.rejected_again(letter, str(error))
            logger.error(
                "sink %s rejects dead letter %s again: %s", self._sink.name, letter.id, error
            )
        else:
            self._letters.remove(letter)
            logger.info("dead letter %s is delivered", letter.id)

    def _until_done(self, operation: Callable[[], T]) -> T:
        """What `operation` returns; as long as it raises, it is tried again, until the time is up. The log
        has each reason once in TELL_AGAIN_S, and when it is over."""
        backoff_s = FIRST_BACKOFF_S
        failures, began = 0, time.monotonic()
        told: set[str] = set()
        forget_at = began + TELL_AGAIN_S
        while self._deadline is None or time.monotonic() < self._deadline:
            try:
                result = operation()
            except Exception as error:  # noqa: BLE001 - kept, whatever it was: the sink's contract
                named = "" if isinstance(error, AgentError) else f"{type(error).__name__}: "
                self.state, self.error = "retrying", f"{named}{error}"
                self._doubtful |= isinstance(error, Away)
                failures += 1
                now = time.monotonic()
                if now >= forget_at:
                    told.clear()
                    forget_at = now + TELL_AGAIN_S
                if self.error not in told:
                    told.add(self.error)
                    so_far = f" ({failures} times in {now - began:.0f} s)" if failures > 1 else ""
                    logger.warning(
                        "sink %s: %s; trying again%s", self._sink.name, self.error, so_far
                    )
                self._pause(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, self._max_backoff_s)
            else:
                self.state, self.error = "idle", ""
                if failures:
                    count = f"{failures} failure{'s' if failures > 1 else ''}"
                    took_s = time.monotonic() - began
                    logger.info(
                        "sink %s goes on after %s in %.0f s", self._sink.name, count, took_s
                    )
                return result
        raise _TimeIsUp

    def _pause(self, seconds: float) -> None:
        """Waits; being told to stop ends it, and makes later ones short."""
        if self._deadline is None:
            self._stopping.wait(seconds)
        else:
            left = self._deadline - time.monotonic()
            time.sleep(max(0.0, min(seconds, left, MAX_BACKOFF_STOPPING_S)))


def _notice(origin: str, what: str, missing: Sequence[Delivered]) -> Batch:
    """Tells a run what is missing of it. Samples that are gone are counted; the runs hear of it by what they
    logged themselves."""
    now = time.time_ns()
    message = f"{what}: records of this run are missing, some or all of those until now"
    infos = [one.info for one in missing]
    told = [one for one in missing if not one.info.sampled]
    return Batch(
        BatchId(origin, 1, 1),
        infos,
        events=[EventData(one.info.producer_id, now, "error", message) for one in told],
        losses=[Loss(info.producer_id, GONE, 1, more=True) for info in infos],
        ends=[
            ProducerEnd(one.info.producer_id, now, "killed", _END_GONE, -1)
            for one in told
            if one.has_ended
        ],
    )


def _origin_of_notice(origin: str, last: int, until: int, run_id: str) -> str:
    """The same for the same loss of a run: 32 hexadecimal digits that are no spool's name."""
    named = f"trackagent gone {origin} {last} {until} {run_id}".encode()
    return hashlib.blake2b(named, digest_size=16).hexdigest()
