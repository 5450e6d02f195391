"""The writing side of the embedded store: a batch is one transaction, fsynced before `write` returns.

The id of a batch is written in the same transaction as its content, so a batch is applied once however
often and in whatever order batches come.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from trackagent.agent.store import chunks, compaction, database, runs, views
from trackagent.agent.store.contract import (
    Batch,
    EventData,
    Points,
    Rejected,
    StoreError,
)
from trackagent.agent.store.streams import Producer, Streams

_REMEMBERED_PRODUCERS = 10_000
_PAGES_KEPT = 2_048  # free pages left in the file for the next batches: 8 MiB
_PAGES_A_TIME = 256

NEXT_DUE = (
    "SELECT s.id, k.keys, s.due FROM streams s JOIN keysets k ON k.id = s.keyset"
    " WHERE s.due > 0 LIMIT 1"
)

NEXT_CHUNK = (
    "SELECT c.id, c.stream, c.start, c.n, c.level, c.increasing, CAST(c.data AS BLOB), k.keys FROM chunks c"
    " JOIN streams s ON s.id = c.stream JOIN keysets k ON k.id = s.keyset"
    f" WHERE c.id > ? AND c.level > {chunks.DAMAGED} ORDER BY c.id LIMIT 1"
)

_STREAM_OF = (
    "SELECT s.id FROM producers p JOIN streams s ON s.producer = p.id JOIN keysets k ON k.id = s.keyset"
    " WHERE p.producer_id = ? AND k.keys = ?"
)
_EVENT_OF = (
    "SELECT 1 FROM events e JOIN producers p ON p.id = e.producer"
    " WHERE e.time_ns = ? AND e.message = ? AND p.producer_id = ?"
)

_Figures = dict[int, list[int]]  # run -> [series, points, records, lost records] to add


class SqliteWriter:
    """A store.Writer on the SQLite file at `path`, created where it is missing.

    Used by one thread at a time. Other processes may write to the same file; each waits for the other.
    repair: whether a damaged file is replaced. `opener` and `clock` (seconds, monotonic) are seams for tests.
    """

    def __init__(
        self,
        path: Path,
        *,
        opener: database.Opener = database.connect,
        clock: Callable[[], float] = time.monotonic,
        repair: bool = True,
    ) -> None:
        self._path = path
        self._repair = repair
        self._opener = opener
        self._clock = clock
        self._closed = False
        # What says that the file is damaged; whether something might: the next opening sees to it.
        self._damage = ""
        self._suspect = False
        # The last chunk that was looked at for damage, None when all were.
        self._checked: int | None = 0
        self._data_version = -1
        self._streams = Streams()
        self._producers: dict[bytes, Producer] = {}
        self._connection: sqlite3.Connection | None = database.open_for_writing(
            path, opener, repair=repair
        )

    def write(self, batch: Batch) -> None:
        try:
            with self._transaction("write a batch") as connection:
                new = runs.mark_applied(connection, batch.id)
                if new and runs.forgot_applied(connection):
                    new = not self._has(connection, batch)
                    if new and (batch.points or batch.events):
                        runs.applied_is_known(connection)  # batches come in their order
                if new:
                    self._apply(connection, batch)
        except (UnicodeEncodeError, OverflowError, sqlite3.DataError) as error:
            raise Rejected(f"batch {batch.id} holds what cannot be stored: {error}") from error

    def last_written(self, origin: str) -> int:
        with self._watched("look up batches"):
            (last,) = (
                self._open()
                .execute("SELECT coalesce(max(last), 0) FROM applied WHERE origin = ?", (origin,))
                .fetchone()
            )
            return int(last)

    def compact(self, deadline_s: float) -> bool:
        deadline = self._clock() + deadline_s
        if not self._due():
            return self._give_back_pages(deadline) or self._look_for_damage(deadline)
        # Merges need not be durable: a power loss brings the old chunks back, and the next batch's
        # commit syncs the log with everything before it.
        self._pragma("synchronous = NORMAL")
        try:
            while (due := self._due()) is not None:
                self._compact_once(*due)
                if self._clock() >= deadline:
                    return True
        finally:
            self._sync_again()
        return self._give_back_pages(deadline) or self._look_for_damage(deadline)

    def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with database.translated("close the store", self._path):
                connection.close()

    # --- transactions ------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreError(f"the store {self._path} is closed")
        if self._connection is None:
            self._connection = database.open_for_writing(
                self._path,
                self._opener,
                damage=self._damage,
                thorough=self._suspect,
                repair=self._repair,
            )
            self._damage, self._suspect = "", False
        return self._connection

    @contextmanager
    def _transaction(self, operation: str) -> Iterator[sqlite3.Connection]:
        connection = self._open()
        with self._watched(operation):
            try:
                connection.execute("BEGIN IMMEDIATE")
                version = connection.execute("PRAGMA data_version").fetchone()[0]
                if version != self._data_version:  # another process has written since
                    self._forget()
                    self._data_version = version
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                self._forget()
                self._roll_back(connection)
                raise

    @contextmanager
    def _watched(self, operation: str) -> Iterator[None]:
        """Translates errors; after one that damage may have caused the file is opened anew, and looked at."""
        try:
            with database.translated(operation, self._path):
                yield
        except (StoreError, sqlite3.DataError, TypeError, ValueError, LookupError) as error:
            cause = error.__cause__
            if database.says_damaged(cause):
                self._damage = str(cause)
            elif isinstance(error, (Rejected, UnicodeEncodeError, sqlite3.DataError)) or (
                isinstance(error, StoreError) and not isinstance(cause, sqlite3.IntegrityError)
            ):
                raise
            self._suspect = True
            if self._connection is not None:
                self._forget()
                self._drop(self._connection)
            raise

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._drop(connection)  # closing rolls back as well

    def _sync_again(self) -> None:
        connection = self._open()
        try:
            with database.translated("set up the store", self._path):
                connection.execute("PRAGMA synchronous = FULL")
        except StoreError:
            self._drop(connection)  # a new one syncs; this one would not, and nobody would know
            raise

    def _drop(self, connection: sqlite3.Connection) -> None:
        """Closes a connection that is of no more use; the next write opens another."""
        self._connection = None
        self._data_version = -1
        connection.close()

    def _forget(self) -> None:
        self._producers.clear()
        self._streams.forget()

    def _pragma(self, setting: str) -> list[tuple[int, ...]]:
        with self._watched("set up the store"):
            return self._open().execute(f"PRAGMA {setting}").fetchall()

    # --- one batch ---------------------------------------------------------------------------------

    def _apply(self, connection: sqlite3.Connection, batch: Batch) -> None:
        changed: set[int] = set()  # runs whose status may be another now
        figures: _Figures = {}
        for info in batch.producers:
            if info.producer_id not in self._producers:
                added = runs.add_producer(connection, info)
                if added is not None:
                    changed.add(added)
        for run in changed:  # once, since it looks at all producers of a run
            runs.number_attempts(connection, run)
        for id_, group in _grouped(batch.points).items():
            producer = self._producer(connection, id_[0])
            points, series = self._streams.append(connection, producer, group)
            _add(figures, producer.run, series=series, points=points)
        for producer_id, records in batch.metric_records.items():
            producer = self._producer(connection, producer_id)
            connection.execute(
                "UPDATE producers SET records = records + ? WHERE id = ?", (records, producer.id)
            )
            if producer.sampled:
                continue
            _add(figures, producer.run, records=records)
            if producer.forked:  # what it stored may count as logged
                changed.add(producer.run)
        for param in batch.params:
            runs.set_param(connection, self._producer(connection, param.producer_id), param)
        for tag in batch.tags:
            runs.set_tag(connection, self._producer(connection, tag.producer_id).run, tag)
        for event in batch.events:
            producer = self._producer(connection, event.producer_id)
            runs.add_event(connection, producer.run, producer.id, event)
        for end in batch.ends:
            producer = self._producer(connection, end.producer_id)
            runs.end_producer(connection, producer.id, end)
            connection.execute("UPDATE streams SET due = 2 WHERE producer = ?", (producer.id,))
            changed.add(producer.run)
        for loss in batch.losses:
            producer = self._producer(connection, loss.producer_id)
            lost = runs.add_loss(connection, producer.id, loss)
            _add(figures, producer.run, lost=0 if producer.sampled else lost)
        for gap in batch.gaps:
            runs.add_gap(connection, self._producer(connection, gap.producer_id).id, gap)
        connection.executemany(
            "UPDATE runs SET series = series + ?, points = points + ?, records_stored = records_stored + ?,"
            " lost_records = lost_records + ? WHERE id = ?",
            [(*added, run) for run, added in figures.items()],
        )
        for run in changed:
            runs.settle(connection, run)
        for included in batch.includes:
            runs.note_included(connection, included)

    def _has(self, connection: sqlite3.Connection, batch: Batch) -> bool:
        """Whether something of the batch is stored, and so, since batches are written whole, all that could
        be kept of it: one and the same record is never logged twice at the same time."""
        for (producer_id, keys, _), group in _grouped(batch.points).items():
            for stream in connection.execute(_STREAM_OF, (producer_id, "\n".join(keys))):
                steps = np.concatenate([points.steps for points in group])
                times = np.concatenate([points.times_ns for points in group])
                for part in chunks.chunks_of(connection, stream[0], len(keys)):
                    with suppress(chunks.ChunkDamaged):
                        there = chunks.read_ints(connection, part, chunks.STEPS)
                        if np.isin(there, steps).any():
                            when = chunks.read_ints(connection, part, chunks.TIMES)
                            both = set(zip(there.tolist(), when.tolist(), strict=True))
                            if not both.isdisjoint(
                                zip(steps.tolist(), times.tolist(), strict=True)
                            ):
                                return True
        return any(
            connection.execute(_EVENT_OF, (said.time_ns, said.message, said.producer_id)).fetchone()
            for said in batch.events
        )

    def _producer(self, connection: sqlite3.Connection, producer_id: bytes) -> Producer:
        known = self._producers.get(producer_id)
        if known is not None:
            return known
        row = connection.execute(
            "SELECT p.id, p.run, p.source, s.source, p.forked, p.sampled FROM producers p"
            " JOIN sources s ON s.id = p.source WHERE p.producer_id = ?",
            (producer_id,),
        ).fetchone()
        if row is None:
            raise Rejected(
                f"producer {producer_id.hex()} was never announced: neither in this batch nor before"
            )
        if len(self._producers) >= _REMEMBERED_PRODUCERS:
            self._producers.clear()
        self._producers[producer_id] = Producer(*row)
        return self._producers[producer_id]

    # --- compaction --------------------------------------------------------------------------------

    def _due(self) -> tuple[int, int, int] | None:
        """(stream, number of keys, due) of a stream that compaction should look at."""
        with self._watched("merge chunks"):
            found = self._open().execute(NEXT_DUE).fetchone()
        return (found[0], found[1].count("\n") + 1, found[2]) if found else None

    def _compact_once(self, stream: int, keys: int, due: int) -> None:
        try:
            with self._transaction("merge chunks") as connection:
                compaction.step(connection, stream, keys, due)
        except chunks.ChunkDamaged as damage:
            # Set aside and named in the run; the rest goes on being merged.
            with self._transaction("set a damaged chunk aside") as connection:
                _set_aside(connection, stream, damage)

    def _give_back_pages(self, deadline: float) -> bool:
        """Gives free pages beyond a stock, or an eighth of the file, back; True when more is left."""
        pages = self._pragma("page_count")[0][0]
        excess = self._pragma("freelist_count")[0][0] - max(_PAGES_KEPT, pages // 8)
        while excess > 0:
            # As a script, since Python's sqlite3 stops after one page of it otherwise.
            with self._watched("shrink the store"):
                self._open().executescript(f"PRAGMA incremental_vacuum({_PAGES_A_TIME})")
            excess -= _PAGES_A_TIME
            if self._clock() >= deadline:
                return excess > 0
        return False

    def _look_for_damage(self, deadline: float) -> bool:
        """Compares the checksums of all chunks, once in the life of a writer, and sets damaged ones aside;
        True when more are left."""
        while self._checked is not None and self._clock() < deadline:
            with self._watched("look for damage"):
                row = self._open().execute(NEXT_CHUNK, (self._checked,)).fetchone()
            if row is None:
                self._checked = None
                break
            id_, stream, start, n, level, increasing, data, joined = row
            chunk = chunks.Chunk(
                id_, start, n, level, bool(increasing), joined.count("\n") + 1, data
            )
            self._checked = id_
            with self._watched("look for damage"):
                damaged = chunks.find_damage(self._open(), chunk)
            if damaged:
                reason = next(iter(damaged.values()))
                with self._transaction("set a damaged chunk aside") as connection:
                    _set_aside(connection, stream, chunks.ChunkDamaged(id_, reason))
        return self._checked is not None


def _grouped(
    points: Sequence[Points],
) -> dict[tuple[bytes, tuple[str, ...], bool], list[Points]]:
    """Points by producer, keys and whether they are reduced, in order of arrival within each: one chunk
    instead of many."""
    groups: dict[tuple[bytes, tuple[str, ...], bool], list[Points]] = {}
    for some in points:
        groups.setdefault((some.producer_id, some.keys, some.reduced), []).append(some)
    return groups


def _add(
    figures: _Figures,
    run: int,
    *,
    series: int = 0,
    points: int = 0,
    records: int = 0,
    lost: int = 0,
) -> None:
    row = figures.setdefault(run, [0, 0, 0, 0])
    for at, more in enumerate((series, points, records, lost)):
        row[at] += more


def _set_aside(connection: sqlite3.Connection, stream: int, damage: chunks.ChunkDamaged) -> None:
    row = connection.execute(
        "SELECT p.run, p.id, c.start, c.n, c.first_step, c.last_step FROM chunks c"
        " JOIN streams s ON s.id = c.stream JOIN producers p ON p.id = s.producer"
        " WHERE c.id = ? AND s.id = ?",
        (damage.chunk, stream),
    ).fetchone()
    if row is None:  # another process has merged it meanwhile
        return
    run, producer, start, n, *steps = row
    connection.execute("UPDATE chunks SET level = ? WHERE id = ?", (chunks.DAMAGED, damage.chunk))
    message = (
        f"{n} points after the first {start} were set aside, unreadable in part or whole: {damage}"
    )
    event = EventData(b"", time.time_ns(), "error", message, data={"stream": stream, "points": n})
    # What was sampled on a node is missing in the runs that were there.
    bounds = None if None in steps else (steps[0], steps[1])
    for one in views.seen_by(connection, run, bounds):
        runs.add_event(connection, one, producer, event)
