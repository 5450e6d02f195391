"""The figures of a salvaged store that follow from its other rows, computed anew: where a stream begins and
ends, which keys a source has, how much a run holds.

Where a stream counted more points than there are, or points are damaged, the rest is counted as lost.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import defaultdict

import numpy as np

from trackagent.agent.store import chunks, runs
from trackagent.agent.store.contract import Loss
from trackagent.agent.store.schema import COLUMNS_PER_CHUNK

LOST = "lost with a damaged store"


def recount(
    connection: sqlite3.Connection,
    rebuilt: set[tuple[str, int]],
    missing: defaultdict[int, list[str]],
    others: list[str],
) -> None:
    """Computes the figures of what was `rebuilt` (table and row) anew, and those of streams with more points
    than they say. Adds to `missing`, by run (its row), and to `others`, where the run is not known, a line
    for each part of a stream that is not there.
    """
    streams = connection.execute(
        "SELECT s.id, s.points, length(s.last_values) AS size, p.id, p.run, p.source, p.sampled, c.source,"
        " k.keys"
        " FROM streams s LEFT JOIN keysets k ON k.id = s.keyset"
        " LEFT JOIN producers p ON p.id = s.producer LEFT JOIN sources c ON c.id = p.source"
    ).fetchall()
    for stream, counted, size, producer, run, source_id, sampled, source, joined in streams:
        if producer is None or joined is None:
            if producer is None:
                others.append(f"{counted} points: who logged them is not known any more")
            else:
                missing[run].append(f"{counted} points of {source}: the names of their keys")
                rebuilt.add(("runs", run))
            connection.execute(
                "DELETE FROM columns WHERE id / ? IN (SELECT id FROM chunks WHERE stream = ?)",
                (COLUMNS_PER_CHUNK, stream),
            )
            connection.execute("DELETE FROM chunks WHERE stream = ?", (stream,))
            connection.execute("DELETE FROM streams WHERE id = ?", (stream,))
            continue
        keys = joined.split("\n")
        parts = chunks.chunks_of(connection, stream, len(keys))
        lines = _check_chunks(connection, parts, source, keys)
        end = parts[-1].start + parts[-1].n if parts else 0
        points = max(counted, end)
        if ("streams", stream) in rebuilt or end > counted or size != 8 * len(keys):
            _compute_stream(connection, stream, len(keys), parts, points)
            rebuilt |= {("runs", run), ("sources", source_id)}
        gone = points - sum(part.n for part in parts)
        if gone > 0:
            lines.append(f"{gone} points of {_named(keys)} of {source}")
            runs.add_loss(connection, producer, Loss(b"", LOST, gone, more=True))
            if not sampled:
                connection.execute(
                    "UPDATE runs SET lost_records = lost_records + ? WHERE id = ?", (gone, run)
                )
        if lines:
            missing[run] += lines
    for table, number in rebuilt:
        if table == "sources":
            _compute_keys(connection, number)
        elif table == "producers":
            connection.execute(
                "UPDATE producers SET records = (SELECT coalesce(sum(points), 0) FROM streams"
                " WHERE producer = producers.id) WHERE id = ?",
                (number,),
            )
    for table, number in rebuilt:
        if table == "runs":
            _compute_run(connection, number)


def _check_chunks(
    connection: sqlite3.Connection, parts: list[chunks.Chunk], source: str, keys: list[str]
) -> list[str]:
    """Sets damaged chunks aside in their place, and notes anew which steps each holds; what is lost."""
    lines = []
    for part in parts:
        # Not as their rows said: a bound that is wrong would hide points.
        with contextlib.suppress(chunks.ChunkDamaged):
            steps = chunks.read_ints(connection, part, chunks.STEPS)
            connection.execute(
                "UPDATE chunks SET first_step = ?, last_step = ? WHERE id = ?",
                (int(steps.min()), int(steps.max()), part.id),
            )
        damaged = chunks.find_damage(connection, part)
        if damaged:
            connection.execute(
                "UPDATE chunks SET level = ? WHERE id = ?", (chunks.DAMAGED, part.id)
            )
            names = [keys[key] for key in damaged]
            reason = next(iter(damaged.values()))
            lines.append(f"{part.n} points of {_named(names)} of {source}: {reason}")
    return lines


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more keys" if len(keys) > 3 else "")


def _compute_stream(
    connection: sqlite3.Connection, stream: int, keys: int, parts: list[chunks.Chunk], points: int
) -> None:
    first: int | None = None
    last: tuple[int, int] | None = None
    values = b""
    for part in parts:
        intact, rows = chunks.read_intact(connection, part)
        if not intact:
            continue
        steps, times = rows[chunks.STEPS], rows[chunks.TIMES]
        least = int(steps.min())
        first = least if first is None else min(first, least)
        at = int(np.lexsort((np.arange(part.n), times, steps))[-1])
        if last is None or (int(steps[at]), int(times[at])) >= last:
            last = int(steps[at]), int(times[at])
            all_values = np.full(part.keys, np.nan)
            all_values[intact] = rows[chunks.FIRST_KEY :, at].view(np.float64)
            values = all_values.tobytes()
    connection.execute(
        "UPDATE streams SET points = ?, first_step = ?, last_step = ?, last_time_ns = ?, last_values = ?,"
        " fresh = 0, due = 2 WHERE id = ?",
        (points, first or 0, *(last or (0, 0)), values or np.full(keys, np.nan).tobytes(), stream),
    )


def _compute_keys(connection: sqlite3.Connection, source: int) -> None:
    rows = connection.execute(
        "SELECT k.keys FROM producers p JOIN streams s ON s.producer = p.id"
        " JOIN keysets k ON k.id = s.keyset WHERE p.source = ? AND p.sampled = '' ORDER BY s.id",
        (source,),
    )
    keys = dict.fromkeys(key for (joined,) in rows for key in joined.split("\n"))
    connection.execute("UPDATE sources SET keys = ? WHERE id = ?", ("\n".join(keys), source))


def _compute_run(connection: sqlite3.Connection, run: int) -> None:
    sources = connection.execute("SELECT keys FROM sources WHERE run = ?", (run,)).fetchall()
    series = sum(keys.count("\n") + 1 for (keys,) in sources if keys)
    streams = connection.execute(
        "SELECT s.points, k.keys FROM producers p JOIN streams s ON s.producer = p.id"
        " JOIN keysets k ON k.id = s.keyset WHERE p.run = ? AND p.sampled = ''",
        (run,),
    )
    points = sum(count * (keys.count("\n") + 1) for count, keys in streams)
    connection.execute(
        "UPDATE runs SET series = ?, points = ?, records_stored = (SELECT coalesce(sum(records), 0)"
        " FROM producers WHERE run = runs.id AND sampled = ''),"
        " lost_records = (SELECT coalesce(sum(counted + more), 0) FROM losses l"
        " JOIN producers p ON p.id = l.producer WHERE p.run = runs.id AND p.sampled = '') WHERE id = ?",
        (series, points, run),
    )
    runs.settle(connection, run)
