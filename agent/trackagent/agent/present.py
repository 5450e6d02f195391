"""How the node, its GPUs and the runs on it are at this moment: the answer to the rpc Node, as
`trackagent top` shows it.

Nothing is measured here: it puts together what the collectors sampled last, who logs, and what is known of
their progress. Bounded in rows and in bytes; what is left out is counted.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Protocol

from trackagent.agent.access import Sight
from trackagent.agent.collect.contract import GpuFacts, Sample
from trackagent.agent.collect.sampler import Latest, State
from trackagent.agent.store.contract import EventData, ProducerInfo
from trackagent.protos.v1 import agent_pb2

MAX_READINGS = 512
MAX_GPUS = 128
MAX_RUNS = 256
MAX_RANKS = 1000
MAX_ALARMS = 64
# Of one run, and of all that are here.
MAX_EVENTS = 16
MAX_ALL_EVENTS = 256
MAX_LOSSES = 64
MAX_TEXT = 500

# Of a GPU's readings those that people look at first.
GPU_READINGS = (
    "utilization_percent",
    "memory_used_bytes",
    "memory_total_bytes",
    "memory_used_percent",
    "power_watts",
    "power_limit_watts",
    "temperature_celsius",
    "memory_temperature_celsius",
    "sm_clock_mhz",
    "fan_percent",
    "sm_active_percent",
    "tensor_active_percent",
)
THROTTLE = ("throttle/", "throttled/")
LOSS_KEYS = ("loss", "train/loss", "train_loss")


class Sampling(Protocol):
    """What collectors sampled last; see collect.sampler.Sampler. From any thread, without waiting."""

    def latest(self) -> dict[str, Latest]: ...

    def states(self) -> dict[str, State]: ...

    def gpus(self) -> tuple[GpuFacts, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProgress:
    """Where a rank is: its step, seconds since that last changed, the median of its latest steps in seconds,
    and how quick it is beside the fastest rank (1: none is faster). None: not known."""

    step: int | None = None
    still_s: float | None = None
    step_s: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Something that is wrong now. run_id "": with the node."""

    rule: str
    subject: str
    level: str
    message: str
    run_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """ranks: by producer id. losses: by run, the latest values of some metrics. standing: oldest first."""

    ranks: Mapping[bytes, RankProgress] = field(default_factory=dict)
    losses: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    standing: Sequence[Standing] = ()


class RecentEvents:
    """The latest events of the runs that were heard of last, MAX_EVENTS each of MAX_RUNS. From any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._runs: OrderedDict[str, deque[tuple[str, EventData]]] = OrderedDict()

    def take(self, event: EventData, info: ProducerInfo) -> None:
        """One that was stored, of this producer."""
        with self._lock:
            latest = self._runs.setdefault(info.run_id, deque(maxlen=MAX_EVENTS))
            latest.append((info.source, replace(event, message=_cut(event.message), data={})))
            self._runs.move_to_end(info.run_id)
            if len(self._runs) > MAX_RUNS:
                self._runs.popitem(last=False)

    def of(self, run_ids: Iterable[str]) -> list[agent_pb2.RunEvent]:
        """Those of these runs, oldest first; the latest MAX_ALL_EVENTS."""
        with self._lock:
            found = [(run_id, *one) for run_id in run_ids for one in self._runs.get(run_id, ())]
        found.sort(key=lambda one: one[2].time_ns)
        return [
            agent_pb2.RunEvent(
                run_id=run_id,
                time_ns=event.time_ns,
                level=event.level,
                source=source,
                step=event.step,
                message=event.message,
            )
            for run_id, source, event in found[-MAX_ALL_EVENTS:]
        ]


@dataclass(frozen=True, kw_only=True)
class Present:
    """Puts the answer together. ranks: those of runs that have not ended; may wait for the spool, so not for
    the event loop. progress: what is known of them."""

    node: str
    version: str
    sampling: Sampling
    ranks: Callable[[], Sequence[ProducerInfo]]
    progress: Callable[[], Progress]
    events: RecentEvents

    def look(self, sees: Sight | None = None) -> agent_pb2.NodeResponse:
        """How things are, to one who may see these producers; None: all. Of a run, all of its ranks."""
        answer = agent_pb2.NodeResponse(
            agent_version=self.version, node=self.node, time_ns=time.time_ns()
        )
        latest = self.sampling.latest()
        for name, state in self.sampling.states().items():
            answer.collectors.add(
                name=name,
                state=state.state,
                reason=_cut(state.reason),
                since_ns=state.since_ns,
                sampled_ns=latest[name].time_ns if name in latest else 0,
            )
        samples = [one for each in latest.values() for one in each.samples]
        _add_readings(answer, samples)
        _add_gpus(answer, self.sampling.gpus(), samples)
        progress = self.progress()
        # Hidden before anything is left out, or there would be less of what one may see.
        ranks = _seen(self.ranks(), sees)
        _add_runs(answer, ranks, progress, samples)
        here = {info.run_id for info in ranks}
        standing = [
            one for one in progress.standing if sees is None or not one.run_id or one.run_id in here
        ]
        for alarm in standing[:MAX_ALARMS]:
            answer.alarms.add(
                rule=alarm.rule,
                subject=_cut(alarm.subject),
                level=alarm.level,
                message=_cut(alarm.message),
                run_id=alarm.run_id,
            )
        answer.more_alarms = max(0, len(standing) - MAX_ALARMS)
        answer.events.extend(self.events.of(run.run_id for run in answer.runs))
        return answer


def _seen(ranks: Sequence[ProducerInfo], sees: Sight | None) -> Sequence[ProducerInfo]:
    """Those of runs of which every rank may be seen."""
    if sees is None:
        return ranks
    hidden = {info.run_id for info in ranks if not sees(info.producer_id)}
    return [info for info in ranks if info.run_id not in hidden]


def _add_readings(answer: agent_pb2.NodeResponse, samples: Sequence[Sample]) -> None:
    readings: dict[str, float] = {}
    for sample in samples:
        if not sample.gpu and sample.rank is None:
            readings.update(sample.values)
    answer.readings.update(list(readings.items())[:MAX_READINGS])


def _add_gpus(
    answer: agent_pb2.NodeResponse, gpus: Sequence[GpuFacts], samples: Sequence[Sample]
) -> None:
    readings: dict[str, dict[str, float]] = {}
    for sample in samples:
        if sample.gpu:
            readings.setdefault(sample.gpu, {}).update(sample.values)
    for gpu in gpus[:MAX_GPUS]:
        begin = f"gpu/{gpu.gpu}/"
        values = {
            key[len(begin) :]: value
            for key, value in readings.get(gpu.gpu, {}).items()
            if key.startswith(begin)
        }
        answer.gpus.add(
            gpu=gpu.gpu,
            uuid=gpu.uuid,
            name=_cut(gpu.name),
            mig_profile=gpu.mig_profile,
            lost=_cut(gpu.lost),
            readings={
                key: value
                for key, value in values.items()
                if key in GPU_READINGS or key.startswith(THROTTLE)
            },
        )
    answer.more_gpus = max(0, len(gpus) - MAX_GPUS)


def _add_runs(
    answer: agent_pb2.NodeResponse,
    infos: Sequence[ProducerInfo],
    progress: Progress,
    samples: Sequence[Sample],
) -> None:
    runs: dict[str, list[ProducerInfo]] = {}
    for info in infos:
        runs.setdefault(info.run_id, []).append(info)
    readings = {one.rank.producer_id: one.values for one in samples if one.rank is not None}
    # The latest first: should there be too many, the others hang about.
    ordered = sorted(runs.items(), key=lambda item: -max(one.start_time_ns for one in item[1]))
    room = MAX_RANKS
    for run_id, of_run in ordered:
        last = max((one.job_time_ns, one.attempt) for one in of_run)
        here = [one for one in of_run if (one.job_time_ns, one.attempt) == last]
        here.sort(key=lambda one: one.rank)
        if len(answer.runs) == MAX_RUNS or not room:
            answer.more_ranks += len(here)
            continue
        lowest = here[0]
        key, losses = _loss(progress.losses.get(run_id, {}))
        run = answer.runs.add(
            run_id=run_id,
            run_name=lowest.run_name,
            experiment=lowest.experiment,
            attempt=lowest.attempt,
            world_size=lowest.world_size,
            loss_key=key,
            losses=losses,
        )
        for info in here[:room]:
            known = progress.ranks.get(info.producer_id, RankProgress())
            values = readings.get(info.producer_id, {})
            run.ranks.add(
                producer_id=info.producer_id,
                rank=info.rank,
                local_rank=info.local_rank,
                pid=info.pid,
                step=known.step,
                still_seconds=known.still_s,
                step_seconds=known.step_s,
                score=known.score,
                cpu_percent=values.get("process/cpu/percent"),
                rss_bytes=values.get("process/memory/rss_bytes"),
            )
        answer.more_ranks += max(0, len(here) - room)
        room -= min(room, len(here))


def _loss(known: Mapping[str, Sequence[float]]) -> tuple[str, Sequence[float]]:
    """The metric that says most of how a run goes, and its latest values."""
    if not known:
        return "", ()
    named = [key for key in LOSS_KEYS if key in known]
    trained = sorted(key for key in known if "train" in key)
    key = [*named, *trained, *sorted(known)][0]
    return key, list(known[key])[-MAX_LOSSES:]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
