"""Collectors run beside each other: one that fails or hangs is told of, left alone and asked again, and holds
no other up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.agent.collect.gpus import hopper
from tests.agent.collect.sampled import Hanging, Sink, Told, here
from tests.agent.samples import producer
from tests.agent.spools import ID
from tests.fakes import wait_until
from tests.fakes_nvml import fake_nvml
from trackagent.agent.active import Active
from trackagent.agent.collect.contract import Collector, Here, Incident, Sample, Unavailable
from trackagent.agent.collect.nvml import Nvml
from trackagent.agent.collect.recorder import Recorder
from trackagent.agent.collect.sampler import Latest, Sampler
from trackagent.agent.spool import Spool

START = Callable[..., Sampler]
KEY = "system/cpu/percent"
S = 10**9


@pytest.fixture
def started(spool: Spool) -> Iterator[START]:
    """started(name=collector, ...): a sampler with these, which samples every second at most."""
    with contextlib.ExitStack() as ends:

        def start(
            patience_s: float = 5.0,
            backoff_s: float = 0.05,
            **collectors: Told | Callable[..., Collector],
        ) -> Sampler:
            makes = {
                name: one.make if isinstance(one, Told) else one for name, one in collectors.items()
            }
            sampler = Sampler(
                dict.fromkeys(makes, 1.0),
                Here(),
                Active(spool),
                Recorder(spool, "a", hold_s=0.0),
                makes=makes,
                patience_s=patience_s,
                backoff_s=backoff_s,
            )
            sampler.start()
            ends.callback(sampler.stop)
            for one in collectors.values():
                if isinstance(one, Hanging):
                    ends.callback(one.let_go.set)
            return sampler

        yield start


def well() -> Sequence[Sample | Incident]:
    return [Sample({KEY: 1.0})]


def broken() -> Sequence[Sample | Incident]:
    raise RuntimeError("the driver is gone")


@pytest.fixture
def sink(spool: Spool) -> Sink:
    return Sink(spool)


def test_what_is_sampled_can_be_looked_at(started: START) -> None:
    sampler = started(system=Told(well))
    latest = wait_until(lambda: sampler.latest().get("system"))
    assert latest.samples == (Sample({KEY: 1.0}),)
    assert sampler.states()["system"].state == "on"


def test_what_is_read_rarely_is_shown_beside_what_is_read_every_time() -> None:
    first = Latest(0, ()).then(10 * S, [Sample({"a": 1.0}, gpu="0"), Sample({"b": 2.0}, gpu="0")])
    second = first.then(11 * S, [Sample({"a": 3.0}, gpu="0")])
    assert (second.time_ns, second.samples) == (
        11 * S,
        (Sample({"a": 3.0, "b": 2.0}, gpu="0"),),
    )
    assert second.then(101 * S, [Sample({"a": 4.0}, gpu="0")]).samples == (
        Sample({"a": 4.0}, gpu="0"),
    )


def test_a_source_that_is_gone_is_not_shown() -> None:
    gpus = [Sample({"a": 1.0}, gpu=gpu) for gpu in ("0", "1")]
    assert Latest(0, ()).then(10 * S, gpus).then(11 * S, gpus[1:]).samples == (gpus[1],)
    assert Latest(0, ()).then(10 * S, gpus).then(11 * S, []).samples == ()


def test_the_gpus_that_a_collector_knows_can_be_looked_at(started: START) -> None:
    sampler = started(
        system=Told(well),
        gpu=lambda here: Nvml(library=fake_nvml([hopper(0), hopper(1)])),
    )
    wait_until(lambda: [one.gpu for one in sampler.gpus()] == ["0", "1"])


@pytest.mark.usefixtures("opened")
def test_with_a_run_here_it_is_recorded(sink: Sink, started: START) -> None:
    started(system=Told(well))
    assert set(wait_until(lambda: sink.take().values)) == {("node a", KEY)}


def test_with_nobody_here_nothing_is_recorded(spool: Spool, started: START) -> None:
    sampler = started(system=Told(well))
    wait_until(sampler.latest)
    sampler.stop()
    assert here(spool) == []


def test_a_run_that_comes_is_sampled_soon(spool: Spool, sink: Sink, started: START) -> None:
    sampler = started(system=Told(well))
    wait_until(sampler.latest)
    spool.open_producer(producer(), {}).result()
    # With nobody here, the next sample would be 15 s away.
    wait_until(lambda: sink.take().values, timeout_s=10.0)


def test_what_is_not_there_is_off_with_its_reason(started: START) -> None:
    def nothing(here: Here) -> Collector:
        raise Unavailable("no InfiniBand here: /sys/class/infiniband is missing")

    sampler = started(infiniband=nothing, system=Told(well))
    wait_until(lambda: sampler.states()["infiniband"].state == "off")
    assert sampler.states()["infiniband"].reason.startswith("no InfiniBand here")
    wait_until(lambda: sampler.states()["system"].state == "on")


@pytest.mark.usefixtures("opened")
def test_one_that_fails_is_told_of_once_and_the_others_go_on(sink: Sink, started: START) -> None:
    failing = Told(broken)
    sampler = started(gpu=failing, system=Told(well))
    wait_until(lambda: failing.asked > 2 and sink.take().values)
    assert sampler.states()["gpu"].state == "failing"
    assert sampler.states()["gpu"].reason == "RuntimeError: the driver is gone"
    (event,) = sink.events
    assert (event.producer_id, event.level) == (ID, "warning")
    assert event.message.startswith("collector gpu is disabled: RuntimeError: the driver is gone")
    assert event.data == {"collector": "gpu", "reason": "RuntimeError: the driver is gone"}
    assert sampler.states()["system"].state == "on"


@pytest.mark.usefixtures("opened")
def test_one_that_works_again_is_told_of(sink: Sink, started: START) -> None:
    failing = Told(broken)
    sampler = started(gpu=failing)
    wait_until(lambda: sampler.states()["gpu"].state == "failing")
    failing.answer = well
    wait_until(lambda: sink.take().values)
    assert [event.message for event in sink.events][1:] == ["collector gpu works again"]
    assert sampler.states()["gpu"].state == "on"


@pytest.mark.usefixtures("opened")
def test_one_that_hangs_is_told_of_and_the_others_go_on(sink: Sink, started: START) -> None:
    hanging = Hanging()
    sampler = started(patience_s=0.2, gpu=hanging, system=Told(well))
    wait_until(lambda: sampler.states()["gpu"].state == "failing" and sink.take().values)
    assert sampler.states()["gpu"].reason == "no answer for 0.2 s"
    assert [event.data["collector"] for event in sink.take().events] == ["gpu"]
    hanging.answer = well
    hanging.let_go.set()
    wait_until(lambda: sampler.states()["gpu"].state == "on")


def test_one_that_cannot_even_be_made_is_tried_again(started: START) -> None:
    tries: list[Here] = []

    def make(here: Here) -> Collector:
        tries.append(here)
        if len(tries) < 3:
            raise OSError("the driver starts")
        return Told(well)

    sampler = started(gpu=make)
    wait_until(lambda: sampler.states()["gpu"].state == "on")
    assert len(tries) == 3


@pytest.mark.usefixtures("opened")
def test_one_whose_samples_are_none_is_told_of_and_tried_again(sink: Sink, started: START) -> None:
    collector = Told(lambda: [Sample({KEY: "hot"})])  # type: ignore[dict-item]
    sampler = started(gpu=collector)
    wait_until(lambda: sampler.states()["gpu"].state == "failing" and collector.asked > 1)
    assert sampler.states()["gpu"].reason.startswith("what it sampled cannot be kept: ")
    assert [event.data["collector"] for event in sink.take().events] == ["gpu"]


@pytest.mark.usefixtures("opened")
def test_an_incident_is_told_to_the_runs_here(sink: Sink, started: START) -> None:
    xid = Incident("error", "GPU 0 reports XID 79", {"xid": 79})
    collector = Told(lambda: [xid] if collector.asked == 1 else [])
    started(gpu=collector)
    told = wait_until(lambda: sink.take().events)
    assert [(event.level, event.message) for event in told] == [("error", "GPU 0 reports XID 79")]


def test_what_is_sampled_of_a_rank_ends_soon_after_it(opened: Spool, started: START) -> None:
    started(processes=Told(lambda: [Sample({"process/threads": 1.0}, rank=producer())]))
    wait_until(lambda: [info for info in here(opened) if info.sampled])
    opened.end_producer(ID).result()
    wait_until(lambda: here(opened) == [])
