"""What Prometheus reads of an agent, made when it asks: how the agent is doing, and what it sampled last.

Each part of the first that could take long is read on a thread of its own and has a moment to answer in.
Where the store is locked or a disk hangs, a scrape has all else and says which part is missing; that part is
not asked again before it has answered. What was read is shown again for a second: who asks often keeps no
spool busy.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from trackagent.agent.collect.contract import Sample
from trackagent.agent.collect.metrics import metrics_of
from trackagent.agent.collect.sampler import Sampler
from trackagent.agent.config import AgentConfig
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.quarantine import Held
from trackagent.agent.server import LOST_BATCHES
from trackagent.agent.spool import Spool

T = TypeVar("T")

logger = logging.getLogger(__name__)

# A store that is locked answers within a second that it is.
PATIENCE_S = 2.5
SHOWN_S = 1.0
# Reasons of losses that are shown by name: runs may have given theirs.
MAX_REASONS = 64
OTHER_REASONS = "other reasons"
SINK_STATES = ("idle", "delivering", "retrying", "stopped")
COLLECTOR_STATES = ("starting", "on", "off", "failing")
_UNSAFE = re.compile(r"[^a-zA-Z0-9_]")
_NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What is asked, from any thread. lost: losses in the store by reason; held: what is in quarantine; both
    raise where they cannot be read. streams: how many ranks are connected. Where the agent serves a group,
    nothing is told of runs, losses and damaged files: `trackagent status` does not tell members either."""

    config: AgentConfig
    node: str
    version: str
    started_ns: int
    spool: Spool
    pipeline: Pipeline
    sampler: Sampler
    streams: Callable[[], int]
    lost: Callable[[], Mapping[str, int]]
    held: Callable[[], Held]


class Exposition:
    """What a scrape is answered with. From any thread. patience_s, shown_s: how long a part may take, and for
    how long what was read is shown: seams for tests."""

    def __init__(
        self, sources: Sources, *, patience_s: float = PATIENCE_S, shown_s: float = SHOWN_S
    ) -> None:
        self._shown_s = shown_s
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(AgentCollector(sources, patience_s))
        ProcessCollector(registry=self._registry)
        self._lock = threading.Lock()
        self._text = b""
        self._made = -math.inf

    def render(self) -> bytes:
        """In Prometheus' text format, version 0.0.4; what is at most a second old is not read again."""
        with self._lock:
            if time.monotonic() - self._made >= self._shown_s:
                self._text = generate_latest(self._registry)
                self._made = time.monotonic()
            return self._text


class AgentCollector(Collector):
    """As the client library asks for metrics. One thread at a time; takes `patience_s` and a bit at most."""

    def __init__(self, sources: Sources, patience_s: float) -> None:
        self._patience_s = patience_s
        self._sources = sources
        self._is_shared = sources.config.group is not None
        # Waits as long as it takes: one answer at a time is waited for.
        self._spool = _Part("spool", lambda: sources.spool.statistics().result())
        self._letters = _Part("dead_letters", sources.pipeline.dead_letters)
        self._lost = _Part("losses", sources.lost)
        self._held = _Part("quarantine", sources.held)
        self._parts: list[_Part[Any]] = [self._spool, self._letters]
        if not self._is_shared:
            self._parts += [self._lost, self._held]

    def collect(self) -> Iterable[Metric]:
        began = time.monotonic()
        for part in self._parts:
            part.ask()
        families = _Families()
        self._add_samples(families)
        self._add_agent(families)
        for part in self._parts:
            part.wait(began + self._patience_s)
        statistics = self._spool.answer
        self._add_spool(families, statistics)
        self._add_sink(families, statistics)
        self._add_losses(families, statistics)
        for part in self._parts:
            about = "Whether this part of the scrape could be read in time."
            families.gauge("scrape_part_success", about, part.answer is not None, part=part.name)
        about = "How long it took to read what this scrape shows."
        families.gauge("scrape_duration_seconds", about, time.monotonic() - began)
        return families.all()

    def _add_agent(self, families: _Families) -> None:
        sources = self._sources
        about = {"version": sources.version, "node": sources.node}
        families.gauge("agent_info", "The agent that answers.", 1, **about)
        families.gauge(
            "agent_start_time_seconds", "When it started, since 1970.", sources.started_ns / 1e9
        )
        families.gauge("streams", "Ranks that are connected.", sources.streams())
        families.gauge("max_streams", "How many may be.", sources.config.max_streams)
        for name, how in sources.sampler.states().items():
            for state in COLLECTOR_STATES:
                about_state = "1 for the state that the collector is in."
                is_in = how.state == state
                families.gauge("collector_state", about_state, is_in, collector=name, state=state)

    def _add_spool(self, families: _Families, statistics: Mapping[str, Any] | None) -> None:
        about = "Journal bytes that the spool may hold."
        families.gauge("spool_max_bytes", about, self._sources.config.spool_bytes)
        if statistics is None:
            return
        about = "Batches received that some sink has not accepted yet."
        families.gauge("spool_batches", about, statistics["batches"])
        families.gauge("spool_bytes", "Their journal bytes.", statistics["bytes"])
        about = "Journal bytes received since the agent started."
        families.counter("spool_received_bytes_total", about, statistics["received_bytes"])

    def _add_sink(self, families: _Families, statistics: Mapping[str, Any] | None) -> None:
        pipeline = self._sources.pipeline
        sink = pipeline.sink_name
        for state in SINK_STATES:
            about = "1 for the state that the sink is in."
            families.gauge("sink_state", about, pipeline.state == state, sink=sink, state=state)
        if pipeline.accepted_ns:
            about = "When the sink last accepted something, since 1970."
            accepted_s = pipeline.accepted_ns / 1e9
            families.gauge("sink_last_accepted_timestamp_seconds", about, accepted_s, sink=sink)
        for one in statistics["sinks"] if statistics else ():
            about = "Batches that the sink has not accepted yet."
            families.gauge("sink_batches_behind", about, one["batches_behind"], sink=one["name"])
            about = "Batches that the sink rejected for good, ever."
            families.counter(
                "sink_rejected_batches_total", about, one["rejected"], sink=one["name"]
            )
        if self._letters.answer is not None:
            count, size = self._letters.answer
            about = "Rejected batches that are kept."
            families.gauge("sink_dead_letters", about, count, sink=sink)
            families.gauge("sink_dead_letter_bytes", "What they take.", size, sink=sink)

    def _add_losses(self, families: _Families, statistics: Mapping[str, Any] | None) -> None:
        if self._lost.answer is not None:
            lost = dict(self._lost.answer)
            if statistics and statistics["lost_batches"]:
                lost[LOST_BATCHES] = statistics["lost_batches"]
            most = sorted(lost, key=lambda reason: (-lost[reason], reason))
            for reason in most[MAX_REASONS:]:
                lost[OTHER_REASONS] = lost.get(OTHER_REASONS, 0) + lost.pop(reason)
            about = "Records, or values of records, lost in all runs of the agent's store."
            for reason, count in lost.items():
                families.counter("lost_records_total", about, count, reason=reason)
        if self._held.answer is not None:
            held = self._held.answer
            families.gauge("quarantine_items", "Damaged files that are set aside.", held.items)
            families.gauge("quarantine_bytes", "What they take.", held.size)
            about = "Of them, those that were deleted at the limit, ever."
            families.counter("quarantine_deleted_items_total", about, held.deleted)

    def _add_samples(self, families: _Families) -> None:
        sources = self._sources
        uuids = {}
        for gpu in sources.sampler.gpus():
            uuids[gpu.gpu] = gpu.uuid
            labels = {"node": sources.node, "gpu": gpu.gpu, "uuid": gpu.uuid}
            facts = {"name": gpu.name, "driver": gpu.driver, "mig_profile": gpu.mig_profile}
            families.gauge("gpu_info", "What a GPU is.", 1, **labels, **facts)
            about = "Whether a GPU does not answer any more."
            families.gauge("gpu_lost", about, bool(gpu.lost), **labels)
        states = sources.sampler.states()
        for collector, latest in sources.sampler.latest().items():
            # What one that fails has read is not how things are now.
            if states[collector].state != "on":
                continue
            about = "When the collector last sampled, since 1970."
            sampled_s = latest.time_ns / 1e9
            families.gauge(
                "collector_last_sample_timestamp_seconds", about, sampled_s, collector=collector
            )
            for sample in sorted(latest.samples, key=_newest_first):
                if sample.rank is not None and self._is_shared:
                    continue
                source = _labels(sample, sources.node, uuids)
                for key, value in sample.values.items():
                    name, about, found = exposed(collector, key)
                    families.add(name, about, value, {**dict(found), **source})


class _Part(Generic[T]):
    """Something that may take long, or never answer. answer: of the last time, None where there is none."""

    def __init__(self, name: str, read: Callable[[], T]) -> None:
        self.name = name
        self.answer: T | None = None
        self._read = read
        self._thread: threading.Thread | None = None
        self._found: T | None = None

    def ask(self) -> None:
        self.answer = None
        if self._thread is None or not self._thread.is_alive():
            self._found = None
            self._thread = threading.Thread(
                target=self._run, name=f"scrape-{self.name}", daemon=True
            )
            self._thread.start()

    def wait(self, deadline: float) -> None:
        """Until there is an answer, or `deadline` by time.monotonic()."""
        assert self._thread is not None
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._thread.is_alive():
            self.answer = self._found

    def _run(self) -> None:
        try:
            self._found = self._read()
        except Exception as error:  # noqa: BLE001 - whatever it is, the scrape has the other parts
            logger.debug("cannot read %s for Prometheus: %s", self.name, error)


class _Families:
    """Metrics by name, each series of them once: the first counts."""

    def __init__(self) -> None:
        self._by_name: dict[str, Metric] = {}
        self._seen: set[tuple[str, frozenset[tuple[str, str]]]] = set()

    def gauge(self, name: str, about: str, value: float, /, **labels: str) -> None:
        self.add(f"trackagent_{name}", about, value, labels)

    def counter(self, name: str, about: str, value: float, /, **labels: str) -> None:
        """Its name ends in _total."""
        self.add(f"trackagent_{name}", about, value, labels)

    def add(self, name: str, about: str, value: float, labels: dict[str, str]) -> None:
        """A counter where the name ends in _total, else a gauge."""
        series = name, frozenset(labels.items())
        if series not in self._seen:
            self._seen.add(series)
            self._family(name, about).add_sample(name, labels, float(value))

    def _family(self, name: str, about: str) -> Metric:
        if (family := self._by_name.get(name)) is None:
            kind = "counter" if name.endswith("_total") else "gauge"
            family = Metric(name.removesuffix("_total"), about, kind)
            self._by_name[name] = family
        return family

    def all(self) -> list[Metric]:
        return [self._by_name[name] for name in sorted(self._by_name)]


def _newest_first(sample: Sample) -> tuple[int, int]:
    """Of two attempts of a rank, the later one is shown."""
    return (0, 0) if sample.rank is None else (-sample.rank.job_time_ns, -sample.rank.attempt)


def _labels(sample: Sample, node: str, uuids: Mapping[str, str]) -> dict[str, str]:
    labels = {"node": node}
    if sample.gpu:
        labels |= {"gpu": sample.gpu, "uuid": uuids.get(sample.gpu, "")}
    if sample.rank is not None:
        labels |= {"run_id": sample.rank.run_id, "rank": str(sample.rank.rank)}
    return labels


@functools.lru_cache(maxsize=8192)
def exposed(collector: str, key: str) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """The name of what a collector samples as `key`, what it is, and as labels the names in it that the
    system gives: docs/metrics.md has the rule."""
    for pattern, name, about in _table(collector):
        if found := pattern.fullmatch(key):
            return name, about, tuple(found.groupdict().items())
    return _name(key), "", ()


@functools.lru_cache(maxsize=64)
def _table(collector: str) -> tuple[tuple[re.Pattern[str], str, str], ...]:
    """For each metric of a collector: the keys that are its, its name here, and what it is."""
    rows = []
    for metric in metrics_of(collector):
        parts = _NAME.split(metric.key)
        # Every other part is a name in braces.
        pattern = "".join(
            f"(?P<{part}>[^/]+)" if at % 2 else re.escape(part) for at, part in enumerate(parts)
        )
        plain = "/".join(part.strip("/") for part in parts[::2] if part.strip("/"))
        about = f"{metric.meaning} ({metric.unit})" if metric.unit else metric.meaning
        rows.append((re.compile(pattern), _name(plain), about))
    return tuple(rows)


def _name(key: str) -> str:
    return _UNSAFE.sub("_", f"trackagent_{key}")
