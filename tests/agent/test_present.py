"""What the agent says of its node: put together from samples, ranks and their progress, and bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tests.agent.samples import RUN_ID, TIME_NS, producer
from trackagent.agent.access import Sight
from trackagent.agent.collect.contract import GpuFacts, Sample
from trackagent.agent.collect.sampler import Latest, State
from trackagent.agent.present import (
    MAX_ALARMS,
    MAX_ALL_EVENTS,
    MAX_EVENTS,
    MAX_GPUS,
    MAX_LOSSES,
    MAX_RANKS,
    MAX_RUNS,
    MAX_TEXT,
    Present,
    Progress,
    RankProgress,
    RecentEvents,
    Standing,
)
from trackagent.agent.store.contract import EventData, ProducerInfo
from trackagent.protos.v1 import agent_pb2


class Sampled:
    """Collectors that have sampled this, once."""

    def __init__(self, *samples: Sample, gpus: Sequence[GpuFacts] = ()) -> None:
        self._samples = samples
        self._gpus = tuple(gpus)

    def latest(self) -> dict[str, Latest]:
        return {"system": Latest(TIME_NS, self._samples)}

    def states(self) -> dict[str, State]:
        return {"system": State("on", "", 5), "gpu": State("off", "no driver", 6)}

    def gpus(self) -> tuple[GpuFacts, ...]:
        return self._gpus


def look(
    *ranks: ProducerInfo,
    sampled: Sampled | None = None,
    progress: Progress | None = None,
    events: RecentEvents | None = None,
    sees: Sight | None = None,
) -> agent_pb2.NodeResponse:
    return Present(
        node="host-a",
        version="1.2.3",
        sampling=sampled or Sampled(),
        ranks=lambda: ranks,
        progress=lambda: progress or Progress(),
        events=events or RecentEvents(),
    ).look(sees)


def rank(number: int, **changes: object) -> ProducerInfo:
    """With an id of its own, also beyond 255."""
    info = producer(0, producer_id=number.to_bytes(16, "big"), **changes)
    return dataclasses.replace(info, rank=number)


def event(message: str = "x", time_ns: int = TIME_NS) -> EventData:
    return EventData(producer().producer_id, time_ns, "info", message, 7)


def gpu(index: int) -> GpuFacts:
    return GpuFacts(gpu=str(index), uuid=f"GPU-{index}", name="H100", driver="550")


def test_readings_are_the_nodes_own() -> None:
    sampled = Sampled(
        Sample({"system/cpu/percent": 12.0}),
        Sample({"gpu/0/power_watts": 300.0}, gpu="0"),
        Sample({"process/threads": 3.0}, rank=producer()),
    )
    assert dict(look(sampled=sampled).readings) == {"system/cpu/percent": 12.0}


def test_collectors_say_how_they_are() -> None:
    system, gpus = look().collectors
    assert (system.name, system.state, system.sampled_ns) == ("system", "on", TIME_NS)
    assert (gpus.name, gpus.state, gpus.reason, gpus.sampled_ns) == ("gpu", "off", "no driver", 0)


def test_a_gpu_has_the_readings_that_people_look_at() -> None:
    values = {"gpu/0/power_watts": 300.0, "gpu/0/throttle/idle": 1.0, "gpu/0/processes": 2.0}
    (found,) = look(sampled=Sampled(Sample(values, gpu="0"), gpus=[gpu(0)])).gpus
    assert (found.uuid, found.name) == ("GPU-0", "H100")
    assert dict(found.readings) == {"power_watts": 300.0, "throttle/idle": 1.0}


def test_a_rank_has_its_progress_and_its_process() -> None:
    values = {"process/cpu/percent": 50.0, "process/memory/rss_bytes": 1e9}
    known = RankProgress(step=5, still_s=0.5, step_s=0.25, score=0.75)
    (run,) = look(
        producer(3),
        sampled=Sampled(Sample(values, rank=producer(3))),
        progress=Progress(ranks={producer(3).producer_id: known}),
    ).runs
    (found,) = run.ranks
    assert (found.rank, found.pid, found.step, found.still_seconds) == (3, 4711, 5, 0.5)
    assert (found.step_seconds, found.score) == (0.25, 0.75)
    assert (found.cpu_percent, found.rss_bytes) == (50.0, 1e9)


def test_what_is_not_known_of_a_rank_is_left_out() -> None:
    (found,) = look(producer()).runs[0].ranks
    assert {field.name for field, _ in found.ListFields()} == {"producer_id", "pid"}


def test_a_run_has_its_last_attempt_only() -> None:
    (run,) = look(producer(0), producer(1, attempt=2)).runs
    assert (run.attempt, [one.rank for one in run.ranks]) == (2, [1])


def test_a_loss_is_shown_before_what_else_is_known() -> None:
    losses = {RUN_ID: {"aux_loss": [9.0], "train/loss": [float(i) for i in range(100)]}}
    (run,) = look(producer(), progress=Progress(losses=losses)).runs
    assert run.loss_key == "train/loss"
    assert list(run.losses) == [float(i) for i in range(100 - MAX_LOSSES, 100)]


def test_what_is_wrong_is_told_and_cut() -> None:
    standing = [Standing("hang", "run", "error", "y" * 1000, RUN_ID)] * 100
    answer = look(progress=Progress(standing=standing))
    assert len(answer.alarms) + answer.more_alarms == 100
    assert len(answer.alarms[0].message) == MAX_TEXT


def test_ranks_are_bounded_and_the_rest_is_counted() -> None:
    answer = look(*(rank(number, world_size=2000) for number in range(MAX_RANKS + 50)))
    assert (len(answer.runs[0].ranks), answer.more_ranks) == (MAX_RANKS, 50)


def test_of_too_many_runs_the_latest_are_listed() -> None:
    many = [
        rank(number, run_id=f"{number:032x}", start_time_ns=number)
        for number in range(MAX_RUNS + 3)
    ]
    answer = look(*many)
    assert (len(answer.runs), answer.more_ranks) == (MAX_RUNS, 3)
    assert answer.runs[0].run_id == many[-1].run_id


def test_gpus_are_bounded_and_the_rest_is_counted() -> None:
    answer = look(sampled=Sampled(gpus=[gpu(index) for index in range(MAX_GPUS + 2)]))
    assert (len(answer.gpus), answer.more_gpus) == (MAX_GPUS, 2)


def test_a_full_answer_is_a_message_that_clients_take() -> None:
    name = "ü" * 250
    ranks = [
        rank(number, run_id=f"{number % MAX_RUNS:032x}", run_name=name, experiment=name)
        for number in range(MAX_RANKS)
    ]
    events = RecentEvents()
    for info in ranks:
        for _ in range(MAX_EVENTS):
            events.take(event("ü" * 1000), info)
    answer = look(*ranks, events=events)
    # What gRPC takes by default, and what clients therefore ask for.
    assert answer.ByteSize() < 4 * 1024 * 1024


def test_events_are_those_of_runs_that_are_here() -> None:
    events = RecentEvents()
    events.take(event("second", TIME_NS + 1), producer(1))
    events.take(event("first"), producer(0))
    events.take(event("gone"), producer(0, run_id="f" * 32))
    told = look(producer(), events=events).events
    assert [(one.source, one.message, one.step) for one in told] == [
        ("rank 0", "first", 7),
        ("rank 1", "second", 7),
    ]


def test_the_latest_events_of_a_run_are_kept() -> None:
    events = RecentEvents()
    for number in range(MAX_EVENTS + 5):
        events.take(event(str(number)), producer())
    kept = [one.message for one in events.of([RUN_ID])]
    assert kept == [str(number) for number in range(5, MAX_EVENTS + 5)]


def test_events_of_runs_heard_of_long_ago_are_forgotten() -> None:
    events = RecentEvents()
    runs = [f"{number:032x}" for number in range(MAX_RUNS + 1)]
    for run_id in runs:
        events.take(event(), dataclasses.replace(producer(), run_id=run_id))
    assert len(events.of(runs)) == min(MAX_RUNS, MAX_ALL_EVENTS)
    assert events.of(runs[:1]) == []


def test_what_others_have_takes_nothing_from_what_one_sees() -> None:
    own = rank(0, run_id="a" * 32, start_time_ns=1)
    others = [
        rank(number, run_id=f"{number:032x}", start_time_ns=2) for number in range(1, MAX_RUNS + 4)
    ]
    events = RecentEvents()
    events.take(event("own"), own)
    for info in others[: MAX_RUNS // 2]:
        for _ in range(MAX_EVENTS):
            events.take(event("another's", TIME_NS + 1), info)
    standing = [Standing("hang", "run", "error", "another's", others[0].run_id)] * (MAX_ALARMS + 1)
    standing += [Standing("hang", "run", "error", "own", own.run_id)]
    standing += [Standing("disk", "root", "error", "the node's")]
    answer = look(
        own,
        *others,
        progress=Progress(standing=standing),
        events=events,
        sees=lambda producer_id: producer_id == own.producer_id,
    )
    assert [run.run_id for run in answer.runs] == [own.run_id]
    assert [one.message for one in answer.events] == ["own"]
    assert [one.message for one in answer.alarms] == ["own", "the node's"]
    assert (answer.more_ranks, answer.more_alarms) == (0, 0)


def test_a_run_of_which_a_rank_is_another_users_is_hidden() -> None:
    assert not look(rank(0), rank(1), sees=lambda producer_id: producer_id[-1] == 0).runs
