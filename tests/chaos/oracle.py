"""The oracle compares what producers noted on the side with what the store holds; pure, but for `read_store`.

Every record whose log() has returned is there once, with its exact values; one that was refused is not; one
that was begun and never returned is there once and whole, or not at all; and nothing else is there.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.chaos.records import (
    ENDED,
    INCARNATION_STEPS,
    KILLED,
    MARK,
    RUNNING,
    Metrics,
    Notes,
    Producer,
    Text,
    record,
)
from trackagent.agent.store import open_reader

LOST, DOUBLED, WRONG, NEVER_LOGGED, MISCOUNTED, LATE, LEFT_BEHIND, DIED = KINDS = (
    "lost",
    "doubled",
    "wrong values",
    "never logged",
    "miscounted",
    "late",
    "left behind",
    "died",
)


class StoredPoint(NamedTuple):
    """One stored value, as its bits."""

    source: str
    step: int
    key: str
    bits: int
    time_ns: int


class StoredEvent(NamedTuple):
    source: str
    level: str
    message: str
    step: int | None


@dataclass(frozen=True)
class StoredRun:
    """What the store holds of one run; records_stored and lost_records are the store's own counts."""

    points: Sequence[StoredPoint] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[StoredEvent] = ()
    damage: Sequence[str] = ()
    records_stored: int = 0
    lost_records: int = 0


class Violation(NamedTuple):
    kind: str
    what: str


def check(notes: Iterable[Notes], stored: Mapping[str, StoredRun]) -> list[Violation]:
    """What is wrong with the store, given all producers' notes; by run id, what it holds."""
    of_run: dict[str, list[Notes]] = defaultdict(list)
    for noted in notes:
        of_run[noted.producer.run_id].append(noted)
    found = []
    for run_id in sorted(of_run.keys() | stored.keys()):
        run = stored.get(run_id, StoredRun())
        found += _Check(run).all_of(of_run[run_id])
        found += [Violation(WRONG, f"{run_id[:8]}: damage: {text}") for text in run.damage]
        # No fault here damages a file: what the agent cannot read is its own or the client's doing.
        found += [
            Violation(WRONG, f"{run_id[:8]}: {event.message}")
            for event in run.events
            if "unreadable" in event.message and not event.message.startswith(MARK)
        ]
    return found


class _Check:
    """One run's: takes out of what is stored what was logged, and sees what is left."""

    def __init__(self, run: StoredRun) -> None:
        self._run = run
        self._found: list[Violation] = []
        self._points: dict[tuple[str, int], list[StoredPoint]] = defaultdict(list)
        for point in run.points:
            self._points[point.source, point.step].append(point)
        self._settings = {
            "param": {k: v for k, v in run.params.items() if k.startswith(MARK)},
            "tag": {k: v for k, v in run.tags.items() if k.startswith(MARK)},
        }
        self._events = Counter(e for e in run.events if e.message.startswith(MARK))
        self._metrics_stored = len(self._points)

    def all_of(self, notes: Sequence[Notes]) -> list[Violation]:
        for noted in notes:
            for number in noted.begun:
                expected = record(noted.producer, number)
                if isinstance(expected, Metrics):
                    self._metrics(noted, number, expected)
                elif expected.kind == "event":
                    self._event(noted, number, expected)
                else:
                    self._setting(noted, number, expected)
        self._leftovers()
        self._counts(notes)
        return self._found

    def _say(self, kind: str, producer: Producer, number: int, what: str) -> None:
        self._found.append(Violation(kind, f"{producer}, record {number}: {what}"))

    def _missing(self, noted: Notes, number: int, what: str) -> None:
        if number in noted.returned:
            self._say(LOST, noted.producer, number, what)

    def _is_refused(self, noted: Notes, number: int, what: str) -> None:
        if number in noted.refused:
            self._say(NEVER_LOGGED, noted.producer, number, f"{what}, though it was refused")

    def _metrics(self, noted: Notes, number: int, expected: Metrics) -> None:
        points = self._points.pop((noted.producer.source, expected.step), [])
        if not points:
            self._missing(noted, number, f"no point of step {expected.step}")
            return
        self._is_refused(noted, number, f"step {expected.step} is stored")
        times = Counter(point.key for point in points)
        if doubled := [key for key, count in times.items() if count > 1]:
            self._say(DOUBLED, noted.producer, number, f"{_some(doubled)} of step {expected.step}")
        if gone := expected.bits.keys() - times.keys():
            self._say(LOST, noted.producer, number, f"{_some(gone)} of step {expected.step}")
        if strange := times.keys() - expected.bits.keys():
            self._say(
                NEVER_LOGGED, noted.producer, number, f"{_some(strange)} at step {expected.step}"
            )
        for point in points:
            if point.bits != expected.bits.get(point.key, point.bits):
                what = f"{point.key} is {point.bits:x} instead of {expected.bits[point.key]:x}"
                self._say(WRONG, noted.producer, number, what)
            if expected.time_s is not None and point.time_ns != expected.time_s * 10**9:
                what = f"{point.key}: its time is {point.time_ns} instead of {expected.time_s} s"
                self._say(WRONG, noted.producer, number, what)

    def _setting(self, noted: Notes, number: int, expected: Text) -> None:
        value = self._settings[expected.kind].pop(expected.key, None)
        if value is None:
            self._missing(noted, number, f"the {expected.kind} {expected.key}")
            return
        self._is_refused(noted, number, f"the {expected.kind} {expected.key} is stored")
        if value != expected.text:
            what = f"the {expected.kind} {expected.key} is {value!r} instead of {expected.text!r}"
            self._say(WRONG, noted.producer, number, what)

    def _event(self, noted: Notes, number: int, expected: Text) -> None:
        event = StoredEvent(noted.producer.source, expected.level, expected.text, expected.step)
        count = self._events.pop(event, 0)
        if count == 0:
            self._missing(noted, number, f"the event {expected.key}")
            return
        self._is_refused(noted, number, f"the event {expected.key} is stored")
        if count > 1:
            self._say(DOUBLED, noted.producer, number, f"the event {expected.key}")

    def _leftovers(self) -> None:
        for (source, step), points in self._points.items():
            where = f"{source}, process {step // INCARNATION_STEPS}, step {step}"
            self._found.append(Violation(NEVER_LOGGED, f"{where}: {_some(p.key for p in points)}"))
        for kind, settings in self._settings.items():
            self._found += [Violation(NEVER_LOGGED, f"the {kind} {key}") for key in settings]
        for event in self._events:
            self._found.append(Violation(NEVER_LOGGED, f"the event {event}"))

    def _counts(self, notes: Sequence[Notes]) -> None:
        run = self._run
        if any(noted.state == RUNNING for noted in notes):
            return
        if run.records_stored != self._metrics_stored:
            what = f"the run counts {run.records_stored} records, {self._metrics_stored} are there"
            self._found.append(Violation(MISCOUNTED, what))
        # A killed process may not have said what it lost.
        killed = [noted for noted in notes if noted.state == KILLED]
        least = sum(len(noted.refused) for noted in notes if noted.state == ENDED)
        most = least + sum(len(noted.refused) + len(noted.under_way) for noted in killed)
        if not least <= run.lost_records <= most:
            what = f"the run shows {run.lost_records} lost records, {least} to {most} were refused"
            self._found.append(Violation(MISCOUNTED, what))
        for noted in notes:
            if len(noted.under_way) > (noted.state == KILLED):
                for number in sorted(noted.under_way):
                    self._say(LATE, noted.producer, number, "its call never came back")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def read_store(path: Path, run_ids: Iterable[str]) -> dict[str, StoredRun]:
    """What the store at `path` holds of these runs, bit for bit; nothing where it holds nothing."""
    if not path.exists():
        return {}
    with contextlib.closing(open_reader(path)) as reader:
        known = {run.run_id: run for run in reader.runs(limit=1 << 30)}
        found = {}
        for run_id in known.keys() & set(run_ids):
            points = []
            for block in reader.export(run_id):
                steps, times = block.steps.tolist(), block.times_ns.tolist()
                for key, values in zip(block.keys, block.values, strict=True):
                    bits = np.ascontiguousarray(values).view(np.uint64).tolist()
                    points += [
                        StoredPoint(block.source, step, key, value, time)
                        for step, value, time in zip(steps, bits, times, strict=True)
                    ]
            found[run_id] = StoredRun(
                points=points,
                params=reader.params(run_id),
                tags=reader.tags(run_id),
                events=[
                    StoredEvent(event.source, event.level, event.message, event.step)
                    for event in reader.events(run_id)
                ],
                damage=reader.damage(run_id),
                records_stored=known[run_id].records_stored,
                lost_records=known[run_id].lost_records,
            )
    return found
