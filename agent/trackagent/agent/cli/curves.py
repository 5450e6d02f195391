"""From the series of a key to the curves that are drawn of it, holding one whole series at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trackagent.agent.draw import Curve
from trackagent.agent.shown import visible
from trackagent.agent.store.contract import Floats, Ints

if TYPE_CHECKING:
    from trackagent.agent.store.contract import Reader, RunGap, SeriesInfo

Spans = list[tuple[float, float]]
"""First and last step of each, ascending and apart."""

# A rank's own series; not one of a process that it forked.
_RANK = re.compile(r"rank (\d+)")
_GPU = re.compile(r"gpu .*:(\S+)")


def read_curves(
    store: Reader, run_id: str, series: Sequence[SeriesInfo], gaps: Sequence[RunGap] = ()
) -> list[Curve]:
    """One curve a source, and, where there are several ranks, their mean. gaps: those of the run."""
    curves, mean, ranks = [], RankMean(), 0
    in_all: Spans | None = None
    for one in series:
        points = store.series(run_id, one.key, one.source)
        rank = _RANK.fullmatch(one.source)
        numbered = rank or _GPU.fullmatch(one.source)
        short = numbered[1] if numbered else one.source
        x, y = thinned(points.steps.astype(float), points.values)
        missing = united((g.first_step, g.last_step) for g in gaps if g.source == one.source)
        curves.append(Curve(visible(one.source), visible(short), x, y, gaps=missing))
        if rank:
            ranks += 1
            mean.add(points.steps, points.values)
            in_all = missing if in_all is None else in_both(in_all, missing)
    if ranks > 1:
        steps, values = mean.points()
        x = steps.astype(float)
        curves.append(Curve(f"mean of {ranks} ranks", "", x, values, heavy=True, gaps=in_all or []))
    return curves


def united(spans: Iterable[tuple[float, float]]) -> Spans:
    """The spans in order, those that meet as one."""
    found: Spans = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((float(first), float(last)))
    return found


def in_both(some: Spans, others: Spans) -> Spans:
    """Where spans of both overlap."""
    overlaps = [(max(a, c), min(b, d)) for a, b in some for c, d in others]
    return [(first, last) for first, last in overlaps if first <= last]


def thinned(x: Floats, y: Floats, buckets: int = 2_000) -> tuple[Floats, Floats]:
    """The points that a drawing shows: of each bucket the lowest and the highest, and all that are not
    finite. So many curves of many points can be held at once."""
    if len(y) <= 4 * buckets:
        return x, y
    good = np.isfinite(y)
    size = -(-len(y) // buckets)
    missing = np.zeros(size * buckets - len(y))

    def extreme(fill: float, pick: Callable[..., Ints]) -> Ints:
        padded = np.concatenate([np.where(good, y, fill), missing + fill])
        return pick(padded.reshape(buckets, size), axis=1) + np.arange(buckets) * size

    kept = np.unique(
        np.concatenate(
            [
                [0, len(y) - 1],
                extreme(math.inf, np.argmin),
                extreme(-math.inf, np.argmax),
                np.flatnonzero(~good),
            ]
        )
    )
    kept = kept[kept < len(y)]
    return x[kept], y[kept]


class RankMean:
    """The mean across ranks at each step, of the ranks that logged it: sum and count are kept, so that one
    series at a time is in memory. A step with a NaN has the mean NaN."""

    def __init__(self) -> None:
        self._steps: Ints = np.empty(0, np.int64)
        self._sum: Floats = np.empty(0)
        self._count: Ints = np.empty(0, np.int64)

    def add(self, steps: Ints, values: Floats) -> None:
        """The points of one rank, ascending by step; a step logged twice counts twice."""
        # +inf and -inf of two ranks make a NaN, which is the answer and no fault.
        with np.errstate(invalid="ignore", over="ignore"):
            if np.array_equal(steps, self._steps):
                self._sum += values
                self._count += 1
                return
            merged, place = np.unique(np.concatenate([self._steps, steps]), return_inverse=True)
            total, count = np.zeros(len(merged)), np.zeros(len(merged), np.int64)
            np.add.at(total, place, np.concatenate([self._sum, values]))
            np.add.at(count, place, np.concatenate([self._count, np.ones_like(steps)]))
        self._steps, self._sum, self._count = merged, total, count

    def points(self) -> tuple[Ints, Floats]:
        """Steps and means."""
        return self._steps, self._sum / self._count
