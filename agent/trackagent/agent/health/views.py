"""What is known of a run that goes on, from the batches that pass: where each rank is, and how fast.

Bounded: of each series the latest values are kept, of runs, timers and metrics so many.
"""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from trackagent.agent.health.settings import Thresholds
from trackagent.agent.store.contract import Batch, Floats, Ints, Points, ProducerInfo

RECENT_STEPS = 64
TIMED = 50  # of each timer: over so many the median is taken
MAX_RUNS = 256
MAX_TIMERS = 32
MAX_METRICS = 2048
# Of a delivery that brings more of a series (a backlog), the last so many are looked at for spikes.
MAX_VALUES = 256
TIMER = "time/"


@dataclass(slots=True)
class RankView:
    """One rank of the run's last attempt. step and moved_ns: where it is, and since when by its own clock;
    moved_s, heard_s: when its step last changed here, and when anything came of it, by the agent's.
    intervals: seconds between changes of its step; step_seconds: the same by steps taken."""

    info: ProducerInfo
    step: int = -1
    moved_ns: int = 0
    moved_s: float = 0.0
    heard_s: float = 0.0
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    timers: dict[str, deque[float]] = field(default_factory=dict)

    def step_time(self) -> float:
        """Median of the recent steps, seconds; NaN where there is none."""
        return statistics.median(self.step_seconds) if self.step_seconds else math.nan


@dataclass(slots=True)
class NotFinite:
    """A metric that was NaN or infinite on a rank, and not finite since: from which step on, with which
    value, and when that was so last, by the rank's clock. over: it is finite again, or the rank has ended,
    since the rules last looked."""

    step: int
    value: float
    last_ns: int
    over: bool = False


@dataclass(slots=True)
class Spike:
    """A metric of one rank beside its own median. above: how many values in a row are too high, the last of
    them `value` at `step`; median: that of the window before it; most: the most since a rule last looked."""

    window: deque[float]
    above: int = 0
    most: int = 0
    value: float = math.nan
    step: int = -1
    median: float = math.nan

    def take(self, step: int, value: float, factor: float) -> None:
        if not math.isfinite(value):
            return
        full = self.window.maxlen or 1
        if len(self.window) >= max(2, full // 5):
            median = statistics.median(self.window)
            if 0 < factor * median < value:
                self.median = median
                self.above += 1
                self.most = max(self.most, self.above)
                self.value, self.step = value, step
                if self.above <= full:
                    return
                self.window.clear()  # so long a spike is a new level
        self.above = 0
        self.window.append(value)


@dataclass(slots=True)
class RunView:
    """The last attempt of a run, as far as it was seen. first: the rank that was seen first. ranks:
    those that have not ended."""

    first: ProducerInfo
    ranks: dict[int, RankView] = field(default_factory=dict)
    not_finite: dict[str, dict[int, NotFinite]] = field(default_factory=dict)
    spikes: dict[tuple[str, int], Spike] = field(default_factory=dict)
    losses: dict[str, deque[float]] = field(default_factory=dict)
    """The latest values of the lowest rank, of metrics that are looked at for spikes."""

    @property
    def run_id(self) -> str:
        return self.first.run_id

    def forget(self, rank: int) -> None:
        """The rank has ended: its last values are nobody's any more, once the rules have looked."""
        for bad in self.not_finite.values():
            if rank in bad:
                bad[rank].over = True
        for (_, other), spike in self.spikes.items():
            if other == rank:
                spike.above = 0

    def settle(self) -> None:
        """The rules have looked."""
        for bad in self.not_finite.values():
            for rank in [rank for rank, one in bad.items() if one.over]:
                del bad[rank]
        self.not_finite = {key: bad for key, bad in self.not_finite.items() if bad}
        for spike in self.spikes.values():
            spike.most = spike.above


class Views:
    """All runs that go on. Not thread-safe."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.runs: dict[str, RunView] = {}
        # Those that have ended since the rules last looked.
        self.ended: dict[str, RunView] = {}
        self._thresholds = thresholds
        self._looked_at: dict[tuple[str, ...], list[int]] = {}

    def take(self, batch: Batch, now_s: float) -> None:
        """Takes what was delivered at `now_s`."""
        infos = {
            info.producer_id: info
            for info in batch.producers
            if not info.forked and not info.sampled
        }
        # What a producer logged with other keys stands apart, in whatever order.
        by_producer: dict[bytes, list[Points]] = {}
        for points in batch.points:
            if points.producer_id in infos and len(points.steps):
                by_producer.setdefault(points.producer_id, []).append(points)
        for producer_id, parts in by_producer.items():
            info = infos[producer_id]
            run = self._run(info)
            if run is not None:
                self._take_points(run, info, parts, now_s)
        self._take_ends(batch, infos)

    def settle(self) -> list[str]:
        """The rules have looked; the ids of runs that had ended before, which are forgotten now."""
        for run in self.runs.values():
            run.settle()
        ended = list(self.ended)
        self.ended.clear()
        return ended

    def _take_ends(self, batch: Batch, infos: dict[bytes, ProducerInfo]) -> None:
        for end in batch.ends:
            info = infos.get(end.producer_id)
            run = self.runs.get(info.run_id) if info else None
            if info is None or run is None:
                continue
            rank = run.ranks.get(info.rank)
            if rank is not None and rank.info.producer_id == end.producer_id:
                del run.ranks[info.rank]
                run.forget(info.rank)
            if not run.ranks:
                del self.runs[info.run_id]
                if len(self.ended) < MAX_RUNS:
                    self.ended[info.run_id] = run

    def _run(self, info: ProducerInfo) -> RunView | None:
        """The view of the producer's run; None for an earlier attempt's."""
        run = self.runs.get(info.run_id)
        began = (info.job_time_ns, info.attempt)
        if run is not None and run.ranks:
            known = next(iter(run.ranks.values())).info
            if began < (known.job_time_ns, known.attempt):
                return None
            if began > (known.job_time_ns, known.attempt):
                run = None
        if run is None:
            if info.run_id not in self.runs and len(self.runs) >= MAX_RUNS:
                del self.runs[next(iter(self.runs))]
            run = RunView(info)
            self.runs[info.run_id] = run
        return run

    def _take_points(
        self, run: RunView, info: ProducerInfo, parts: list[Points], now_s: float
    ) -> None:
        rank = run.ranks.get(info.rank)
        if rank is None or rank.info.producer_id != info.producer_id:
            rank = run.ranks[info.rank] = RankView(info)
        rank.heard_s = now_s
        steps = np.concatenate([points.steps for points in parts])
        times_ns = np.concatenate([points.times_ns for points in parts])
        order = np.argsort(times_ns, kind="stable")
        _move(rank, steps[order], times_ns[order], now_s)
        for points in sorted(parts, key=lambda points: int(points.times_ns[0])):
            for row, key in enumerate(points.keys):
                if key.startswith(TIMER):
                    _time(rank, key[len(TIMER) :], points.values[row])
            self._take_finite(run, info.rank, points)
            for row in self._rows_for_spikes(points.keys):
                self._take_spikes(run, info.rank, points, row)

    def _take_finite(self, run: RunView, rank: int, points: Points) -> None:
        finite = np.isfinite(points.values)
        if not finite.all():
            for row in np.flatnonzero(~finite.all(axis=1)).tolist():
                key = points.keys[row]
                if matches(key, self._thresholds.finite_keys) and (
                    key in run.not_finite or len(run.not_finite) < MAX_METRICS
                ):
                    at = np.flatnonzero(~finite[row])
                    first, last_ns = int(at[0]), int(points.times_ns[at[-1]])
                    bad = run.not_finite.setdefault(key, {})
                    known = bad.get(rank)
                    if known is None:
                        step, value = int(points.steps[first]), float(points.values[row, first])
                        bad[rank] = NotFinite(step, value, last_ns)
                    elif last_ns >= known.last_ns:
                        known.last_ns, known.over = last_ns, False
        rows = {key: row for row, key in enumerate(points.keys)} if run.not_finite else {}
        for key in run.not_finite.keys() & rows.keys():
            known = run.not_finite[key].get(rank)
            good = finite[rows[key]]
            if known is not None and (points.times_ns[good] > known.last_ns).any():
                known.over = True

    def _rows_for_spikes(self, keys: tuple[str, ...]) -> list[int]:
        rows = self._looked_at.get(keys)
        if rows is None:
            if len(self._looked_at) >= MAX_METRICS:
                self._looked_at.clear()
            patterns = self._thresholds.spike_keys
            rows = [row for row, key in enumerate(keys) if matches(key, patterns)]
            self._looked_at[keys] = rows
        return rows

    def _take_spikes(self, run: RunView, rank: int, points: Points, row: int) -> None:
        key = points.keys[row]
        spike = run.spikes.get((key, rank))
        if spike is None:
            if len(run.spikes) >= MAX_METRICS:
                return
            window = deque[float](maxlen=self._thresholds.spike_window)
            spike = run.spikes[key, rank] = Spike(window)
        values = points.values[row, -MAX_VALUES:].tolist()
        for step, value in zip(points.steps[-MAX_VALUES:].tolist(), values, strict=True):
            spike.take(step, value, self._thresholds.spike_factor)
        if rank == min(run.ranks):
            run.losses.setdefault(key, deque(maxlen=RECENT_STEPS)).extend(values)


def _move(rank: RankView, steps: Ints, times_ns: Ints, now_s: float) -> None:
    """Takes the steps of new records, in order of arrival."""
    before = np.concatenate(([rank.step], steps[:-1]))
    changed = np.flatnonzero(steps != before)
    if not len(changed):
        return
    changed = changed[-RECENT_STEPS - 1 :]
    # As floats: differences of any two steps and times have room.
    times = times_ns[changed].astype(float)
    taken = np.abs(steps[changed].astype(float) - before[changed].astype(float))
    taken = np.maximum(taken, 1.0)
    if rank.moved_ns:
        since = np.diff(np.concatenate(([float(rank.moved_ns)], times))) / 1e9
    else:
        since, taken = np.diff(times) / 1e9, taken[1:]
    since = np.maximum(since, 0.0)
    rank.intervals.extend(since.tolist())
    rank.step_seconds.extend((since / taken).tolist())
    rank.step, rank.moved_ns, rank.moved_s = int(steps[-1]), int(times_ns[changed[-1]]), now_s


def _time(rank: RankView, name: str, seconds: Floats) -> None:
    timer = rank.timers.get(name)
    if timer is None:
        if len(rank.timers) >= MAX_TIMERS:
            return
        timer = rank.timers[name] = deque(maxlen=TIMED)
    timer.extend(value for value in seconds[-TIMED:].tolist() if math.isfinite(value))


def matches(key: str, patterns: str) -> bool:
    """Whether the key matches one of the patterns, which commas separate, whatever the case."""
    lowered = key.lower()
    return any(fnmatch.fnmatchcase(lowered, one.strip().lower()) for one in patterns.split(","))
