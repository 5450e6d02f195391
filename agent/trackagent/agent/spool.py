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

import contextlib
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from trackagent.agent.commits import GroupCommit
from trackagent.agent.errors import AgentError
from trackagent.agent.quarantine import set_aside
from trackagent.agent.store.contract import BatchId, ProducerInfo
from trackagent.client import record

T = TypeVar("T")

# The lane of what the agent itself has to say about a producer; a journal's lanes are below 64.
AGENT_LANE = 255
VERSION = 1
KEPT_PAGES = 2048
# Ended producers are remembered for this long, in case their bytes come again.
FORGET_AFTER_S = 7 * 86_400

_SCHEMA = f"""
BEGIN;
CREATE TABLE spool (origin TEXT NOT NULL);
CREATE TABLE producers (
    number INTEGER PRIMARY KEY, producer_id BLOB NOT NULL UNIQUE, info TEXT NOT NULL, ended_ns INTEGER
);
CREATE TABLE lanes (
    producer INTEGER NOT NULL, lane INTEGER NOT NULL, committed INTEGER NOT NULL,
    PRIMARY KEY (producer, lane)
) WITHOUT ROWID;
CREATE TABLE schemas (
    producer INTEGER NOT NULL, schema_id INTEGER NOT NULL, keys TEXT NOT NULL,
    PRIMARY KEY (producer, schema_id)
) WITHOUT ROWID;
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, producer INTEGER NOT NULL, lane INTEGER NOT NULL,
    first_offset INTEGER NOT NULL, bytes BLOB NOT NULL
);
CREATE TABLE sinks (
    name TEXT PRIMARY KEY, cursor INTEGER NOT NULL, planned INTEGER, rejected INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
INSERT INTO spool VALUES ('{{origin}}');
PRAGMA user_version = {VERSION};
COMMIT;
"""


class SpoolError(AgentError):
    """The spool cannot take or give what was asked; the message says why."""


class SpoolFull(SpoolError):
    """At its limit of bytes: the sender keeps the data and comes back."""


class UnknownProducer(SpoolError):
    """Bytes of a producer that was never opened."""


class OutOfOrder(SpoolError):
    """A batch that begins after what is committed of its lane."""


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


class Spool:
    """The spool in the database file `path`, which is made if it is missing. SpoolError when it
    cannot be opened. A damaged file is set aside under `quarantine/` beside it, and a new one begun.

    max_bytes: journal bytes held for sinks that are behind. linger_s: how long what arrives may wait to share
    a commit. connect: a seam for faults.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        linger_s: float = 0.02,
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._connect = connect
        self.origin = ""
        self._bytes: int | None = None
        self._writer = self._open()
        self._received_bytes = 0
        self._infos: dict[int, ProducerInfo] = {}
        self._schemas: dict[tuple[int, int], tuple[str, ...]] = {}
        self._changed = threading.Condition()
        self._wakes = 0
        self._commits = GroupCommit(self._writer, linger_s=linger_s)

    def _open(self) -> sqlite3.Connection:
        try:
            try:
                return self._opened()
            except sqlite3.DatabaseError as error:
                # Its subclasses say other things: a full disk, a failing one, a newer program's file.
                if type(error) is not sqlite3.DatabaseError:
                    raise
                self._set_aside(str(error))
                return self._opened()
        except (sqlite3.Error, OSError) as error:
            raise SpoolError(f"cannot open the spool {self._path}: {error}") from error

    def _opened(self) -> sqlite3.Connection:
        self._path.touch(mode=0o600)
        connection = self._connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise SpoolError(
                f"the spool {self._path} has version {version}, this program knows {VERSION}: "
                "start the newer trackagent that wrote it"
            )
        if version == 0:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA.format(origin=uuid4().hex))
        elif (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        connection.execute("PRAGMA synchronous = FULL")
        self.origin = str(connection.execute("SELECT origin FROM spool").fetchone()[0])

    def _set_aside(self, reason: str) -> None:
        name = f"{time.time_ns()}-{self._path.name}"
        quarantine = self._path.parent / "quarantine"
        quarantine.mkdir(mode=0o700, exist_ok=True)
        # The log belongs to the file and goes with it, first: replayed into a new one it would damage that.
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                shutil.move(f"{self._path}{suffix}", quarantine / f"{name}{suffix}")
        set_aside(self._path, quarantine, name, reason)

    # --- what senders do

    def open_producer(
        self, info: ProducerInfo, held: Mapping[int, int], schemas: Sequence[bytes] = ()
    ) -> Future[dict[int, int]]:
        """Makes a producer known; the result says up to which offset each of its lanes is committed.

        held: by lane, the oldest offset its journal still has; where that is more, the spool goes on from
        there. schemas: records among which are the SCHEMA records of what comes.
        """
        known = [schema for data in schemas for schema in _schemas_in(data)]

        def job() -> dict[int, int]:
            execute = self._writer.execute
            number = self._number(info.producer_id)
            if number is None:
                number = execute(
                    "INSERT INTO producers (producer_id, info) VALUES (?, ?)",
                    (info.producer_id, _to_json(info)),
                ).lastrowid
            for lane, offset in held.items():
                execute(
                    "INSERT INTO lanes VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
                    "SET committed = MAX(committed, excluded.committed)",
                    (number, lane, offset),
                )
            for schema_id, keys in known:
                execute("INSERT OR IGNORE INTO schemas VALUES (?, ?, ?)", (number, schema_id, keys))
            rows = execute("SELECT lane, committed FROM lanes WHERE producer = ?", (number,))
            return dict(rows.fetchall())

        # Undone, the number goes to the next producer.
        return self._commits.submit(job, undo=self._infos.clear)

    def append(
        self, producer_id: bytes, lane: int, first_offset: int, journal_bytes: bytes
    ) -> Future[int]:
        """Commits whole records of a lane; the result is the offset up to which the lane is then committed.

        Fails with SpoolFull, UnknownProducer or OutOfOrder.
        """
        schemas = _schemas_in(journal_bytes)
        return self._spooling(
            lambda: self._append(producer_id, lane, first_offset, journal_bytes, schemas),
            size=len(journal_bytes),
        )

    def append_own(self, producer_id: bytes, encoded: bytes) -> Future[int]:
        """Commits a record of the agent's own about a producer, after those of before."""
        schemas = _schemas_in(encoded)
        return self._spooling(
            lambda: self._append(producer_id, AGENT_LANE, None, encoded, schemas), size=len(encoded)
        )

    def end_producer(self, producer_id: bytes, last_word: bytes = b"") -> Future[None]:
        """The producer has ended and everything of it is committed. `last_word`: a record of the agent's own
        that goes with it. Does nothing when it has ended before."""

        def job() -> tuple[None, int]:
            ended = self._writer.execute(
                "UPDATE producers SET ended_ns = ? WHERE producer_id = ? AND ended_ns IS NULL",
                (time.time_ns(), producer_id),
            ).rowcount
            if not ended or not last_word:
                return None, 0
            return None, self._append(producer_id, AGENT_LANE, None, last_word, [])[1]

        return self._spooling(job, size=len(last_word))

    def _spooling(self, job: Callable[[], tuple[T, int]], *, size: int) -> Future[T]:
        """Submits a job that also returns how many bytes it has added to the batches."""
        added = 0

        def work() -> T:
            nonlocal added
            result, added = job()
            return result

        def committed(future: Future[T]) -> None:
            if added and not future.cancelled() and future.exception() is None:
                self._received_bytes += added
                self.wake()

        # Nobody waits for an acknowledgement: the journal holds the data as long.
        future = self._commits.submit(work, undo=self._recount, size=size, patient=True)
        future.add_done_callback(committed)
        return future

    def forget_ended(self, kept: Sequence[bytes]) -> Future[None]:
        """Forgets producers that ended long ago, except `kept`, and those whose batches are still needed."""

        def job() -> None:
            execute = self._writer.execute
            rows = execute(
                "SELECT number, producer_id FROM producers "
                "WHERE ended_ns < ? AND number NOT IN (SELECT producer FROM batches)",
                (time.time_ns() - FORGET_AFTER_S * 10**9,),
            ).fetchall()
            for number, producer_id in rows:
                if producer_id not in kept:
                    execute("DELETE FROM lanes WHERE producer = ?", (number,))
                    execute("DELETE FROM schemas WHERE producer = ?", (number,))
                    execute("DELETE FROM producers WHERE number = ?", (number,))

        return self._commits.submit(job)

    def committed(self, producer_id: bytes) -> Future[dict[int, int]]:
        """By lane, the offset up to which a producer's bytes are committed."""

        def job() -> dict[int, int]:
            rows = self._writer.execute(
                "SELECT lane, committed FROM lanes JOIN producers ON number = producer WHERE producer_id = ?",
                (producer_id,),
            )
            return dict(rows.fetchall())

        return self._commits.submit(job)

    # --- what sinks do

    def add_sink(self, name: str) -> Future[None]:
        """A sink that starts with the oldest batch there is; does nothing if it is known."""

        def job() -> None:
            self._writer.execute(
                "INSERT OR IGNORE INTO sinks (name, cursor) "
                "VALUES (?, (SELECT COALESCE(MIN(number) - 1, (SELECT COALESCE(MAX(seq), 0) "
                "FROM sqlite_sequence WHERE name = 'batches')) FROM batches))",
                (name,),
            )

        return self._commits.submit(job)

    def next_delivery(
        self, sink: str, max_bytes: int, max_batches: int | None = None
    ) -> Future[Delivery | None]:
        """The next range for a sink, about `max_bytes` long and of at most `max_batches`, None when it has
        everything. The same range until `delivered` or `shorten` is called, also after a crash."""

        def job() -> Delivery | None:
            execute = self._writer.execute
            cursor, planned = execute(
                "SELECT cursor, planned FROM sinks WHERE name = ?", (sink,)
            ).fetchone()
            rows: list[tuple[int, int, int, int, bytes]] = []
            size = 0
            for row in execute(
                "SELECT number, producer, lane, first_offset, bytes FROM batches "
                "WHERE number > ? ORDER BY number",
                (cursor,),
            ):
                full = size >= max_bytes or len(rows) == max_batches
                if row[0] > planned if planned is not None else full:
                    break
                rows.append(row)
                size += len(row[4])
            if planned is None:
                if not rows:
                    return None
                planned = rows[-1][0]
                execute("UPDATE sinks SET planned = ? WHERE name = ?", (planned, sink))
            batches = [
                SpooledBatch(number, producer, self._info(producer), lane, offset, data)
                for number, producer, lane, offset, data in rows
            ]
            return Delivery(BatchId(self.origin, cursor + 1, planned), batches)

        return self._commits.submit(job)

    def shorten(self, sink: str, last: int) -> Future[None]:
        """The sink's range ends at batch `last` instead, and is another one. Only where the sink has rejected
        the range: then it has nothing of it."""

        def job() -> None:
            self._writer.execute("UPDATE sinks SET planned = ? WHERE name = ?", (last, sink))

        return self._commits.submit(job)

    def delivered(
        self,
        sink: str,
        last: int,
        *,
        rejected: bool = False,
        words: Sequence[tuple[bytes, bytes]] = (),
    ) -> Future[None]:
        """The sink is done with its range up to batch `last`; what all sinks are done with is deleted. words:
        records of the agent's own about producers, by their id, that go with it. Idempotent."""

        def job() -> None:
            execute = self._writer.execute
            moved = execute(
                "UPDATE sinks SET cursor = ?, planned = NULL, rejected = rejected + ? "
                "WHERE name = ? AND cursor < ?",
                (last, rejected, sink, last),
            ).rowcount
            if not moved:
                return  # said before
            for producer_id, encoded in words:
                # A full spool must not keep a batch from leaving it.
                self._append(producer_id, AGENT_LANE, None, encoded, [], capped=False)
            held = self._held()
            done = execute("SELECT MIN(cursor) FROM sinks").fetchone()[0]
            freed = execute(
                "SELECT COALESCE(SUM(LENGTH(bytes)), 0) FROM batches WHERE number <= ?", (done,)
            ).fetchone()[0]
            execute("DELETE FROM batches WHERE number <= ?", (done,))
            # Gives the disk what a backlog took, a bit at a time; some pages stay for the next batches.
            if execute("PRAGMA freelist_count").fetchone()[0] > KEPT_PAGES:
                for _ in range(KEPT_PAGES // 4):
                    execute("PRAGMA incremental_vacuum(1)")  # Python's sqlite3 stops after one page
            self._bytes = held - int(freed)

        return self._commits.submit(job, undo=self._recount)

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
            row = self._writer.execute(
                "SELECT keys FROM schemas WHERE producer = ? AND schema_id = ?",
                (producer_number, schema_id),
            ).fetchone()
            return tuple(str(row[0]).split("\n")) if row else None

        known = self._schemas.get((producer_number, schema_id))
        if known is None:
            known = self._commits.submit(job).result()
            if known is not None:
                if len(self._schemas) > 100_000:
                    self._schemas.clear()
                self._schemas[producer_number, schema_id] = known
        return known

    # --- for people

    def statistics(self) -> Future[dict[str, Any]]:
        """batches, bytes, received_bytes; sinks: [{name, batches_behind, rejected}]; producers:
        [{info, committed_bytes}] of those that have not ended."""

        def job() -> dict[str, Any]:
            execute = self._writer.execute
            return {
                "batches": execute("SELECT COUNT(*) FROM batches").fetchone()[0],
                "bytes": self._held(),
                "received_bytes": self._received_bytes,
                "sinks": [
                    {"name": name, "batches_behind": behind, "rejected": rejected}
                    for name, behind, rejected in execute(
                        "SELECT name, (SELECT COUNT(*) FROM batches WHERE number > cursor), rejected "
                        "FROM sinks ORDER BY name"
                    ).fetchall()
                ],
                "producers": [
                    {"info": self._info(number), "committed_bytes": size}
                    for number, size in execute(
                        "SELECT number, (SELECT COALESCE(SUM(committed), 0) FROM lanes "
                        "WHERE producer = number) FROM producers WHERE ended_ns IS NULL "
                        "ORDER BY number"
                    ).fetchall()
                ],
            }

        return self._commits.submit(job)

    def close(self) -> None:
        """Finishes what was submitted and closes the file."""
        self._commits.close()
        self._writer.close()

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
        execute = self._writer.execute
        number = self._number(producer_id)
        if number is None:
            raise UnknownProducer("this producer was not opened at this agent: call OpenRun first")
        row = execute(
            "SELECT committed FROM lanes WHERE producer = ? AND lane = ?", (number, lane)
        ).fetchone()
        committed = int(row[0]) if row else 0
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
        held = self._held()
        if capped and held + len(fresh) > self._max_bytes:
            raise SpoolFull(
                f"the spool holds {held} bytes, its limit is {self._max_bytes}: a sink is behind"
            )
        execute(
            "INSERT INTO batches (producer, lane, first_offset, bytes) VALUES (?, ?, ?, ?)",
            (number, lane, committed, fresh),
        )
        execute(
            "INSERT INTO lanes VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET committed = excluded.committed",
            (number, lane, end),
        )
        for schema_id, keys in schemas:
            execute("INSERT OR IGNORE INTO schemas VALUES (?, ?, ?)", (number, schema_id, keys))
        self._bytes = held + len(fresh)
        return end, len(fresh)

    def _held(self) -> int:
        """Bytes of all batches, counted when it is not known."""
        if self._bytes is None:
            row = self._writer.execute(
                "SELECT COALESCE(SUM(LENGTH(bytes)), 0) FROM batches"
            ).fetchone()
            self._bytes = int(row[0])
        return self._bytes

    def _recount(self) -> None:
        self._bytes = None

    def _number(self, producer_id: bytes) -> int | None:
        row = self._writer.execute(
            "SELECT number FROM producers WHERE producer_id = ?", (producer_id,)
        ).fetchone()
        return int(row[0]) if row else None

    def _info(self, number: int) -> ProducerInfo:
        if number not in self._infos:
            row = self._writer.execute(
                "SELECT info FROM producers WHERE number = ?", (number,)
            ).fetchone()
            if len(self._infos) > 100_000:
                self._infos.clear()
            self._infos[number] = _from_json(row[0])
        return self._infos[number]


def _schemas_in(journal_bytes: bytes) -> list[tuple[int, str]]:
    """Schema ids and keys of the valid SCHEMA records in a batch."""
    found = []
    for offset in _schema_offsets(journal_bytes):
        try:
            schema = record.decode(journal_bytes, offset)
        except ValueError:
            continue
        found.append((schema.schema_id, "\n".join(schema.keys)))
    return found


def _schema_offsets(data: bytes) -> list[int]:
    """Where valid SCHEMA records start. Looks at lengths only, for speed, and at every checksum only when
    the lengths do not lead to the end."""
    words = memoryview(data[: len(data) & ~7]).cast("Q")
    schema = record.Kind.SCHEMA
    found = []
    at = 0
    while at < len(words) - 1:
        length = words[at] & 0xFFFFFFFF
        if words[at + 1] & 0xFF == schema:
            found.append(8 * at)
        if length < record.HEAD_BYTES:
            break
        at += (length + 7) >> 3
    if 8 * at != len(data):
        found = [at for at in record.scan(data).offsets if data[at + 8] == schema]
    return [at for at in found if record.is_valid(data, at)]


def _to_json(info: ProducerInfo) -> str:
    return json.dumps({**asdict(info), "producer_id": info.producer_id.hex()})


def _from_json(text: str) -> ProducerInfo:
    data = json.loads(text)
    return ProducerInfo(**{**data, "producer_id": bytes.fromhex(data["producer_id"])})
