"""What a run sees of the streams in the store: all that its ranks logged and that was sampled of them, and of
what was sampled on its nodes the part from its time.

Functions of an open connection: what they are asked in one transaction belongs together. Chunks that lie
outside a run's time are not read, however long a node has been sampling.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from trackagent.agent.store import chunks, curves
from trackagent.agent.store.contract import Ints, node_run_id

_SECOND_NS = 1_000_000_000
_ALL = (-(2**63), 2**63 - 1)
_NO_RANK = -1  # of what a node sampled

_LOGGED = "p.sampled = ''"
_REDUCED = "p.reduced <> ''"
_SAMPLED = "p.sampled <> '' AND p.reduced = '' AND t.last_step >= ? AND t.first_step <= ?"


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream as a run sees it, with what is known of its producer: the steps of `within`, counted from
    `zero`. None: all of it."""

    id: int
    producer_id: bytes
    keyset: int
    keys: tuple[str, ...]
    source: str
    rank: int
    attempt: int
    points: int
    reduced: int
    within: tuple[int, int] | None = None
    zero: int = 0

    def seen(self, steps: Ints) -> slice | Ints:
        """Which of these steps the run sees: what picks them from an array."""
        if self.within is None or not len(steps):
            return slice(None)
        first, last = self.within
        return np.flatnonzero((steps >= first) & (steps <= last))


@dataclass(frozen=True, slots=True)
class Window:
    """The time for which a run sees what lies in another (or itself), as steps of samples."""

    run: int
    first: int
    last: int
    own: bool


def windows(connection: sqlite3.Connection, run: int, node: str | None = None) -> list[Window]:
    """Where the samples of a run lie: in itself, without bounds, and in the runs of the nodes where its ranks
    were, or of one of them, from the first one's start there to the last one's end, or open while one has not
    ended."""
    found = [Window(run, *_ALL, own=True)]
    nodes = connection.execute(
        "SELECT node, min(start_time_ns),"
        " CASE WHEN count(*) = count(end_time_ns) THEN max(end_time_ns) END FROM producers"
        " WHERE run = ?1 AND sampled = '' AND NOT forked AND (?2 IS NULL OR node = ?2)"
        " GROUP BY node ORDER BY node",
        (run, node),
    ).fetchall()
    for node, start_ns, end_ns in nodes:
        row = connection.execute(
            "SELECT id FROM runs WHERE run_id = ?", (node_run_id(node),)
        ).fetchone()
        if row is not None and row[0] != run:
            last = _ALL[1] if end_ns is None else end_ns // _SECOND_NS
            found.append(Window(row[0], start_ns // _SECOND_NS, last, own=False))
    return found


def seen_by(
    connection: sqlite3.Connection, run: int, bounds: tuple[int, int] | None = None
) -> list[int]:
    """The runs that see what lies at these steps of a run (None: somewhere in it): itself, or, of a node's,
    those whose ranks were there then; itself where none was. Looks at all producers."""
    found = []
    first, last = bounds or _ALL
    nodes = connection.execute(
        "SELECT DISTINCT p.node, r.run_id FROM producers p JOIN runs r ON r.id = p.run"
        " WHERE p.run = ? AND p.sampled <> ''",
        (run,),
    ).fetchall()
    for node in [node for node, run_id in nodes if run_id == node_run_id(node)]:
        ranks = connection.execute(
            "SELECT run, min(start_time_ns),"
            " CASE WHEN count(*) = count(end_time_ns) THEN max(end_time_ns) END FROM producers"
            " WHERE node = ? AND sampled = '' AND NOT forked GROUP BY run",
            (node,),
        )
        found += [
            one
            for one, start_ns, end_ns in ranks
            if start_ns // _SECOND_NS <= last and (end_ns is None or first <= end_ns // _SECOND_NS)
        ]
    return found or [run]


def times(connection: sqlite3.Connection, run: int) -> list[tuple[int, int, int]]:
    """The same for events: where they lie, and from when to when the run sees them."""
    return [
        (
            window.run,
            _ALL[0] if window.own else window.first * _SECOND_NS,
            _ALL[1] if window.last == _ALL[1] else (window.last + 1) * _SECOND_NS - 1,
        )
        for window in windows(connection, run)
    ]


def logged(connection: sqlite3.Connection, run: int, source: str | None = None) -> list[Stream]:
    """The streams that a run's ranks logged, or those of one source."""
    return _streams(connection, run, source, _LOGGED)


def reduced(connection: sqlite3.Connection, run: int, source: str | None = None) -> list[Stream]:
    """The streams of a run's reductions, or those over some of its ranks."""
    return _streams(connection, run, source, _REDUCED)


def sampled(connection: sqlite3.Connection, run: int, source: str | None = None) -> list[Stream]:
    """The streams that were sampled for a run, or those of one source; steps are counted from the second in
    which the run began."""
    (start_ns,) = connection.execute(
        "SELECT coalesce(start_time_ns, 0) FROM runs WHERE id = ?", (run,)
    ).fetchone()
    found = []
    for window in windows(connection, run, _node_of(source)):
        bounds = window.first, window.last
        found += [
            Stream(
                stream.id,
                stream.producer_id,
                stream.keyset,
                stream.keys,
                stream.source,
                stream.rank if window.own else _NO_RANK,
                stream.attempt if window.own else 0,
                stream.points,
                stream.reduced,
                None if window.own else bounds,
                start_ns // _SECOND_NS,
            )
            for stream in _streams(connection, window.run, source, _SAMPLED, bounds)
        ]
    return found


def _node_of(source: str | None) -> str | None:
    """The node that a source names, so that of thousands one is looked at. None: it may be of any."""
    kind, _, rest = (source or "").partition(" ")
    if kind == "rank":
        return ""  # of the run itself
    return {"node": rest, "gpu": rest.rpartition(":")[0]}.get(kind)


def _streams(
    connection: sqlite3.Connection,
    run: int,
    source: str | None,
    where: str,
    values: tuple[int, ...] = (),
) -> list[Stream]:
    of: tuple[int | str, ...] = (run,)
    if source is None:
        where = f"p.run = ? AND {where}"
    else:
        # Found by its own index: a run may have thousands of others.
        where = f"p.source = (SELECT id FROM sources WHERE run = ? AND source = ?) AND {where}"
        of = run, source
    rows = connection.execute(
        "SELECT t.id, p.producer_id, k.id, k.keys, s.source, p.rank, p.attempt, t.points,"
        " t.reduced FROM producers p"
        " JOIN sources s ON s.id = p.source JOIN streams t ON t.producer = p.id"
        f" JOIN keysets k ON k.id = t.keyset WHERE {where}"
        " ORDER BY p.attempt, p.rank, p.start_time_ns, t.id",
        (*of, *values),
    )
    return [
        Stream(id_, producer, keyset, tuple(keys.split("\n")), *rest)
        for id_, producer, keyset, keys, *rest in rows
    ]


# --- one series ------------------------------------------------------------------------------------


def pieces(connection: sqlite3.Connection, stream: Stream, key: str) -> list[curves.Piece]:
    """The points of a key that a run sees of a sampled stream, without what is damaged. Attempts are none of
    a sample's business: of two at the same second both are seen."""
    position = stream.keys.index(key)
    found = []
    for part in _parts(connection, stream):
        with suppress(chunks.ChunkDamaged):
            steps = chunks.read_ints(connection, part, chunks.STEPS)
            seen = stream.seen(steps)
            times = chunks.read_ints(connection, part, chunks.TIMES)
            values = chunks.read_floats(connection, part, position)
            found.append(curves.Piece(0, steps[seen] - stream.zero, times[seen], values[seen]))
    return found


def _parts(connection: sqlite3.Connection, stream: Stream) -> list[chunks.Chunk]:
    return chunks.chunks_of(connection, stream.id, len(stream.keys), within=stream.within)


# --- what a list shows -----------------------------------------------------------------------------


def ends_of(connection: sqlite3.Connection, stream: Stream) -> curves.Ends | None:
    """What a list says of a sampled stream, as far as the run sees it; None when it sees no point. Decodes
    the steps at the edges of the run's time, and the values of the last chunk there."""
    points, first, last, time_ns, values = connection.execute(
        "SELECT points, first_step, last_step, last_time_ns, last_values FROM streams WHERE id = ?",
        (stream.id,),
    ).fetchone()
    if stream.within is not None and not _inside((first, last), stream.within):
        counted = _counted(connection, stream)
        if counted is None:
            return None
        points, first, greatest, parts = counted
        if greatest != last:
            last = greatest
            time_ns, values = _last_values(connection, stream, last, parts)
    return curves.Ends(
        stream.source,
        "\n".join(stream.keys),
        points,
        first - stream.zero,
        last - stream.zero,
        values,
        0,
        time_ns,
    )


def _inside(bounds: tuple[int, int], within: tuple[int, int]) -> bool:
    return within[0] <= bounds[0] and bounds[1] <= within[1]


def _counted(
    connection: sqlite3.Connection, stream: Stream
) -> tuple[int, int, int, list[chunks.Chunk]] | None:
    """How many points are seen of a stream, their least and greatest step, and the chunks with the latter."""
    points, least, greatest = 0, _ALL[1], _ALL[0]
    last: list[chunks.Chunk] = []
    for part in _parts(connection, stream):
        if part.bounds is not None and _inside(part.bounds, stream.within or _ALL):
            count, (low, high) = part.n, part.bounds
        else:
            try:
                steps = chunks.read_ints(connection, part, chunks.STEPS)
            except chunks.ChunkDamaged:
                continue
            steps = steps[stream.seen(steps)]
            if not len(steps):
                continue
            count, low, high = len(steps), int(steps.min()), int(steps.max())
        points += count
        least = min(least, low)
        last = [part] if high > greatest else [*last, part] if high == greatest else last
        greatest = max(greatest, high)
    return (points, least, greatest, last) if points else None


def _last_values(
    connection: sqlite3.Connection, stream: Stream, step: int, parts: list[chunks.Chunk]
) -> tuple[int, bytes]:
    """The time and the values of the last point at this step; NaN for what cannot be read."""
    time_ns, values = _ALL[0], np.full(len(stream.keys), np.nan)
    for part in parts:
        with suppress(chunks.ChunkDamaged):
            at = np.flatnonzero(chunks.read_ints(connection, part, chunks.STEPS) == step)
            times = chunks.read_ints(connection, part, chunks.TIMES)[at]
            if times.max() < time_ns:
                continue
            time_ns = int(times.max())
            place = at[np.flatnonzero(times == time_ns)[-1]]
            values = np.full(len(stream.keys), np.nan)
            for key in range(len(stream.keys)):
                with suppress(chunks.ChunkDamaged):
                    values[key] = chunks.read_floats(connection, part, key)[place]
    return max(time_ns, 0), values.tobytes()
