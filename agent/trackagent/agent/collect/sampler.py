"""Runs the collectors, each on a thread of its own, and keeps what they sampled last.

While a run is here, a collector samples at its interval and what it samples is recorded; with nobody here
it samples rarely, for those who look (`latest`). A collector that has nothing to collect is off. One that
fails, or takes too long, is told to the runs as an event, and asked again later, each time after a longer
pause; while it hangs, nobody waits for it.
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trackagent.agent.active import Active
from trackagent.agent.collect.contract import (
    Collector,
    GpuFacts,
    Here,
    Incident,
    KnowsGpus,
    Sample,
    Unavailable,
)
from trackagent.agent.collect.recorder import Recorder
from trackagent.agent.collect.table import COLLECTORS
from trackagent.agent.store.contract import ProducerInfo

logger = logging.getLogger(__name__)

# With nobody here.
IDLE_INTERVAL_S = 15.0
# How soon it is seen that somebody is.
LOOK_INTERVAL_S = 1.0
# How long a collector may take; one that hangs is seen within half as much again, and ranks that ended too.
PATIENCE_S = 5.0
STOP_S = 1.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 30.0, 3600.0
# The ranks send at multiples of this (ClientConfig.flush_interval_s): what is sampled at the same moments
# shares their commits.
FLUSH_S = 0.175
AFTER_S = 0.002
# How long what was read rarely is shown beside what is read every time.
SHOWN_S = 90.0

Make = Callable[[Here], Collector]


@dataclass(frozen=True, slots=True)
class Latest:
    """What a collector sampled last, and when (nanoseconds since 1970-01-01 UTC). samples: one for each
    source; of what is read rarely, as it was then. read_ns: when each key of each was read."""

    time_ns: int
    samples: tuple[Sample, ...]
    read_ns: tuple[dict[str, int], ...] = ()

    def then(self, time_ns: int, found: Sequence[Sample]) -> Latest:
        """With what was sampled now: a source of which there is nothing now is gone, and so are its readings
        of more than SHOWN_S ago."""
        oldest_ns = time_ns - int(SHOWN_S * 1e9)
        shown: dict[tuple[str, bytes], tuple[Sample, dict[str, int]]] = {}
        for one in found:
            sample, read_ns = shown.setdefault(_source(one), (replace(one, values={}), {}))
            sample.values.update(one.values)
            read_ns.update(dict.fromkeys(one.values, time_ns))
        for one, times in zip(self.samples, self.read_ns, strict=True):
            if (now := shown.get(_source(one))) is None:
                continue
            sample, read_ns = now
            for key, value in one.values.items():
                if key not in read_ns and times[key] >= oldest_ns:
                    sample.values[key], read_ns[key] = value, times[key]
        samples, all_read_ns = zip(*shown.values(), strict=True) if shown else ((), ())
        return Latest(time_ns, samples, all_read_ns)


@dataclass(frozen=True, slots=True)
class State:
    """How a collector is: "on"; "off", with nothing to collect, for `reason`; "failing" for `reason` since
    `since_ns`, and asked again later; "starting"."""

    state: Literal["starting", "on", "off", "failing"]
    reason: str
    since_ns: int


class Sampler:
    """Runs collectors: `intervals` says which and how often, in seconds (table.intervals). `makes`: how each
    is made; `patience_s`, `backoff_s`: how long one may take, and how long one that fails is first left
    alone: seams for tests."""

    def __init__(
        self,
        intervals: Mapping[str, float],
        here: Here,
        active: Active,
        recorder: Recorder,
        *,
        makes: Mapping[str, Make] | None = None,
        patience_s: float = PATIENCE_S,
        backoff_s: float = FIRST_BACKOFF_S,
    ) -> None:
        self._active = active
        self._recorder = recorder
        self.patience_s = patience_s
        self.stopping = threading.Event()
        self._loops = {
            name: _Loop(
                name, interval_s, here, makes[name] if makes else _maker(name), self, backoff_s
            )
            for name, interval_s in intervals.items()
        }
        self._watch = threading.Thread(target=self._watching, name="sampler", daemon=True)

    def start(self) -> None:
        if self._loops:
            self._watch.start()
        for loop in self._loops.values():
            loop.thread.start()

    def stop(self) -> None:
        """Nothing is recorded any more when this returns; a collector that hangs is left behind."""
        self.stopping.set()
        for loop in self._loops.values():
            loop.thread.join(STOP_S)
        if self._loops:
            self._watch.join(STOP_S)
        self._recorder.send_due(all_held=True)

    # --- for those who look; from any thread, without waiting

    def latest(self) -> dict[str, Latest]:
        """By collector, what it sampled last; nothing of one that has not sampled yet."""
        return {name: loop.latest for name, loop in self._loops.items() if loop.latest is not None}

    def gpus(self) -> tuple[GpuFacts, ...]:
        """The GPUs of this node, those that do not answer among them."""
        known: list[object] = [loop.collector for loop in self._loops.values()]
        return tuple(gpu for one in known if isinstance(one, KnowsGpus) for gpu in one.devices())

    def states(self) -> dict[str, State]:
        """By collector that the configuration asks for, how it is."""
        return {name: loop.state for name, loop in self._loops.items()}

    # --- for the loops

    def is_needed(self) -> bool:
        """Whether anybody logs here."""
        return bool(self._active.loggers())

    def take(self, time_ns: int, found: Sequence[Sample | Incident]) -> tuple[Sample, ...]:
        """Records what was sampled, tells what happened; the samples."""
        samples = tuple(one for one in found if isinstance(one, Sample))
        if self.is_needed() and not self.stopping.is_set():
            self._recorder.record(time_ns, samples)
        for one in found:
            if isinstance(one, Incident):
                self.tell(one)
        return samples

    def tell(self, event: Incident) -> None:
        told = self._active.tell(event)
        level = logging.INFO if event.level == "info" else logging.WARNING
        logger.log(level, "%s (told to %d runs)", event.message, told)

    def _watching(self) -> None:
        here: Sequence[ProducerInfo] | None = None
        while not self.stopping.wait(_until_tick(self.patience_s / 2)):
            for loop in self._loops.values():
                loop.check(self.patience_s)
            try:
                if here is not (here := self._active.producers()):
                    self._recorder.end_others(here)
                self._recorder.send_due()
            except Exception as error:  # noqa: BLE001 - it is tried again
                logger.warning("cannot keep samples: %s", error)
                here = None


class _Loop:
    """One collector and its thread."""

    def __init__(
        self,
        name: str,
        interval_s: float,
        here: Here,
        make: Make,
        sampler: Sampler,
        backoff_s: float,
    ) -> None:
        self.latest: Latest | None = None
        self.state = State("starting", "", time.time_ns())
        self._name = name
        self._interval_s = interval_s
        self._here = here
        self._make = make
        self._sampler = sampler
        self.collector: Collector | None = None
        self._first_backoff_s = self._backoff_s = backoff_s
        # All by time.monotonic(). When it was asked something that it has not answered yet.
        self._asked: float | None = None
        self._well_since = time.monotonic()
        # Who says how it is: its thread, and the sampler's where that one hangs.
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name=f"collect-{name}", daemon=True)

    def check(self, patience_s: float) -> None:
        """On the sampler's thread: whether it hangs."""
        asked = self._asked
        if asked is not None and time.monotonic() - asked > patience_s:
            self._fail(f"no answer for {patience_s:g} s")

    def _run(self) -> None:
        sampled = -math.inf
        sampler = self._sampler
        while not sampler.stopping.is_set():
            idle_s = max(IDLE_INTERVAL_S, self._interval_s)
            waited = self.state.state == "failing" or time.monotonic() - sampled >= idle_s
            if waited or sampler.is_needed():
                sampled = time.monotonic()
                self._sample()
            if self.state.state == "off":
                return
            needed = sampler.is_needed()
            wait_s = _until_tick(self._interval_s if needed else LOOK_INTERVAL_S)
            if self.state.state == "failing":
                wait_s = self._backoff_s
                self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
            sampler.stopping.wait(wait_s)

    def _sample(self) -> None:
        self._asked = began = time.monotonic()
        time_ns = time.time_ns()
        try:
            if self.collector is None:
                self.collector = self._make(self._here)
            found = self.collector.sample()
        except Unavailable as error:
            if self.collector is None:
                self.state = State("off", str(error), time_ns)
                logger.info("collector %s is off: %s", self._name, error)
            else:
                self._fail(str(error))
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            self._fail(_described(error))
            return
        finally:
            self._asked = None
        took_s = time.monotonic() - began
        if took_s > self._sampler.patience_s:
            self._fail(f"it took {took_s:.1f} s")
            return
        try:
            samples = self._sampler.take(time_ns, found)
        except Exception as error:  # noqa: BLE001 - what it sampled is none
            self._fail(f"what it sampled cannot be kept: {_described(error)}")
            return
        self._succeed(time_ns)
        self.latest = (self.latest or Latest(0, ())).then(time_ns, samples)

    def _fail(self, reason: str) -> None:
        with self._lock:
            first = self.state.state != "failing"
            since_ns = time.time_ns() if first else self.state.since_ns
            self.state = State("failing", reason, since_ns)
            if not first:
                return
            if time.monotonic() - self._well_since > 2 * self._backoff_s:
                self._backoff_s = self._first_backoff_s
        self._tell("warning", f"is disabled: {reason}; it is tried again later", reason)

    def _succeed(self, time_ns: int) -> None:
        with self._lock:
            failed = self.state.state == "failing"
            if self.state.state == "on":
                return
            self.state = State("on", "", time_ns)
            self._well_since = time.monotonic()
        if failed:
            self._tell("info", "works again", "")

    def _tell(self, level: str, what: str, reason: str) -> None:
        data: dict[str, object] = {"collector": self._name, "reason": reason}
        self._sampler.tell(Incident(level, f"collector {self._name} {what}", data))


def _source(sample: Sample) -> tuple[str, bytes]:
    return sample.gpu, sample.rank.producer_id if sample.rank is not None else b""


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)


def _maker(name: str) -> Make:
    def make(here: Here) -> Collector:
        found: Collector = importlib.import_module(COLLECTORS[name]).make(here)
        return found

    return make


def _until_tick(interval_s: float) -> float:
    """Seconds until the next multiple of `interval_s` by the wall clock, and then of FLUSH_S."""
    now = time.time()
    due = (math.floor(now / interval_s) + 1) * interval_s
    tick = math.ceil(due / FLUSH_S - 1e-6) * FLUSH_S
    # Just after it: a clock that is being adjusted must not make it the second before.
    return max(0.0, tick - now) + AFTER_S
