"""The reading side of the embedded store: each question is one short read-only transaction.

Readers never wait for the writer and never make it wait.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from trackagent.agent.store import chunks, copies, curves, database, reductions, views
from trackagent.agent.store.contract import (
    Batch,
    Buckets,
    Event,
    ExportBlock,
    Ints,
    NotFound,
    Reduction,
    ReductionInfo,
    RunGap,
    RunSummary,
    Series,
    SeriesInfo,
    StoreError,
)

_T = TypeVar("_T")

_LEAST_PREFIX = 4
_HEX = "[0-9a-fA-F]+"
_CANDIDATES = 5
_NAMED_KEYS = 3
_SUMMARY = ", ".join(
    "e.name" if field.name == "experiment" else f"r.{field.name}" for field in fields(RunSummary)
)
# Runs in which nobody logs, such as those of nodes, are none.
_RUNS = f"SELECT {_SUMMARY} FROM runs r JOIN experiments e ON e.id = r.experiment AND r.listed"
_NEWEST_FIRST = " ORDER BY r.start_time_ns DESC, r.run_id DESC"


class SqliteReader:
    """A store.Reader on the SQLite file at `path`. Any number of threads may ask at the same time.

    Raises StoreError when nothing has been stored at `path` yet. SeriesInfo.points and RunSummary.points
    count what is stored, points of earlier attempts that a later one has replaced included.
    """

    def __init__(self, path: Path, *, opener: database.Opener = database.connect) -> None:
        self._path = path
        self._opener = opener
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        with self._connected("open the store"):
            pass

    def runs(
        self, *, experiment: str | None = None, status: str | None = None, limit: int = 100
    ) -> list[RunSummary]:
        conditions, values = [], list[str | int]()
        if experiment is not None:
            conditions.append("r.experiment = (SELECT id FROM experiments WHERE name = ?)")
            values.append(experiment)
        if status is not None:
            conditions.append("r.status = ?")
            values.append(status)
        where = " WHERE " + " AND ".join(conditions) if conditions else ""
        with self._connected("list runs") as connection:
            return _summaries(connection, f"{where}{_NEWEST_FIRST} LIMIT ?", (*values, limit))

    def run(self, name: str) -> RunSummary:
        with self._connected("look up a run") as connection:
            if name == "latest":
                found = _summaries(connection, f"{_NEWEST_FIRST} LIMIT 1")
            else:
                found = _summaries(connection, " WHERE r.run_id = ?", (name,))
                found = found or _matching(connection, name)
            if len(found) == 1:
                return found[0]
            if found:
                raise NotFound(f"{name!r} may be any of these runs: {_listed(found)}")
            newest = _summaries(connection, f"{_NEWEST_FIRST} LIMIT {_CANDIDATES}")
        short = len(name) < _LEAST_PREFIX and re.fullmatch(_HEX, name)
        least = f" (of a run id, give at least {_LEAST_PREFIX} digits)" if short else ""
        raise NotFound(
            f"no run {name!r} in {self._path}{least}; "
            + (f"the newest are {_listed(newest)}" if newest else "there is none yet")
        )

    def params(self, run_id: str) -> dict[str, str]:
        return self._settings("params", run_id)

    def tags(self, run_id: str) -> dict[str, str]:
        return self._settings("tags", run_id)

    def losses(self, run_id: str) -> dict[str, int]:
        with self._connected("read losses") as connection:
            rows = connection.execute(
                "SELECT l.reason, sum(l.counted + l.more) FROM producers p JOIN losses l ON l.producer = p.id"
                " WHERE p.run = ? AND p.sampled = '' GROUP BY l.reason ORDER BY l.reason",
                (self._row_of(connection, run_id),),
            )
            return dict(rows.fetchall())

    def all_losses(self) -> dict[str, int]:
        with self._connected("read losses") as connection:
            rows = connection.execute(
                "SELECT reason, sum(counted + more) FROM losses GROUP BY reason ORDER BY reason"
            )
            return dict(rows.fetchall())

    def attempts(self, run_id: str) -> list[int]:
        with self._connected("list attempts") as connection:
            rows = connection.execute(
                "SELECT DISTINCT attempt FROM producers WHERE run = ? AND sampled = '' ORDER BY attempt",
                (self._row_of(connection, run_id),),
            )
            return [attempt for (attempt,) in rows]

    def gaps(self, run_id: str) -> list[RunGap]:
        with self._connected("read gaps") as connection:
            rows = connection.execute(
                "SELECT s.source, p.attempt, g.reason, g.first_step, g.last_step, g.first_time_ns,"
                " g.last_time_ns, g.records FROM producers p JOIN sources s ON s.id = p.source"
                " JOIN gaps g ON g.producer = p.id WHERE p.run = ? ORDER BY g.first_time_ns, p.id, g.reason",
                (self._row_of(connection, run_id),),
            )
            return [RunGap(*row) for row in rows]

    def events(self, run_id: str, after: int = 0) -> list[Event]:
        with self._connected("read events") as connection:
            rows = [
                row
                for run, first_ns, last_ns in views.times(
                    connection, self._row_of(connection, run_id)
                )
                for row in connection.execute(
                    "SELECT e.id, e.time_ns, e.level, s.source, e.step, e.message, e.data FROM events e"
                    " JOIN producers p ON p.id = e.producer JOIN sources s ON s.id = p.source"
                    " WHERE e.run = ? AND e.id > ? AND e.time_ns BETWEEN ? AND ?",
                    (run, after, first_ns, last_ns),
                )
            ]
            return [
                Event(id_, time_ns, level, source, step, message, json.loads(data))
                for id_, time_ns, level, source, step, message, data in sorted(rows)
            ]

    def series_list(self, run_id: str) -> list[SeriesInfo]:
        with self._connected("list series") as connection:
            rows = connection.execute(
                "SELECT s.source, k.keys, t.points, t.first_step, t.last_step, t.last_values,"
                " p.attempt, t.last_time_ns FROM producers p JOIN sources s ON s.id = p.source"
                " JOIN streams t ON t.producer = p.id JOIN keysets k ON k.id = t.keyset"
                " WHERE p.run = ? AND p.sampled = '' ORDER BY t.id",
                (self._row_of(connection, run_id),),
            )
            return curves.as_infos(curves.Ends(*row) for row in rows)

    def samples_list(self, run_id: str) -> list[SeriesInfo]:
        with self._connected("list samples") as connection:
            run = self._row_of(connection, run_id)
            ends = [views.ends_of(connection, stream) for stream in views.sampled(connection, run)]
            found = curves.as_infos(one for one in ends if one is not None)
            rows = connection.execute("SELECT source, keys FROM sources WHERE run = ?", (run,))
            logged = {source: set(keys.split("\n")) for source, keys in rows}
            return [one for one in found if one.key not in logged.get(one.source, ())]

    def series(self, run_id: str, key: str, source: str) -> Series:
        with self._connected("read a series") as connection:
            return curves.as_series(key, source, self._pieces(connection, run_id, key, source))

    def buckets(self, run_id: str, key: str, source: str, buckets: int) -> Buckets:
        with self._connected("draw a series") as connection:
            pieces = self._pieces(connection, run_id, key, source, drawn=True)
        return curves.as_buckets(curves.as_series(key, source, pieces), buckets)

    def export(
        self, run_id: str, *, skip: dict[str, int] | None = None, samples: bool = False
    ) -> Iterator[ExportBlock]:
        skip = {} if skip is None else skip
        with self._connected("export points") as connection:
            run = self._row_of(connection, run_id)
            streams = (views.sampled if samples else views.logged)(connection, run)
        # The streams as they are now bound what is given out, so that it is whole batches.
        for stream in streams:
            cursor = (
                f"{stream.producer_id.hex()}/{stream.keyset}{'/reduced' if stream.reduced else ''}"
            )
            at = skip.get(cursor, 0)
            read = self._each_chunk("export points", stream, at, chunks.read_intact)
            for chunk, (keys, rows) in read:
                part = slice(max(0, at - chunk.start), min(chunk.n, stream.points - chunk.start))
                at = skip[cursor] = chunk.start + part.stop
                new = rows[:, part]
                new = new[:, stream.seen(new[chunks.STEPS])]
                if not keys or not new.shape[1]:
                    continue
                yield ExportBlock(
                    stream.source,
                    stream.rank,
                    stream.attempt,
                    tuple(stream.keys[key] for key in keys),
                    new[chunks.STEPS] - stream.zero,
                    new[chunks.TIMES],
                    new[chunks.FIRST_KEY :].view(np.float64),
                )
            skip[cursor] = stream.points

    def damage(self, run_id: str) -> list[str]:
        with self._connected("check points") as connection:
            run = self._row_of(connection, run_id)
            streams = [
                stream
                for seen in (views.logged, views.reduced, views.sampled)
                for stream in seen(connection, run)
            ]
        return [
            text
            for stream in streams
            for chunk, damaged in self._each_chunk("check points", stream, 0, chunks.find_damage)
            for text in _described(stream, chunk, damaged)
        ]

    def reductions_list(self, run_id: str) -> list[ReductionInfo]:
        with self._connected("list reductions") as connection:
            return reductions.infos(connection, self._row_of(connection, run_id))

    def reduction(self, run_id: str, key: str, over: str = "all") -> Reduction:
        with self._connected("reduce over ranks") as connection:
            return reductions.of_run(connection, self._row_of(connection, run_id), key, over)

    def copies(self, run_id: str, known: Callable[[str], int]) -> Iterator[Batch]:
        with self._connected("copy a run") as connection:
            run = self._row_of(connection, run_id)
        return copies.copies(self._connected, run, known)

    def ranges(self, origin: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        with self._connected("look up batches") as connection:
            rows = connection.execute(
                "SELECT first, last FROM applied WHERE origin = ? ORDER BY first", (origin,)
            ).fetchall()
        for first, last in rows:
            if found and found[-1][1] >= first - 1:
                found[-1] = (found[-1][0], max(last, found[-1][1]))
            else:
                found.append((first, last))
        return found

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # --- connections -------------------------------------------------------------------------------

    @contextmanager
    def _connected(self, operation: str) -> Iterator[sqlite3.Connection]:
        """A connection inside a read transaction: all that is read belongs to one moment."""
        with self._lock:
            if self._closed:
                raise StoreError(f"the store {self._path} is closed")
            connection = self._idle.pop() if self._idle else None
        lasting = True
        if connection is None:
            connection, lasting = database.open_for_reading(self._path, self._opener)
        try:
            with database.translated(operation, self._path):
                connection.execute("BEGIN")
                try:
                    yield connection
                except (ValueError, TypeError, LookupError, ArithmeticError) as error:
                    raise sqlite3.DatabaseError(f"a row is malformed: {error}") from error
                connection.execute("COMMIT")
            with self._lock:
                if lasting and not self._closed:
                    self._idle.append(connection)
                    connection = None
        finally:
            if connection is not None:
                connection.close()

    def _row_of(self, connection: sqlite3.Connection, run_id: str) -> int:
        row = connection.execute("SELECT id FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            raise NotFound(f"no run {run_id!r} in {self._path}")
        return int(row[0])

    def _settings(self, table: str, run_id: str) -> dict[str, str]:
        with self._connected(f"read {table}") as connection:
            rows = connection.execute(
                f"SELECT key, value FROM {table} WHERE run = ? ORDER BY key",
                (self._row_of(connection, run_id),),
            )
            return dict(rows.fetchall())

    def _each_chunk(
        self,
        operation: str,
        stream: views.Stream,
        at: int,
        read: Callable[[sqlite3.Connection, chunks.Chunk], _T],
    ) -> Iterator[tuple[chunks.Chunk, _T]]:
        """The chunks of a stream from the point `at` on, with what `read` says of each.

        Each is read in a transaction of its own (a long one would keep the log from being emptied); places
        in a stream do not change when chunks are merged.
        """
        while at < stream.points:
            with self._connected(operation) as connection:
                found = chunks.chunks_of(
                    connection,
                    stream.id,
                    len(stream.keys),
                    first=at,
                    limit=1,
                    within=stream.within,
                )
                if not found or found[0].start >= stream.points:
                    return
                result = read(connection, found[0])
            at = found[0].start + found[0].n
            yield found[0], result

    def _pieces(
        self,
        connection: sqlite3.Connection,
        run_id: str,
        key: str,
        source: str,
        *,
        drawn: bool = False,
    ) -> list[curves.Piece]:
        """The stored points of a series in order of arrival, without what is damaged. drawn: times are left
        out where they decide nothing, that is where one stream has steps that rise throughout."""
        run = self._row_of(connection, run_id)
        streams = [one for one in views.logged(connection, run, source) if key in one.keys]
        if not streams:
            streams = [one for one in views.sampled(connection, run, source) if key in one.keys]
            if not streams:
                raise NotFound(f"run {run_id} has no series {key!r} of {source}")
            return [piece for one in streams for piece in views.pieces(connection, one, key)]
        pieces = []
        for stream in streams:
            position = stream.keys.index(key)
            parts: list[tuple[chunks.Chunk, Ints]] = []
            for part in chunks.chunks_of(connection, stream.id, len(stream.keys)):
                with suppress(chunks.ChunkDamaged):
                    parts.append((part, chunks.read_ints(connection, part, chunks.STEPS)))
            needless = drawn and len(streams) == 1 and _rising(parts)
            for part, steps in parts:
                with suppress(chunks.ChunkDamaged):
                    times = steps if needless else chunks.read_ints(connection, part, chunks.TIMES)
                    values = chunks.read_floats(connection, part, position)
                    pieces.append(curves.Piece(stream.attempt, steps, times, values))
        return pieces


def _summaries(
    connection: sqlite3.Connection, rest: str, values: tuple[str | int, ...] = ()
) -> list[RunSummary]:
    return [RunSummary(*row) for row in connection.execute(_RUNS + rest, values)]


def _matching(connection: sqlite3.Connection, name: str) -> list[RunSummary]:
    """A few runs with this name or, if it can be one, this prefix of an id."""
    few = f"{_NEWEST_FIRST} LIMIT {_CANDIDATES}"
    found = _summaries(connection, f" WHERE r.name = ?{few}", (name,))
    if len(name) >= _LEAST_PREFIX and re.fullmatch(_HEX, name):
        prefix = name.lower()
        matches = _summaries(
            connection, f" WHERE r.run_id >= ? AND r.run_id < ?{few}", (prefix, prefix + "g")
        )
        found += [run for run in matches if run not in found]
    return found


def _listed(found: list[RunSummary]) -> str:
    return ", ".join(f"{run.run_id} ({run.name})" for run in found)


def _rising(parts: list[tuple[chunks.Chunk, Ints]]) -> bool:
    if not all(part.increasing for part, _ in parts):
        return False
    return all(before[-1] < after[0] for (_, before), (_, after) in pairwise(parts))


def _described(stream: views.Stream, chunk: chunks.Chunk, damaged: dict[int, str]) -> list[str]:
    """A line for each reason why keys of a chunk cannot be read."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in damaged.items():
        by_reason.setdefault(reason, []).append(stream.keys[key])
    lines = []
    for reason, keys in by_reason.items():
        more = len(keys) - _NAMED_KEYS
        named = ", ".join(keys[:_NAMED_KEYS]) + (f" and {more} more keys" if more > 0 else "")
        points = f"{chunk.n} point{'' if chunk.n == 1 else 's'}"
        lines.append(
            f"{points} of {named} of {stream.source} after the first {chunk.start}: {reason}"
        )
    return lines
