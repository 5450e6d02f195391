"""A store in memory that says what is meant in the plainest way: the contract suite runs over it as well."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np

from trackagent.agent import reduce
from trackagent.agent.policies import Definitions, defined
from trackagent.agent.reducing import from_points, is_partial, weights_of
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    Buckets,
    Event,
    ExportBlock,
    Gap,
    NotFound,
    Points,
    ProducerEnd,
    ProducerInfo,
    Reduction,
    ReductionInfo,
    Rejected,
    RunGap,
    RunSummary,
    Series,
    SeriesInfo,
    node_run_id,
)
from trackagent.agent.store.reductions import Partials, merged
from trackagent.agent.store.runs import attempt_numbers
from trackagent.client.reductions import WEIGHT_KEY

Point = tuple[int, int, int, float]  # step, attempt, time, value
SECOND_NS = 1_000_000_000


@dataclass
class _State:
    applied: set[BatchId] = field(default_factory=set)
    included: set[BatchId] = field(default_factory=set)
    producers: dict[bytes, ProducerInfo] = field(default_factory=dict)
    ends: dict[bytes, ProducerEnd] = field(default_factory=dict)
    points: list[Points] = field(default_factory=list)
    params: dict[tuple[str, str], str] = field(default_factory=dict)
    tags: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    events: list[tuple[str, Event]] = field(default_factory=list)
    losses: dict[tuple[bytes, str], tuple[int, int]] = field(default_factory=dict)
    gaps: dict[tuple[bytes, str, int], Gap] = field(default_factory=dict)
    records: dict[bytes, int] = field(default_factory=dict)


class MemoryStore:
    """Writer and Reader in one. Quadratic and proud of it: for tests only."""

    def __init__(self) -> None:
        self._state = _State()
        self._written: list[Batch] = []

    def close(self) -> None:
        pass

    def reductions_list(self, run_id: str) -> list[ReductionInfo]:
        keys = {
            key for info, points in self._logged(run_id) if not info.forked for key in points.keys
        }
        keys |= {key for info, points in self._reduced(run_id) for key in from_points(points)[0]}
        found = []
        for key in sorted(keys - {WEIGHT_KEY}):
            if self._definitions(run_id).of(key).reduce != "none":
                one = self.reduction(run_id, key)
                reported = int(one.count[-1] + one.nans[-1])
                first, last = int(one.steps[0]), int(one.steps[-1])
                partial = any(
                    info.reduced == "all" and key in from_points(points)[0]
                    for info, points in self._reduced(run_id)
                )
                size = int(one.world_size[-1])
                found.append(ReductionInfo(key, one.reduce, first, last, reported, size, partial))
        return found

    def reduction(self, run_id: str, key: str, over: str = "all") -> Reduction:
        self._known(run_id)
        definitions = self._definitions(run_id)
        ranks = [info for info in self._logging(run_id) if not info.forked and is_in(info, over)]
        partials = []
        for info, points in self._reduced(run_id):
            keys, rows = from_points(points)
            if info.reduced == over and key in keys:
                table = rows.table[:, [keys.index(key)]]
                partials.append(Partials(self._attempt(info), rows.steps, rows.times_ns, table))
        for info, points in self._logged(run_id):
            if info in ranks and key in points.keys and not points.reduced:
                weights = weights_of(points)
                if definitions.unweighted(key):
                    weights[:] = 1
                values = points.values[[points.keys.index(key)]]
                numbers = np.full(len(points.steps), info.rank)
                table = reduce.of_values(values, numbers, weights)
                partials.append(Partials(self._attempt(info), points.steps, points.times_ns, table))
        attempts = {self._attempt(info) for info in ranks}
        sizes = {
            attempt: len({one.rank for one in ranks if self._attempt(one) == attempt})
            if over != "all"
            else max(one.world_size for one in ranks if self._attempt(one) == attempt)
            for attempt in attempts
        }
        found = merged(key, over, definitions.of(key).reduce, partials, sizes)
        if not ranks or not len(found.steps):
            raise NotFound(key)
        return found

    def _definitions(self, run_id: str) -> Definitions:
        return defined(self.tags(run_id))

    def _reduced(self, run_id: str) -> Iterator[tuple[ProducerInfo, Points]]:
        for points in self._state.points:
            info = self._state.producers[points.producer_id]
            if info.run_id == run_id and info.reduced and is_partial(points.keys):
                yield info, points

    def last_written(self, origin: str) -> int:
        return max((id_.last for id_ in self._state.applied if id_.origin == origin), default=0)

    def copies(self, run_id: str, known: Callable[[str], int]) -> Iterator[Batch]:
        producers = [one for one in self._state.producers.values() if one.run_id == run_id]
        ids = {info.producer_id for info in producers}
        for number, batch in enumerate(self._written, start=1):
            lists = ("params", "tags", "events", "points", "ends", "losses", "gaps")
            said = {
                name: [one for one in getattr(batch, name) if one.producer_id in ids]
                for name in lists
            }
            records = {id_: count for id_, count in batch.metric_records.items() if id_ in ids}
            yield Batch(
                BatchId(f"copy of {run_id}", number, number),
                producers,
                **said,
                metric_records=records,
            )

    def ranges(self, origin: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for id_ in sorted(self._state.applied | self._state.included):
            if id_.origin == origin and found and id_.first <= found[-1][1] + 1:
                found[-1] = (found[-1][0], max(found[-1][1], id_.last))
            elif id_.origin == origin:
                found.append((id_.first, id_.last))
        return found

    def compact(self, deadline_s: float) -> bool:
        return False

    def write(self, batch: Batch) -> None:
        state = self._state
        if batch.id in state.applied:
            return
        producers = {info.producer_id: info for info in batch.producers} | state.producers
        said: list[Any] = [batch.params, batch.tags, batch.events, batch.points, batch.ends]
        for item in (item for items in [*said, batch.losses, batch.gaps] for item in items):
            if item.producer_id not in producers:
                raise Rejected(f"unknown producer {item.producer_id.hex()}")
        for points in batch.points:
            if points.values.shape != (len(points.keys), len(points.steps)):
                raise Rejected("shapes")
        for end in batch.ends:
            if end.status not in ("finished", "failed", "killed"):
                raise Rejected(end.status)
        self._written.append(batch)
        state.applied.add(batch.id)
        state.included.update(batch.includes)
        state.producers = producers
        run_of = {id_: info.run_id for id_, info in producers.items()}
        for param in batch.params:
            stored = state.params.setdefault((run_of[param.producer_id], param.key), param.value)
            if stored != param.value:
                self._event(param.producer_id, param.time_ns, "warning", param.key, None, {})
        for tag in batch.tags:
            at = (run_of[tag.producer_id], tag.key)
            state.tags[at] = max(state.tags.get(at, (tag.time_ns, "")), (tag.time_ns, tag.value))
        for event in batch.events:
            rest = (event.level, event.message, event.step, event.data)
            self._event(event.producer_id, event.time_ns, *rest)
        state.points += [points for points in batch.points if len(points.steps)]
        for end in batch.ends:
            before = state.ends.get(end.producer_id)
            if before is None or (before.status == "killed" and end.status != "killed"):
                state.ends[end.producer_id] = end
        for loss in batch.losses:
            at_loss = (loss.producer_id, loss.reason)
            counted, more = state.losses.get(at_loss, (0, 0))
            if loss.more:
                state.losses[at_loss] = counted, more + loss.records
            else:
                state.losses[at_loss] = max(counted, loss.records), more
        for gap in batch.gaps:
            self._add_gap(gap)
        for producer_id, records in batch.metric_records.items():
            state.records[producer_id] = state.records.get(producer_id, 0) + records

    def _add_gap(self, gap: Gap) -> None:
        gaps = self._state.gaps
        at = (gap.producer_id, gap.reason, gap.first_time_ns)
        gaps[at] = _together(gaps[at], gap, max) if at in gaps else gap
        own = sorted(key[::-1] for key in gaps if key[0] == gap.producer_id)
        if len(own) > 1000:
            first, second = own[0][::-1], own[1][::-1]
            gaps[first] = _together(gaps[first], gaps.pop(second), operator.add)

    def _event(
        self,
        producer_id: bytes,
        time_ns: int,
        level: str,
        message: str,
        step: int | None,
        data: dict[str, Any],
    ) -> None:
        info = self._state.producers[producer_id]
        number = len(self._state.events) + 1
        event = Event(number, time_ns, level, info.source, step, message, data)
        self._state.events.append((info.run_id, event))

    def runs(
        self, *, experiment: str | None = None, status: str | None = None, limit: int = 100
    ) -> list[RunSummary]:
        every_one = self._state.producers.values()
        ids = {info.run_id for info in every_one if not (info.sampled or info.reduced)}
        every = sorted(
            map(self._summary, ids), key=lambda run: (run.start_time_ns, run.run_id), reverse=True
        )
        return [
            run
            for run in every
            if experiment in (None, run.experiment) and status in (None, run.status)
        ][:limit]

    def run(self, name: str) -> RunSummary:
        every = self.runs(limit=10**9)
        if name == "latest" and every:
            return every[0]
        exact = [run for run in every if run.run_id == name]
        found = exact or [
            run
            for run in every
            if run.name == name or (len(name) >= 4 and run.run_id.startswith(name))
        ]
        if len(found) != 1:
            raise NotFound(", ".join(run.run_id for run in found or every))
        return found[0]

    def _summary(self, run_id: str) -> RunSummary:
        state = self._state
        every = self._logging(run_id)
        attempt = max(self._attempt(info) for info in every)
        latest = [info for info in every if self._attempt(info) == attempt]
        first = min(latest, key=lambda info: (info.forked, info.rank, info.start_time_ns))
        ranks = [info for info in latest if not info.forked]
        ends = [state.ends.get(info.producer_id) for info in ranks]
        status = "running"
        if ends and None not in ends:
            said = {end.status for end in ends if end is not None}
            status = next(one for one in ("failed", "killed", "finished") if one in said)
        deciding = sorted(
            (end.time_ns, end.error) for end in ends if end and end.status == status and end.error
        )
        infos = self.series_list(run_id)
        return RunSummary(
            run_id,
            first.run_name or run_id[:8],
            first.experiment,
            status,
            attempt,
            max(info.world_size for info in latest),
            min(info.start_time_ns for info in every),
            None if status == "running" else max(end.time_ns for end in ends if end is not None),
            deciding[0][1] if deciding else "",
            len({info.rank for info in ranks}),
            len(infos),
            sum(info.points for info in infos),
            sum(state.records.get(info.producer_id, 0) for info in every),
            self._records_logged(every),
            sum(self.losses(run_id).values()),
        )

    def _attempt(self, info: ProducerInfo) -> int:
        said = [
            (one.job_time_ns, one.attempt, one.start_time_ns) for one in self._logging(info.run_id)
        ]
        return attempt_numbers(said).get((info.job_time_ns, info.attempt), info.attempt)

    def _records_logged(self, every: list[ProducerInfo]) -> int | None:
        total = 0
        for info in every:
            end = self._state.ends.get(info.producer_id)
            if end is not None and end.logged >= 0:
                total += end.logged
            elif info.forked:
                total += self._state.records.get(info.producer_id, 0)
            else:
                return None
        return None if all(info.forked for info in every) else total

    def _known(self, run_id: str) -> None:
        if all(info.run_id != run_id for info in self._state.producers.values()):
            raise NotFound(run_id)

    def params(self, run_id: str) -> dict[str, str]:
        self._known(run_id)
        return {key: value for (run, key), value in self._state.params.items() if run == run_id}

    def tags(self, run_id: str) -> dict[str, str]:
        self._known(run_id)
        return {key: tag[1] for (run, key), tag in self._state.tags.items() if run == run_id}

    def losses(self, run_id: str) -> dict[str, int]:
        self._known(run_id)
        found: dict[str, int] = {}
        for (producer_id, reason), records in self._state.losses.items():
            info = self._state.producers[producer_id]
            if info.run_id == run_id and not (info.sampled or info.reduced):
                found[reason] = found.get(reason, 0) + sum(records)
        return found

    def all_losses(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for (_, reason), records in self._state.losses.items():
            found[reason] = found.get(reason, 0) + sum(records)
        return found

    def attempts(self, run_id: str) -> list[int]:
        self._known(run_id)
        return sorted({self._attempt(info) for info in self._logging(run_id)})

    def gaps(self, run_id: str) -> list[RunGap]:
        self._known(run_id)
        found = []
        for gap in sorted(self._state.gaps.values(), key=lambda gap: gap.first_time_ns):
            info = self._state.producers[gap.producer_id]
            if info.run_id == run_id:
                found.append(RunGap(info.source, self._attempt(info), *astuple(gap)[1:]))
        return found

    def events(self, run_id: str, after: int = 0) -> list[Event]:
        self._known(run_id)
        windows = self._windows(run_id)
        return [
            event
            for run, event in self._state.events
            if event.id > after
            and run in windows
            and windows[run][0] <= event.time_ns // SECOND_NS <= windows[run][1]
        ]

    def _logging(self, run_id: str) -> list[ProducerInfo]:
        every = self._state.producers.values()
        return [
            info for info in every if info.run_id == run_id and not (info.sampled or info.reduced)
        ]

    def _windows(self, run_id: str) -> dict[str, tuple[float, float]]:
        """The seconds that a run sees of what lies in it, and in the runs of its nodes."""
        found = {}
        ranks = [info for info in self._logging(run_id) if not info.forked]
        for node in {info.node for info in ranks}:
            there = [info for info in ranks if info.node == node]
            ends = [self._state.ends.get(info.producer_id) for info in there]
            last = max(end.time_ns // SECOND_NS if end else math.inf for end in ends)
            first = min(info.start_time_ns for info in there) // SECOND_NS
            found[node_run_id(node)] = (float(first), last)
        return {**found, run_id: (-math.inf, math.inf)}

    def _logged(self, run_id: str) -> Iterator[tuple[ProducerInfo, Points]]:
        for points in self._state.points:
            info = self._state.producers[points.producer_id]
            if info.run_id == run_id and not (info.sampled or info.reduced):
                yield info, points

    def _sampled(self, run_id: str) -> Iterator[tuple[ProducerInfo, Points]]:
        """What was sampled for a run: the part of its time, in seconds since it began."""
        windows = self._windows(run_id)
        began = min((info.start_time_ns for info in self._logging(run_id)), default=0)
        for points in self._state.points:
            info = self._state.producers[points.producer_id]
            if info.run_id in windows and info.sampled:
                first, last = windows[info.run_id]
                seen = (points.steps >= first) & (points.steps <= last)
                if seen.any():
                    if info.run_id != run_id:
                        info = replace(info, rank=-1)
                    cut = points.steps[seen] - began // SECOND_NS
                    times, values = points.times_ns[seen], points.values[:, seen]
                    yield info, Points(points.producer_id, points.keys, cut, times, values)

    def _points(self, run_id: str, key: str, source: str) -> list[Point]:
        logged = self._points_of(self._logged(run_id), key, source)
        return logged or self._points_of(self._sampled(run_id), key, source)

    def _points_of(
        self, of: Iterable[tuple[ProducerInfo, Points]], key: str, source: str
    ) -> list[Point]:
        return [
            (
                int(step),
                0 if info.sampled else self._attempt(info),
                int(time_ns),
                float(value),
            )
            for info, some in of
            if info.source == source and key in some.keys
            for step, time_ns, value in zip(
                some.steps, some.times_ns, some.values[some.keys.index(key)], strict=True
            )
        ]

    def series_list(self, run_id: str) -> list[SeriesInfo]:
        self._known(run_id)
        return self._infos(run_id, self._names(self._logged(run_id)))

    def samples_list(self, run_id: str) -> list[SeriesInfo]:
        self._known(run_id)
        logged = self._names(self._logged(run_id))
        return self._infos(run_id, self._names(self._sampled(run_id)) - logged)

    def _names(self, of: Iterable[tuple[ProducerInfo, Points]]) -> set[tuple[str, str]]:
        return {(key, info.source) for info, some in of for key in some.keys}

    def _infos(self, run_id: str, names: set[tuple[str, str]]) -> list[SeriesInfo]:
        found = []
        for key, source in sorted(
            names,
            key=lambda name: (
                name[0],
                [(int(w) if w.isdigit() else 0, w) for w in name[1].split()],
            ),
        ):
            points = self._points(run_id, key, source)
            *_, last = sorted(points, key=lambda point: point[:3])
            least = min(point[0] for point in points)
            found.append(SeriesInfo(key, source, len(points), least, last[0], last[3]))
        return found

    def series(self, run_id: str, key: str, source: str) -> Series:
        self._known(run_id)
        points = self._points(run_id, key, source)
        if not points:
            raise NotFound(key)
        last: dict[int, int] = {}
        for step, attempt, _, _ in points:
            last[step] = max(attempt, last.get(step, attempt))
        kept = sorted(
            (point for point in points if point[1] == last[point[0]]),
            key=lambda point: (point[0], point[2]),
        )
        return Series(
            key,
            source,
            np.array([point[0] for point in kept], dtype=np.int64),
            np.array([point[2] for point in kept], dtype=np.int64),
            np.array([point[3] for point in kept], dtype=np.float64),
        )

    def buckets(self, run_id: str, key: str, source: str, buckets: int) -> Buckets:
        if buckets < 1:
            raise ValueError(buckets)
        series = self.series(run_id, key, source)
        n = len(series.steps)
        each = -(-n // buckets)
        rows = []
        for at in range(0, n, each):
            part = slice(at, min(at + each, n))
            real = [value for value in series.values[part].tolist() if value == value]
            figures = (sum(real) / len(real), min(real), max(real)) if real else (np.nan,) * 3
            steps = series.steps[part]
            rows.append((steps[0], steps[-1], len(steps), *figures))
        columns = list(zip(*rows, strict=True))
        ints = [np.array(column, dtype=np.int64) for column in columns[:3]]
        floats = [np.array(column, dtype=np.float64) for column in columns[3:]]
        return Buckets(key, source, ints[0], ints[1], ints[2], floats[0], floats[1], floats[2])

    def export(
        self, run_id: str, *, skip: dict[str, int] | None = None, samples: bool = False
    ) -> Iterator[ExportBlock]:
        self._known(run_id)
        skip = {} if skip is None else skip
        every = list(self._sampled(run_id) if samples else self._logged(run_id))
        done, skip["blocks"] = skip.get("blocks", 0), len(every)
        for info, some in every[done:]:
            attempt = self._attempt(info) if info.rank >= 0 else 0
            rest = (some.keys, some.steps, some.times_ns, some.values)
            yield ExportBlock(info.source, info.rank, attempt, *rest)

    def damage(self, run_id: str) -> list[str]:
        self._known(run_id)
        return []


def is_in(info: ProducerInfo, over: str) -> bool:
    """Whether a rank is one of those."""
    return over in ("all", f"node {info.node}", *(f"{k}={v}" for k, v in info.groups))


def _together(one: Gap, other: Gap, records: Callable[[int, int], int]) -> Gap:
    return replace(
        one,
        first_step=min(one.first_step, other.first_step),
        last_step=max(one.last_step, other.last_step),
        last_time_ns=max(one.last_time_ns, other.last_time_ns),
        records=records(one.records, other.records),
    )
