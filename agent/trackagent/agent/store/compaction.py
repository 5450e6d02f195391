"""Merging of small chunks into larger ones, a little at a time (a log-structured merge tree for each stream).

Chunks arrive at level 0. Merging FAN_IN neighbours of a level makes one of the next, until a full chunk
(`chunks.capacity`) can be cut off; full ones are never touched again, so a value is packed two or three
times in its life. When a producer has ended, what is left of its streams becomes one chunk each.

A merge is one transaction: whatever happens, a reader sees either the old chunks or the new one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trackagent.agent.store import chunks
from trackagent.agent.store.chunks import FULL, Chunk

FAN_IN = 16
MOST_PARTS = 64  # a level never holds more chunks than this, however large they are
_SMALL_POINTS = 2048  # on average; larger ones wait until they fill a chunk, or are MOST_PARTS


@dataclass(frozen=True, slots=True)
class Merge:
    """Chunks `first` up to (not including) `last` of a stream become chunks of these sizes and levels."""

    first: int
    last: int
    pieces: tuple[tuple[int, int], ...]


def plan(parts: Sequence[Chunk], capacity: int, *, final: bool) -> Merge | None:
    """The next merge worth doing for the chunks of one stream in order (full ones left out), or None. Pure.

    final: nothing more is expected; everything that is not full becomes one chunk, packed.
    """
    for first, last in _neighbours(parts, final=final):
        run = parts[first:last]
        points = 0
        for count, part in enumerate(run, 1):
            points += part.n
            if points >= capacity:
                rest = points - capacity
                pieces = ((capacity, FULL),) + (((rest, part.level),) if rest else ())
                return Merge(first, first + count, pieces)
        crowded = len(run) >= FAN_IN and points < _SMALL_POINTS * len(run)
        if crowded or len(run) >= MOST_PARTS:
            return Merge(first, last, ((points, run[0].level + 1),))
        if final and (len(run) > 1 or not run[0].packed):
            return Merge(first, last, ((points, max(part.level for part in run) + 1),))
    return None


def _neighbours(parts: Sequence[Chunk], *, final: bool) -> list[tuple[int, int]]:
    """Ranges of chunks that may be merged: of one level (final: of any), and with no gap between."""
    ranges: list[tuple[int, int]] = []
    for at, part in enumerate(parts):
        if ranges and ranges[-1][1] == at:
            before = parts[at - 1]
            if before.start + before.n == part.start and (final or before.level == part.level):
                ranges[-1] = (ranges[-1][0], at + 1)
                continue
        ranges.append((at, at + 1))
    return ranges


def step(connection: sqlite3.Connection, stream: int, keys: int, due: int) -> bool:
    """One merge of a stream inside the caller's transaction; True when there may be more to do.

    Raises ChunkDamaged: the caller gives the transaction up and sets the chunk aside.
    """
    parts = chunks.chunks_of(connection, stream, keys, levels=range(FULL))
    merge = plan(parts, chunks.capacity(keys), final=due == 2)
    if merge is None:
        connection.execute("UPDATE streams SET fresh = 0, due = 0 WHERE id = ?", (stream,))
        return False
    merged = parts[merge.first : merge.last]
    rows = np.concatenate([chunks.read_rows(connection, part) for part in merged], axis=1)
    for part in merged:
        chunks.delete(connection, part)
    at = 0
    for points, level in merge.pieces:
        cut = rows[:, at : at + points]
        start = merged[0].start + at
        chunks.write_merged(connection, stream, start, level, cut, final=due == 2)
        at += points
    return True
