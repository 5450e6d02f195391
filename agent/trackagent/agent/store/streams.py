"""Where new points go: sources, sets of keys and streams, and the figures that lists show of them.

Everything here runs inside the writer's transaction. What was looked up or made is remembered between
batches; after a failed transaction, or when another process has written, `forget` must be called.
"""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from trackagent.agent.store import chunks
from trackagent.agent.store.compaction import FAN_IN
from trackagent.agent.store.contract import Floats, Ints, Points, Rejected
from trackagent.agent.store.schema import COLUMNS_PER_CHUNK

_K = TypeVar("_K")
_V = TypeVar("_V")

_REMEMBERED = 10_000  # of each kind; then all are forgotten
_REMEMBERED_BYTES = 24 * 1024 * 1024  # about, of all kinds together
_KINDS = (np.dtype(np.int64), np.dtype(np.int64), np.dtype(np.float64))  # steps, times, values
_KEY_BYTES = 64  # of a key in memory, without its text


@dataclass(slots=True)
class Producer:
    """What is needed of a row of `producers`."""

    id: int
    run: int
    source: int
    name: str  # of the source
    forked: int
    sampled: str  # as in the table: '' where it logs


@dataclass(slots=True)
class _Stream:
    id: int
    points: int
    first_step: int
    last_step: int
    last_time_ns: int
    last_values: bytes


class Streams:
    """Appends points to the streams of a database. Not thread-safe."""

    def __init__(self) -> None:
        self._keysets: dict[tuple[str, ...], int] = {}
        self._streams: dict[tuple[int, int, bool], _Stream] = {}
        self._source_keys: dict[int, set[str]] = {}
        self._bytes = 0

    def forget(self) -> None:
        """Drops all that is remembered of the database."""
        self._keysets.clear()
        self._streams.clear()
        self._source_keys.clear()
        self._bytes = 0

    def append(
        self, connection: sqlite3.Connection, producer: Producer, group: list[Points]
    ) -> tuple[int, int]:
        """Stores the points of one producer and one tuple of keys, all of them reduced or none; returns
        (points, new series), both 0 for samples and reductions.

        Raises Rejected for arrays that do not fit together.
        """
        if self._bytes > _REMEMBERED_BYTES:
            self.forget()
        keys = group[0].keys
        for points in group:
            _check(points)
        steps, times, values = group[0].steps, group[0].times_ns, group[0].values
        if len(group) > 1:
            steps = np.concatenate([points.steps for points in group])
            times = np.concatenate([points.times_ns for points in group])
            values = np.concatenate([points.values for points in group], axis=1)
        if not len(steps) or not keys:
            return 0, 0
        keyset = self._keyset(connection, keys)
        stream, new_series = self._stream(connection, producer, keyset, group[0])
        made = chunks.write_fresh(connection, stream.id, stream.points, steps, times, values)
        _advance(stream, steps, times, values)
        connection.execute(
            "UPDATE streams SET points = ?, first_step = ?, last_step = ?, last_time_ns = ?, last_values = ?,"
            " fresh = fresh + ?, due = max(due, fresh + ? >= ?) WHERE id = ?",
            (
                stream.points,
                stream.first_step,
                stream.last_step,
                stream.last_time_ns,
                stream.last_values,
                made,
                made,
                FAN_IN,
                stream.id,
            ),
        )
        return (0 if producer.sampled else len(steps) * len(keys)), new_series

    def _keyset(self, connection: sqlite3.Connection, keys: tuple[str, ...]) -> int:
        known = self._keysets.get(keys)
        if known is not None:
            return known
        if len(set(keys)) != len(keys) or any("\n" in key or not key for key in keys):
            raise Rejected(f"a key is empty, twice there or has a line break: {str(keys)[:200]}")
        if len(keys) + chunks.FIRST_KEY > COLUMNS_PER_CHUNK:
            raise Rejected(f"{len(keys)} keys logged together are too many")
        joined = "\n".join(keys)
        digest = hashlib.blake2b(joined.encode(), digest_size=16).digest()
        found = connection.execute("SELECT id FROM keysets WHERE digest = ?", (digest,)).fetchone()
        keyset: int
        if found:
            keyset = found[0]
        else:
            keyset = _inserted(
                connection.execute(
                    "INSERT INTO keysets (digest, keys) VALUES (?, ?)", (digest, joined)
                )
            )
        _remember(self._keysets, keys, keyset)
        self._bytes += len(joined) + _KEY_BYTES * len(keys)
        return keyset

    def _stream(
        self, connection: sqlite3.Connection, producer: Producer, keyset: int, points: Points
    ) -> tuple[_Stream, int]:
        """The stream, made where there is none, and how many of the keys are new to the source."""
        place = producer.id, keyset, points.reduced
        known = self._streams.get(place)
        if known is not None:
            return known, 0
        found = connection.execute(
            "SELECT id, points, first_step, last_step, last_time_ns, last_values FROM streams"
            " WHERE producer = ? AND keyset = ? AND reduced = ?",
            place,
        ).fetchone()
        new_series = 0
        if found:
            stream = _Stream(*found)
        else:
            cursor = connection.execute(
                "INSERT INTO streams (producer, keyset, reduced) VALUES (?, ?, ?)", place
            )
            stream = _Stream(_inserted(cursor), 0, 0, 0, 0, b"")
            if not producer.sampled:
                new_series = self._new_keys(connection, producer.source, points.keys)
        _remember(self._streams, place, stream)
        self._bytes += 8 * len(points.keys)
        return stream, new_series

    def _new_keys(self, connection: sqlite3.Connection, source: int, keys: tuple[str, ...]) -> int:
        known = self._source_keys.get(source)
        if known is None:
            row = connection.execute("SELECT keys FROM sources WHERE id = ?", (source,)).fetchone()
            known = set(row[0].split("\n")) if row[0] else set()
            _remember(self._source_keys, source, known)
            self._bytes += sum(map(len, known)) + _KEY_BYTES * len(known)
        new = [key for key in keys if key not in known]
        if new:
            known.update(new)
            self._bytes += sum(map(len, new)) + _KEY_BYTES * len(new)
            connection.execute(
                "UPDATE sources SET keys = CASE keys WHEN '' THEN ? ELSE keys || char(10) || ? END"
                " WHERE id = ?",
                ("\n".join(new), "\n".join(new), source),
            )
        return len(new)


def _check(points: Points) -> None:
    n = len(points.steps)
    shapes = (points.steps.shape, points.times_ns.shape, points.values.shape)
    kinds = (points.steps.dtype, points.times_ns.dtype, points.values.dtype)
    if shapes != ((n,), (n,), (len(points.keys), n)) or kinds != _KINDS:
        raise Rejected(
            f"points of {len(points.keys)} keys have shapes {shapes} and types {', '.join(map(str, kinds))}"
        )


def _advance(stream: _Stream, steps: Ints, times: Ints, values: Floats) -> None:
    """Takes new points into the figures; the last point is that of the greatest step, time, arrival."""
    first, last = int(steps.min()), int(steps.max())
    ends = np.flatnonzero(steps == last)
    at = int(ends[times[ends] == times[ends].max()][-1])
    time_ns = int(times[at])
    if not stream.points or (last, time_ns) >= (stream.last_step, stream.last_time_ns):
        stream.last_step, stream.last_time_ns = last, time_ns
        stream.last_values = values[:, at].tobytes()
    stream.first_step = min(first, stream.first_step) if stream.points else first
    stream.points += len(steps)


def _inserted(cursor: sqlite3.Cursor) -> int:
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _remember(known: dict[_K, _V], key: _K, value: _V) -> None:
    if len(known) >= _REMEMBERED:
        known.clear()
    known[key] = value
