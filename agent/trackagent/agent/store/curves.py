"""From stored points to what is shown of a series: one order, the last attempt, buckets. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trackagent.agent.store.chunks import rises
from trackagent.agent.store.contract import Buckets, Floats, Ints, Series, SeriesInfo


@dataclass(frozen=True, slots=True)
class Piece:
    """Points of one attempt in order of arrival, each array (n,)."""

    attempt: int
    steps: Ints
    times_ns: Ints
    values: Floats


class Ends(NamedTuple):
    """What a list needs of a stream: its keys, joined by newlines, and their float64 values at the last step,
    which was at time_ns."""

    source: str
    keys: str
    points: int
    first_step: int
    last_step: int
    last_values: bytes
    attempt: int
    time_ns: int


def as_infos(streams: Iterable[Ends]) -> list[SeriesInfo]:
    """The series of these streams, in the order of `series_list`."""
    split: dict[str, list[str]] = {}
    found: dict[tuple[str, str], tuple[int, int, tuple[int, int, int], float]] = {}
    for source, joined, points, first, last, last_values, attempt, time_ns in streams:
        keys = split.get(joined)
        if keys is None:
            keys = split[joined] = joined.split("\n")
        latest = (last, attempt, time_ns)
        for key, value in zip(keys, np.frombuffer(last_values, "<f8").tolist(), strict=True):
            known = found.get((key, source))
            if known is None:
                found[key, source] = (points, first, latest, value)
                continue
            found[key, source] = (
                known[0] + points,
                min(known[1], first),
                max(known[2], latest),
                value if latest >= known[2] else known[3],
            )
    sources = sorted({source for _, source in found}, key=_natural)
    order = {source: at for at, source in enumerate(sources)}
    return [
        SeriesInfo(key, source, points, first, latest[0], value)
        for (key, source), (points, first, latest, value) in sorted(
            found.items(), key=lambda item: (item[0][0], order[item[0][1]])
        )
    ]


def _natural(source: str) -> list[tuple[int, int, str]]:
    """Orders `rank 2` before `rank 10`."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", source)
    ]


def as_series(key: str, source: str, pieces: list[Piece]) -> Series:
    """One series of the pieces: ordered by step, then time, then place in `pieces`; where several attempts
    have the same step, the last one's points only."""
    if not pieces:
        none = np.empty(0, dtype=np.int64)
        return Series(key, source, none, none, none.astype(np.float64))
    steps = np.concatenate([piece.steps for piece in pieces])
    times = np.concatenate([piece.times_ns for piece in pieces])
    values = np.concatenate([piece.values for piece in pieces])
    if rises(steps):
        return Series(key, source, steps, times, values)
    order = np.lexsort((times, steps))
    if len({piece.attempt for piece in pieces}) > 1:
        attempts = np.concatenate([np.full(len(piece.steps), piece.attempt) for piece in pieces])
        order = order[_of_last_attempt(steps[order], attempts[order])]
    return Series(key, source, steps[order], times[order], values[order])


def as_buckets(series: Series, buckets: int) -> Buckets:
    """The series in at most `buckets` buckets of equally many points. Raises ValueError below one."""
    if buckets < 1:
        raise ValueError(f"a series cannot be drawn in {buckets} buckets")
    n = len(series.steps)
    each = max(1, -(-n // buckets))
    starts = np.arange(0, n, each)
    ends = np.minimum(starts + each, n)
    values = series.values
    if n == 0:
        mean = least = most = values
    else:
        missing = np.isnan(values)
        with np.errstate(all="ignore"):  # infinities may meet
            least = np.fmin.reduceat(values, starts)
            most = np.fmax.reduceat(values, starts)
            if missing.any():
                counted = np.add.reduceat(~missing, starts, dtype=np.int64)
                mean = np.add.reduceat(np.where(missing, 0.0, values), starts) / counted
            else:
                mean = np.add.reduceat(values, starts) / (ends - starts)
    first, last = series.steps[starts], series.steps[ends - 1]
    return Buckets(series.key, series.source, first, last, ends - starts, mean, least, most)


def _of_last_attempt(steps: Ints, attempts: Ints) -> Ints:
    """Positions, in ordered steps, of the points whose attempt is the last one that has their step."""
    starts = np.flatnonzero(np.concatenate(([True], steps[1:] != steps[:-1])))
    lengths = np.diff(np.append(starts, len(steps)))
    last = np.repeat(np.maximum.reduceat(attempts, starts), lengths)
    return np.flatnonzero(attempts == last)
