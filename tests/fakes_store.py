"""A store in memory that says what is meant in the plainest way: the contract suite runs over it as well."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np

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
    Rejected,
    RunGap,
    RunSummary,
    Series,
    SeriesInfo,
)
from trackagent.agent.store.runs import attempt_numbers

Point = tuple[int, int, int, float]  # step, attempt, time, value


@dataclass
class _State:
    applied: set[BatchId] = field(default_factory=set)
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

    def close(self) -> None:
        pass

    def last_written(self, origin: str) -> int:
        return max((id_.last for id_ in self._state.applied if id_.origin == origin), default=0)

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
        state.applied.add(batch.id)
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
        ids = {info.run_id for info in self._state.producers.values()}
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
        every = [info for info in state.producers.values() if info.run_id == run_id]
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
            self._logged(every),
            sum(self.losses(run_id).values()),
        )

    def _attempt(self, info: ProducerInfo) -> int:
        every = self._state.producers.values()
        said = [
            (one.job_time_ns, one.attempt, one.start_time_ns)
            for one in every
            if one.run_id == info.run_id
        ]
        return attempt_numbers(said)[info.job_time_ns, info.attempt]

    def _logged(self, every: list[ProducerInfo]) -> int | None:
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
            if self._state.producers[producer_id].run_id == run_id:
                found[reason] = found.get(reason, 0) + sum(records)
        return found

    def all_losses(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for (_, reason), records in self._state.losses.items():
            found[reason] = found.get(reason, 0) + sum(records)
        return found

    def attempts(self, run_id: str) -> list[int]:
        self._known(run_id)
        ranks = self._state.producers.values()
        return sorted({self._attempt(info) for info in ranks if info.run_id == run_id})

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
        return [event for run, event in self._state.events if run == run_id and event.id > after]

    def _of(self, run_id: str) -> Iterator[tuple[ProducerInfo, Points]]:
        for points in self._state.points:
            info = self._state.producers[points.producer_id]
            if info.run_id == run_id:
                yield info, points

    def _points(self, run_id: str, key: str, source: str) -> list[Point]:
        return [
            (int(step), self._attempt(info), int(time_ns), float(value))
            for info, some in self._of(run_id)
            if info.source == source and key in some.keys
            for step, time_ns, value in zip(
                some.steps, some.times_ns, some.values[some.keys.index(key)], strict=True
            )
        ]

    def series_list(self, run_id: str) -> list[SeriesInfo]:
        self._known(run_id)
        names = {(key, info.source) for info, some in self._of(run_id) for key in some.keys}
        found = []
        for key, source in sorted(
            names,
            key=lambda name: (name[0], [int(w) if w.isdigit() else 0 for w in name[1].split()]),
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

    def export(self, run_id: str, *, skip: dict[str, int] | None = None) -> Iterator[ExportBlock]:
        self._known(run_id)
        skip = {} if skip is None else skip
        every = list(self._of(run_id))
        done, skip["blocks"] = skip.get("blocks", 0), len(every)
        for info, some in every[done:]:
            rest = (some.keys, some.steps, some.times_ns, some.values)
            yield ExportBlock(info.source, info.rank, self._attempt(info), *rest)

    def damage(self, run_id: str) -> list[str]:
        self._known(run_id)
        return []


def _together(one: Gap, other: Gap, records: Callable[[int, int], int]) -> Gap:
    return replace(
        one,
        first_step=min(one.first_step, other.first_step),
        last_step=max(one.last_step, other.last_step),
        last_time_ns=max(one.last_time_ns, other.last_time_ns),
        records=records(one.records, other.records),
    )
