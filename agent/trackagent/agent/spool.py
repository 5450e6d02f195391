"""The spool: journal bytes as received, durable from the acknowledgement until every sink has them.

An SQLite database in WAL mode with synchronous=FULL. One thread writes; what arrives while a commit
is under way shares the next one (group commit), so one fsync serves all ranks. A lane's bytes are
kept once: a range that begins before what is committed is cut there or changes nothing.

Each sink has a cursor. Before a range of batches is handed to a sink, its end is written down as the sink's
plan; so after a crash the same range is formed again, with the same id.

Threads: everything but `close` may be called from any. Futures fail with SpoolError or with
sqlite3.Error, and then nothing of that call was kept.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from trackagent.agent import notices
from trackagent.agent.commits import GroupCommit
from trackagent.agent.schemas import schemas_in
from trackagent.agent.spoolfile import SpoolError, SpoolFile, is_damage
from trackagent.agent.spooltables import AGENT_LANE, FORWARDED_LANE, SinkState, Tables
from trackagent.agent.store.contract import BatchId, ProducerInfo, node_run_id

__all__ = [
    "AGENT_LANE",
    "Delivery",
    "Forgotten",
    "OutOfOrder",
    "Overlaps",
    "Spool",
    "SpoolError",
    "SpoolFull",
    "SpooledBatch",
    "TooManyHoles",
    "UnknownProducer",
    "UnknownSink",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEPT_PAGES = 2048
# Ended producers are remembered for this long, in case their bytes come again.
FORGET_AFTER_S = 7 * 86_400
# Agents that forward are remembered for so long after their last part; that is noted once a day.
NOTED_AFTER_S = 86_400
# What may be remembered of schemas, and what a key of one takes beside its text, about.
MAX_SCHEMAS_BYTES = 16 * 1024 * 1024
BYTES_PER_KEY = 64


class SpoolFull(SpoolError):
    """At its limit of bytes: the sender keeps the data and comes back."""


class TooManyHoles(SpoolFull):
    """More ranges of another agent's spool lie apart than are remembered: one that is missing must come
    first."""


class Forgotten(SpoolError):
    """It is no longer known what came of another agent's spool: ask who stores it, and come again."""


class UnknownProducer(SpoolError):
    """Bytes of a producer that was never opened."""


class OutOfOrder(SpoolError):
    """A batch that begins after what is committed of its lane."""


class Overlaps(SpoolError):
    """A part of another agent's spool of which something came before, and something did not."""


class UnknownSink(SpoolError):
    """A sink that was never added, or whose cursor is lost with a damaged file: add it again."""


@dataclass(frozen=True, slots=True)
class SpooledBatch:
    """A range of one lane as it was received."""

    number: int
    producer_number: int
    producer: ProducerInfo
    lane: int
    first_offset: int
    journal_bytes: bytes


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a sink gets next."""

    id: BatchId
    batches: Sequence[SpooledBatch]


@dataclass(frozen=True, slots=True)
class Delivered:
    """Who has logged, the last of its batches that a sink counts as having, and whether it has ended."""

    info: ProducerInfo
    last: int
    has_ended: bool


class Spool:
    """The spool in the database file `path`, which is made if it is missing. SpoolError when it
    cannot be opened. A damaged file is set aside under `quarantine/` beside it, and a new one begun with
    what can be read of it; also when damage is met later.

    max_bytes: journal bytes held for sinks that are behind. linger_s: how long what arrives may wait to share
    a commit. connect: a seam for faults; clock: as time.time_ns.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        linger_s: float = 0.02,
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._linger_s = linger_s
        self._file = SpoolFile(path, connect)
        self._use(self._file.open())
        # Whether each has an origin of its own.
        self._sinks: dict[str, bool] = {}
        self._received_bytes = 0
        # Since the last commit; also where that was rolled back, which wakes somebody in vain.
        self._arrived = False
        self._infos: dict[int, ProducerInfo] = {}
        self._schemas: dict[tuple[int, int], tuple[str, ...]] = {}
        self._schemas_bytes = 0
        self._changed = threading.Condition()
        self._wakes = 0
        self._comings = 0
        self._forgettings = 0
        self._commits = GroupCommit(
            self._writer,
            is_damage=is_damage,
            mend=self._mend,
            committed=self._note_commit,
            rolled_back=self._forget,
        )

    def _use(self, connection: sqlite3.Connection) -> None:
        self._writer = connection
        self._tables = Tables(connection)
        # Greater than the number of each batch that was there when the file was opened.
        self._first_since = self._tables.next_number()

    def _mend(self, error: Exception) -> sqlite3.Connection:
        """On the writing thread: a connection to what could be saved of the damaged file."""
        self._file.close(self._writer)
        try:
            self._use(self._file.replace(str(error)))
        except OSError as problem:
            raise SpoolError(
                f"the spool is damaged ({error}) and cannot be replaced: {problem}"
            ) from problem
        self._forget_producers()
        self._forgettings += 1
        self.wake()
        return self._writer

    def _forget_producers(self) -> None:
        """Their numbers may go to others."""
        self._infos.clear()
        self._schemas.clear()
        self._schemas_bytes = 0
        self._comings += 1

    # --- what senders do

    def open_producer(
        self, info: ProducerInfo, held: Mapping[int, int], schemas: Sequence[bytes] = ()
    ) -> Future[dict[int, int]]:
        """Makes a producer known; the result says up to which offset each of its lanes is committed.

        held: by lane, the oldest offset its journal still has; where that is more, the spool goes on from
        there. What lies before was acknowledged and is not here, and whether it was delivered is not known:
        it says so in the run. schemas: records among which are the SCHEMA records of what comes.
        """
        known = [schema for data in schemas for schema in schemas_in(data)]

        def job() -> tuple[dict[int, int], int]:
            tables = self._tables
            number = tables.number(info.producer_id)
            missing = b""
            if number is None:
                number = tables.add_producer(info)
                self._comings += 1
                missing = notices.taken_elsewhere(held)
                for lane, offset in held.items():
                    tables.set_lane(number, lane, offset, 0)
            for lane, offset in held.items():
                committed, last = tables.lane(number, lane)
                if offset > committed:
                    tables.set_lane(number, lane, offset, last)
                    missing += notices.lost_bytes(lane, committed, offset, _ELSEWHERE)
            if missing:
                tables.append(number, AGENT_LANE, missing)
            for schema_id, keys in known:
                tables.add_schema(number, schema_id, keys)
            return tables.lanes(number), len(missing)

        return self._spooling(job, size=0)

    def append(
        self,
        producer_id: bytes,
        lane: int,
        first_offset: int,
        journal_bytes: bytes,
        *,
        patient: bool = False,
    ) -> Future[int]:
        """Commits whole records of a lane; the result is the offset up to which the lane is then committed.
        patient: it may wait for others to share its commit.

        Fails with SpoolFull, UnknownProducer or OutOfOrder.
        """
        schemas = schemas_in(journal_bytes)
        return self._spooling(
            lambda: self._append(producer_id, lane, first_offset, journal_bytes, schemas),
            size=len(journal_bytes),
            patience_s=self._linger_s if patient else 0.0,
        )

    def append_own(self, producer_id: bytes, encoded: bytes) -> Future[int]:
        """Commits a record of the agent's own about a producer, after those of before."""
        schemas = schemas_in(encoded)
        return self._spooling(
            lambda: self._append(producer_id, AGENT_LANE, None, encoded, schemas),
            size=len(encoded),
        )

    def append_next(self, producer_id: bytes, encoded: bytes) -> Future[int]:
        """Commits whole records after those of before, as a lane of the producer; they may wait for others to
        share their commit. For what the agent itself samples: who brings a producer's bytes from elsewhere
        says where they begin."""
        schemas = schemas_in(encoded)
        return self._spooling(
            lambda: self._append(producer_id, 0, None, encoded, schemas),
            size=len(encoded),
            patience_s=self._linger_s,
        )

    def end_producer(self, producer_id: bytes, final_records: bytes = b"") -> Future[None]:
        """The producer has ended and everything of it is committed. `final_records`: of the agent's own,
        that go with it. Does nothing when it has ended before."""

        def job() -> tuple[None, int]:
            ended = self._tables.end_producer(producer_id, self._clock())
            self._comings += ended
            if not ended or not final_records:
                return None, 0
            return None, self._append(producer_id, AGENT_LANE, None, final_records, [])[1]

        return self._spooling(job, size=len(final_records))

    def _spooling(
        self,
        job: Callable[[], tuple[T, int]],
        *,
        size: int,
        patience_s: float = 0.0,
    ) -> Future[T]:
        """Submits a job that also returns how many bytes it has added to the batches."""
        added = 0

        def work() -> T:
            nonlocal added
            result, added = job()
            self._arrived |= added > 0
            return result

        def committed(future: Future[T]) -> None:
            if added and not future.cancelled() and future.exception() is None:
                self._received_bytes += added

        future = self._commits.submit(work, size=size, patience_s=patience_s)
        future.add_done_callback(committed)
        return future

    # --- what other agents do

    @property
    def forgettings(self) -> int:
        """Another number when the spool has forgotten since what came of some other agent's."""
        return self._forgettings

    def accept(
        self, id_: BatchId, part: bytes, node: str, *, forgettings: int | None = None
    ) -> Future[None]:
        """Commits what the agent of a node forwards: a Part (hub.proto) with this id, whose origin is 32
        hexadecimal digits. Changes nothing when its range came before. forgettings: as they were when the
        caller made sure of what had.

        Fails with SpoolFull, TooManyHoles, Overlaps or Forgotten."""

        def job() -> tuple[None, int]:
            if forgettings not in (None, self._forgettings):
                raise Forgotten("it has to be asked again what came before this part: come back")
            if self._came(id_):
                return None, 0
            self._check_room(len(part))
            tables = self._tables
            tables.append(self._forwarder(id_.origin, node), FORWARDED_LANE, part)
            tables.add_arrived(id_.origin, id_.first, id_.last)
            return None, len(part)

        return self._spooling(job, size=len(part), patience_s=self._linger_s)

    def arrived(self, origin: str) -> Future[list[tuple[int, int]]]:
        """Which ranges (first, last) of another agent's spool came, ascending, as far as is known."""
        return self._commits.submit(lambda: self._tables.arrived(origin))

    def note_arrived(self, origin: str, ranges: Sequence[tuple[int, int]]) -> Future[None]:
        """These came too: the store has them, from a spool of before."""

        def job() -> None:
            for first, last in ranges:
                self._tables.add_arrived(origin, first, last)

        return self._commits.submit(job)

    def forget_ended(self, kept: Sequence[bytes]) -> Future[None]:
        """Forgets producers that ended long ago, and agents that forwarded, except `kept`, and those whose
        batches are still needed."""

        def job() -> None:
            ended_ns = self._clock() - FORGET_AFTER_S * 10**9
            for number, producer_id in self._tables.long_ended(ended_ns):
                if producer_id not in kept:
                    self._tables.forget_producer(number)
                    self._forgettings += self._tables.forget_arrived(producer_id.hex())
            self._forget_producers()

        return self._commits.submit(job)

    def committed(self, producer_id: bytes) -> Future[dict[int, int]]:
        """By lane, the offset up to which a producer's bytes are committed."""

        def job() -> dict[int, int]:
            number = self._tables.number(producer_id)
            return {} if number is None else self._tables.lanes(number)

        return self._commits.submit(job)

    # --- what sinks do

    def add_sink(self, name: str, *, from_now: bool = False, apart: bool = False) -> Future[str]:
        """A sink that starts with the oldest batch there is, or, from_now, with the next one; changes nothing
        if it is known. The result is the origin under which it gets its batches: the spool's, or, apart, one
        that no other sink has. From here on nothing is deleted that it has yet to get, also while its cursor
        is lost with a damaged file."""

        def job() -> str:
            tables = self._tables
            self._sinks[name] = apart
            sink = tables.sink(name)
            if sink is None:
                begin = tables.next_number() if from_now else tables.ends()[0]
                sink = SinkState(self._origin_for(name, tables.origin()), begin - 1)
                tables.put_sink(name, sink)
            return sink.origin

        return self._commits.submit(job)

    def remove_sink(self, name: str) -> Future[None]:
        """Nothing is kept for this sink any more. Idempotent."""

        def job() -> None:
            self._sinks.pop(name, None)
            self._tables.remove_sink(name)
            self._delete_delivered()

        return self._commits.submit(job)

    def take_another_way(self, sink: str) -> Future[None]:
        """What counts as delivered to this sink went elsewhere: `delivered_after` leaves it out."""

        def job() -> None:
            tables = self._tables
            until = max(tables.renamed(), self._sink(sink).cursor)
            tables.set_identity(tables.origin(), tables.next_number(), tables.lost(), until)

        return self._commits.submit(job)

    def awaited(self, sink: str) -> Future[list[ProducerInfo]]:
        """Whose batches a sink has yet to get, or to pass over. Fails with UnknownSink."""

        def job() -> list[ProducerInfo]:
            found = self._tables.logged_after(self._sink(sink).cursor)
            return [self._info(number) for number in found]

        return self._commits.submit(job)

    def sinks(self) -> Future[list[str]]:
        """The names of those that are known."""
        return self._commits.submit(lambda: list(self._tables.sinks()))

    def reconcile_sink(self, name: str, origin: str, last: int) -> Future[None]:
        """The sink says that it has the batches of `origin` up to `last`; the spool may know of less after
        damage.

        Where there had never been that many when it was opened, this file is an older copy of itself. The
        numbers that follow were given to other batches, so it goes on under another origin.
        """

        def job() -> None:
            tables = self._tables
            sink = self._sink(name)
            if sink.origin != origin or sink.cursor >= last:
                return
            if last < self._first_since:
                tables.move_cursor(name, last, rejected=False)
            else:
                fresh = uuid4().hex
                cursor = max(sink.cursor, self._first_since - 1)
                tables.set_identity(fresh, last + 1, tables.lost(), cursor)
                renamed = SinkState(self._origin_for(name, fresh), cursor, None, sink.rejected)
                tables.put_sink(name, renamed)
                logger.warning(
                    "the spool is an older copy of itself: sink %s has batch %d, the last one here was %d; "
                    "what ranks had delivered in between is named in their runs",
                    name,
                    last,
                    self._first_since - 1,
                )
            self._delete_delivered()

        return self._commits.submit(job)

    def delivered_after(
        self, sink: str, number: int, aside: Sequence[int]
    ) -> Future[list[Delivered]]:
        """Of whom the last batch that counts as delivered to a sink comes after `number`, and is none of
        `aside`."""

        def job() -> list[Delivered]:
            tables = self._tables
            cursor = self._sink(sink).cursor
            after = max(number, tables.renamed())
            found: dict[int, int] = {}
            for producer, last in tables.last_delivered(after, cursor) if cursor > after else ():
                if last not in aside:
                    found[producer] = max(last, found.get(producer, 0))
            return [
                Delivered(self._info(producer), last, tables.has_ended(producer))
                for producer, last in found.items()
            ]

        return self._commits.submit(job)

    def next_delivery(
        self, sink: str, max_bytes: int, max_batches: int | None = None, *, patience_s: float = 0.0
    ) -> Future[Delivery | None]:
        """The next range for a sink, about `max_bytes` long and of at most `max_batches`, None when it has
        everything. The same range until `delivered` or `shorten` is called, also after a crash. Fails with
        UnknownSink. patience_s: how long it may wait for what arrives, and share its commit."""

        def job() -> Delivery | None:
            state = self._sink(sink)
            planned = state.planned
            batches: list[SpooledBatch] = []
            size = 0
            for number, producer, lane, offset, data in self._tables.batches(state.cursor):
                full = size >= max_bytes or len(batches) == max_batches
                if number > planned if planned is not None else full:
                    break
                info = self._info(producer)
                batches.append(SpooledBatch(number, producer, info, lane, offset, data))
                size += len(data)
            if planned is None:
                if not batches:
                    return None
                planned = batches[-1].number
                self._tables.plan(sink, planned)
            return Delivery(BatchId(state.origin, state.cursor + 1, planned), batches)

        return self._commits.submit(job, patience_s=patience_s, last=True)

    def shorten(self, sink: str, last: int) -> Future[None]:
        """The sink's range ends at batch `last` instead, and is another one. Only where the sink has rejected
        the range: then it has nothing of it."""
        return self._commits.submit(lambda: self._tables.plan(sink, last))

    def delivered(
        self,
        sink: str,
        last: int,
        *,
        rejected: bool = False,
        own_records: Sequence[tuple[bytes, bytes]] = (),
        patience_s: float = 0.0,
    ) -> Future[None]:
        """The sink is done with its range up to batch `last`; what all sinks are done with is deleted.
        own_records: of the agent's own about producers, by their id, that go with it. patience_s: how long
        it may wait for others to share its commit. Idempotent."""

        def job() -> None:
            if not self._tables.move_cursor(sink, last, rejected=rejected):
                return  # said before
            for producer_id, encoded in own_records:
                # A full spool must not keep a batch from leaving it.
                self._append(producer_id, AGENT_LANE, None, encoded, [], capped=False)
            self._delete_delivered()
            self._give_pages()

        return self._commits.submit(job, patience_s=patience_s)

    def wait(self, seen: int, timeout_s: float) -> int:
        """Waits until something was appended after `seen` (what an earlier call returned; 0 at
        first) or somebody was woken, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._wakes != seen, timeout_s)
            return self._wakes

    def wake(self) -> None:
        """Ends every `wait`."""
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    def keys(self, producer_number: int, schema_id: int) -> tuple[str, ...] | None:
        """The keys of a producer's schema, None when its record never came."""

        def job() -> tuple[str, ...] | None:
            keys = self._tables.keys(producer_number, schema_id)
            return None if keys is None else tuple(keys.split("\n"))

        known = self._schemas.get((producer_number, schema_id))
        if known is None:
            known = self._commits.submit(job).result()
            if known is not None:
                self._schemas_bytes += sum(map(len, known)) + BYTES_PER_KEY * len(known)
                if self._schemas_bytes > MAX_SCHEMAS_BYTES:
                    self._schemas.clear()
                    self._schemas_bytes = 0
                self._schemas[producer_number, schema_id] = known
        return known

    def schemas_of(self, producer_id: bytes) -> Future[dict[int, tuple[str, ...]]]:
        """The keys of each schema id that a producer has used."""

        def job() -> dict[int, tuple[str, ...]]:
            number = self._tables.number(producer_id)
            known = {} if number is None else self._tables.schemas(number)
            return {schema_id: tuple(keys.split("\n")) for schema_id, keys in known.items()}

        return self._commits.submit(job)

    def origin(self) -> Future[str]:
        """The spool's own name."""

        def job() -> str:
            return self._tables.origin()

        return self._commits.submit(job)

    @property
    def comings(self) -> int:
        """Another number when a producer has come or ended since: then `not_ended` says something else."""
        return self._comings

    def not_ended(self) -> Future[list[ProducerInfo]]:
        """The producers that have not ended."""

        def job() -> list[ProducerInfo]:
            return [self._info(number) for number, _ in self._tables.not_ended()]

        return self._commits.submit(job)

    # --- for people

    def statistics(self) -> Future[dict[str, Any]]:
        """batches, bytes, received_bytes, lost_batches (with damaged files, of runs that are not known);
        sinks: [{name, batches_behind, rejected}]; producers: [{info, committed_bytes}] of those that have not
        ended."""

        def job() -> dict[str, Any]:
            tables = self._tables
            batches, held = tables.waiting(0)
            return {
                "batches": batches,
                "bytes": held,
                "received_bytes": self._received_bytes,
                "lost_batches": tables.lost(),
                "sinks": [
                    {
                        "name": name,
                        "batches_behind": tables.waiting(sink.cursor)[0],
                        "rejected": sink.rejected,
                    }
                    for name, sink in tables.sinks().items()
                ],
                "producers": [
                    {"info": self._info(number), "committed_bytes": size}
                    for number, size in tables.not_ended()
                ],
            }

        return self._commits.submit(job)

    def producers(self) -> Future[list[ProducerInfo]]:
        """All that are remembered, those that have ended too."""

        def job() -> list[ProducerInfo]:
            return self._tables.infos()

        return self._commits.submit(job)

    def close(self) -> None:
        """Finishes what was submitted and closes the file."""
        self._commits.close()
        self._file.close(self._writer)

    # --- on the writing thread

    def _append(
        self,
        producer_id: bytes,
        lane: int,
        first_offset: int | None,
        journal_bytes: bytes,
        schemas: Sequence[tuple[int, str]],
        *,
        capped: bool = True,
    ) -> tuple[int, int]:
        """Keeps what is new of a range; returns where the lane ends then, and how many bytes were new.
        `first_offset` None: the range follows what is committed.
        """
        tables = self._tables
        number = tables.number(producer_id)
        if number is None:
            raise UnknownProducer("this producer was not opened at this agent: call OpenRun first")
        committed, _ = tables.lane(number, lane)
        if first_offset is None:
            first_offset = committed
        end = first_offset + len(journal_bytes)
        if first_offset > committed:
            raise OutOfOrder(
                f"lane {lane} goes on at {committed}, the batch begins at {first_offset}: call OpenRun"
            )
        if end <= committed:
            return committed, 0
        fresh = journal_bytes[committed - first_offset :]
        if capped:
            self._check_room(len(fresh))
        tables.append(number, lane, fresh)
        for schema_id, keys in schemas:
            tables.add_schema(number, schema_id, keys)
        return end, len(fresh)

    def _check_room(self, size: int) -> None:
        """SpoolFull where so much more is too much."""
        held = self._tables.held()
        if held + size > self._max_bytes:
            raise SpoolFull(
                f"the spool holds {held} bytes, its limit is {self._max_bytes}: a sink is behind"
            )

    def _came(self, id_: BatchId) -> bool:
        """Whether a part came. What is missing may always come, so none that would be too many to remember
        is taken instead of taking one for another."""
        tables = self._tables
        first, last = tables.arrived_before(id_.origin, id_.last + 2) or (0, 0)
        if first <= id_.first and id_.last <= last:
            return True
        if first == id_.last + 1:  # it comes right before that one
            first, last = tables.arrived_before(id_.origin, id_.last + 1) or (0, 0)
        elif last < id_.first - 1 and tables.is_crowded(id_.origin):
            raise TooManyHoles(
                f"of {id_.origin} so many parts are missing between those that came that {id_.first} to "
                f"{id_.last} cannot be told apart from them: have that agent's dead letters delivered again"
            )
        if id_.first <= last:
            raise Overlaps(
                f"{id_.first} to {id_.last} of {id_.origin} overlaps {first} to {last}, which came"
            )
        return False

    def _forwarder(self, origin: str, node: str) -> int:
        """The producer that stands for what is forwarded of another agent's spool. It logs nothing itself,
        and is as good as ended with each part: it is remembered for a while after the last one."""
        producer_id = bytes.fromhex(origin)
        number = self._tables.number(producer_id)
        if number is None:
            run_id = node_run_id(node)
            info = ProducerInfo(
                producer_id, run_id, 1, 0, 0, 1, node, 0, 0, "nodes", "", False, 0, f"node {node}"
            )
            number = self._tables.add_producer(info)
            self._tables.end_producer(producer_id, self._clock())
        else:
            now = self._clock()
            self._tables.put_end_off(number, now, before_ns=now - NOTED_AFTER_S * 10**9)
        return number

    def _give_pages(self) -> None:
        """Gives the disk what a backlog took, a bit at a time; some pages stay for the next batches."""
        execute = self._writer.execute
        if execute("PRAGMA freelist_count").fetchone()[0] > KEPT_PAGES:
            for _ in range(KEPT_PAGES // 4):
                execute("PRAGMA incremental_vacuum(1)")  # Python's sqlite3 stops after one page

    def _delete_delivered(self) -> None:
        if self._sinks.keys() <= self._tables.sinks().keys():
            self._tables.delete_delivered()

    def _note_commit(self) -> None:
        self._file.note_commit()
        if self._arrived:
            self._arrived = False
            self.wake()

    def _forget(self) -> None:
        """Something was rolled back: a number that was looked up may go to another producer."""
        self._tables.forget()
        self._infos.clear()

    def _origin_for(self, sink: str, origin: str) -> str:
        """Where a spool of this name begins the ids of what a sink gets: 32 hexadecimal digits."""
        if not self._sinks.get(sink):
            return origin
        named = f"trackagent sink {origin} {sink}".encode()
        return hashlib.blake2b(named, digest_size=16).hexdigest()

    def _sink(self, name: str) -> SinkState:
        sink = self._tables.sink(name)
        if sink is None:
            raise UnknownSink(f"the spool knows no sink {name}")
        return sink

    def _info(self, number: int) -> ProducerInfo:
        if number not in self._infos:
            if len(self._infos) > 100_000:
                self._infos.clear()
            self._infos[number] = self._tables.info(number)
        return self._infos[number]


_ELSEWHERE = "acknowledged, but not in this spool: it was damaged, or another agent took them"
