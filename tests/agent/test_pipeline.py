"""The pipeline: accepted, rejected or kept, in order, and nobody waits for a slow neighbour."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable

import pytest

from tests.agent.samples import Connections, losses, metrics, producer
from tests.agent.sinks import FakeSink, GatheringSink
from tests.fakes import DEADLINE_S, wait_until
from trackagent.agent import pipeline as pipeline_module
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.spool import Spool

ID = producer().producer_id


Start = Callable[..., Pipeline]


def append(spool: Spool, *steps: int) -> None:
    """One batch with the loss at these steps."""
    data = losses(range(0)) + b"".join(metrics(0, step, 0.0, 0.0) for step in steps)
    spool.append(ID, 0, spool.committed(ID).result().get(0, 0), data).result()


def left(spool: Spool) -> int:
    """Batches that wait in the spool."""
    return int(spool.statistics().result()["batches"])


# --- accepted


def test_what_is_appended_reaches_the_sink(spool: Spool, start: Start) -> None:
    sink = FakeSink()
    start(sink)
    append(spool, 1, 2)
    wait_until(lambda: sink.steps == [1, 2])


def test_what_was_spooled_before_reaches_the_sink(spool: Spool, start: Start) -> None:
    append(spool, 1)
    sink = FakeSink()
    start(sink)
    wait_until(lambda: sink.steps == [1])


def test_what_is_accepted_is_deleted_from_the_spool(spool: Spool, start: Start) -> None:
    append(spool, 1)
    start(FakeSink())
    wait_until(lambda: left(spool) == 0)


def test_batches_are_delivered_in_order_and_once(
    spool: Spool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "DELIVERY_BYTES", 1)
    sink = FakeSink()
    start(sink)
    for step in range(30):
        append(spool, step)
    wait_until(lambda: left(spool) == 0)
    assert sink.steps == list(range(30))


def test_records_that_arrive_within_the_interval_go_together(spool: Spool, start: Start) -> None:
    sink = FakeSink()
    pipeline = start(sink, interval_s=3600)
    append(spool, 1)
    wait_until(lambda: sink.steps == [1])
    append(spool, 2)
    append(spool, 3)
    pipeline.stop(DEADLINE_S)
    assert [batch.points[0].steps.tolist() for batch in sink.accepted] == [[1], [2, 3]]


def test_a_sink_may_want_more_to_go_together(spool: Spool, start: Start) -> None:
    sink = GatheringSink()
    pipeline = start(sink)
    append(spool, 1)
    wait_until(lambda: sink.steps == [1])
    append(spool, 2)
    append(spool, 3)
    pipeline.stop(DEADLINE_S)
    assert [batch.points[0].steps.tolist() for batch in sink.accepted] == [[1], [2, 3]]


def test_stopping_does_not_wait_for_the_interval(spool: Spool, start: Start) -> None:
    sink = FakeSink()
    pipeline = start(sink, interval_s=3600)
    append(spool, 1)
    wait_until(lambda: sink.steps == [1])
    append(spool, 2)
    pipeline.stop(DEADLINE_S)
    assert sink.steps == [1, 2]


# --- kept


def test_any_exception_keeps_the_delivery_and_tries_it_again(spool: Spool, start: Start) -> None:
    sink = FakeSink("fake", OSError("no network"), ValueError("odd"))
    start(sink)
    append(spool, 1)
    wait_until(lambda: sink.steps == [1])
    assert len(sink.tried) == 3


def test_a_delivery_is_tried_again_with_the_same_id_and_content(spool: Spool, start: Start) -> None:
    sink = FakeSink("fake", OSError("no network"))
    sink.gate.clear()
    start(sink)
    append(spool, 1)
    wait_until(lambda: len(sink.tried) == 1)
    append(spool, 2)
    sink.gate.set()
    wait_until(lambda: sink.steps == [1, 2])
    assert [batch.id for batch in sink.tried[:2]] == [sink.tried[0].id] * 2
    assert sink.accepted[0].points[0].steps.tolist() == [1]


def test_what_comes_after_a_kept_delivery_waits_for_it(spool: Spool, start: Start) -> None:
    sink = FakeSink("fake", *[OSError("no network")] * 3)
    start(sink)
    append(spool, 1)
    append(spool, 2)
    wait_until(lambda: left(spool) == 0)
    assert sink.steps == [1, 2]


def test_a_kept_delivery_is_seen(spool: Spool, start: Start) -> None:
    pipeline = start(FakeSink("fake", *[OSError("no network")] * 100))
    append(spool, 1)
    wait_until(lambda: pipeline.state == "retrying")
    assert pipeline.error == "OSError: no network"


def test_an_error_is_seen_no_longer_once_the_delivery_is_accepted(
    spool: Spool, start: Start
) -> None:
    pipeline = start(FakeSink("fake", OSError("no network")))
    append(spool, 1)
    wait_until(lambda: left(spool) == 0)
    wait_until(lambda: pipeline.state == "idle")
    assert pipeline.error == ""


def test_a_delivery_under_way_is_seen(spool: Spool, start: Start) -> None:
    sink = FakeSink()
    sink.gate.clear()
    pipeline = start(sink)
    append(spool, 1)
    wait_until(lambda: sink.tried)
    assert pipeline.state == "delivering"


def test_attempts_grow_apart(spool: Spool, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(Pipeline, "_pause", lambda self, seconds: pauses.append(seconds))
    monkeypatch.setattr(pipeline_module.random, "uniform", lambda low, high: high)
    sink = FakeSink("fake", *[OSError("no network")] * 11)
    start(sink)
    append(spool, 1)
    wait_until(lambda: sink.accepted)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]


@pytest.fixture
def told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[], list[str]]:
    """What the log has of the pipeline, which makes no pauses."""
    monkeypatch.setattr(Pipeline, "_pause", lambda self, seconds: None)
    caplog.set_level(logging.INFO, pipeline_module.__name__)
    return lambda: [re.sub(r"\d+ s\b", "N s", one) for one in caplog.messages]


def test_a_reason_is_told_once_and_when_it_is_over(
    spool: Spool, start: Start, told: Callable[[], list[str]]
) -> None:
    away, odd = OSError("no network"), ValueError("odd")
    pipeline = start(FakeSink("fake", away, away, odd, away, odd))
    append(spool, 1)
    wait_until(lambda: pipeline.accepted_ns)
    pipeline.stop(DEADLINE_S)
    assert told() == [
        "sink fake: OSError: no network; trying again",
        "sink fake: ValueError: odd; trying again (3 times in N s)",
        "sink fake goes on after 5 failures in N s",
    ]


def test_a_reason_that_lasts_is_told_again(
    spool: Spool,
    start: Start,
    told: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline_module, "TELL_AGAIN_S", 0.0)
    pipeline = start(FakeSink("fake", *[OSError("no network")] * 3))
    append(spool, 1)
    wait_until(lambda: pipeline.accepted_ns)
    assert told()[:3] == [
        "sink fake: OSError: no network; trying again",
        "sink fake: OSError: no network; trying again (2 times in N s)",
        "sink fake: OSError: no network; trying again (3 times in N s)",
    ]


@pytest.mark.parametrize("statement", ["UPDATE sinks SET planned", "UPDATE sinks SET cursor"])
def test_a_fault_of_the_spool_does_not_end_the_pipeline(
    open_spool: Callable[..., Spool], start: Start, statement: str
) -> None:
    connections = Connections()
    spool = open_spool(connect=connections)
    spool.open_producer(producer(), {}).result()
    connections.last.failing = statement
    sink = FakeSink()
    pipeline = start(sink, source=spool)
    append(spool, 1)
    wait_until(lambda: pipeline.state == "retrying")
    connections.last.failing = None
    wait_until(lambda: left(spool) == 0)
    assert {batch.id for batch in sink.accepted} == {sink.accepted[0].id}


# --- several sinks


def test_a_slow_sink_holds_no_other_up(spool: Spool, start: Start) -> None:
    slow, quick = FakeSink("slow"), FakeSink("quick")
    slow.gate.clear()
    start(slow)
    start(quick)
    for step in range(5):
        append(spool, step)
    wait_until(lambda: quick.steps == list(range(5)))
    assert slow.accepted == []


def test_every_sink_gets_everything(spool: Spool, start: Start) -> None:
    sinks = [FakeSink("one"), FakeSink("two", OSError("once"))]
    for sink in sinks:
        start(sink)
    for step in range(5):
        append(spool, step)
    wait_until(lambda: left(spool) == 0)
    assert [sink.steps for sink in sinks] == [list(range(5))] * 2


# --- between deliveries


def test_an_idle_sink_may_work(start: Start) -> None:
    sink = FakeSink()
    start(sink)
    wait_until(lambda: sink.idle_calls == 1)


def test_an_idle_sink_works_for_as_long_as_it_has_work(spool: Spool, start: Start) -> None:
    sink = FakeSink()
    sink.idle_work = 5
    start(sink)
    append(spool, 1)
    wait_until(lambda: sink.steps == [1])
    wait_until(lambda: sink.idle_work <= 0)
    assert sink.idle_calls >= 5


def test_a_sink_with_deliveries_to_come_does_not_do_other_work(
    spool: Spool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "DELIVERY_BYTES", 1)
    for step in range(10):
        append(spool, step)
    sink = FakeSink()
    calls: list[int] = []
    monkeypatch.setattr(sink, "idle", lambda deadline_s: calls.append(len(sink.accepted)))
    start(sink)
    wait_until(lambda: calls)
    assert calls == [10]


def test_work_that_fails_between_deliveries_harms_no_delivery(
    spool: Spool, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    sink = FakeSink()
    sink.idle_problem = RuntimeError("bad compaction")
    start(sink)
    wait_until(lambda: sink.idle_calls == 1)
    append(spool, 1)
    wait_until(lambda: sink.steps == [1])
    assert "sink fake: its work between deliveries failed" in caplog.text


def test_work_that_fails_is_not_repeated_before_the_next_delivery(
    spool: Spool, start: Start
) -> None:
    sink = FakeSink()
    sink.idle_problem = RuntimeError("bad compaction")
    start(sink)
    append(spool, 1)
    wait_until(lambda: left(spool) == 0)
    wait_until(lambda: sink.idle_calls >= 1)
    assert sink.idle_calls <= 2


# --- stopping


def test_stopping_delivers_what_is_spooled(spool: Spool, start: Start) -> None:
    sink = FakeSink()
    sink.gate.clear()
    pipeline = start(sink)
    append(spool, 1)
    wait_until(lambda: sink.tried)
    append(spool, 2)
    sink.gate.set()
    pipeline.stop(DEADLINE_S)
    assert sink.steps == [1, 2]


def test_stopping_closes_the_sink(start: Start) -> None:
    sink = FakeSink()
    pipeline = start(sink)
    pipeline.stop(DEADLINE_S)
    assert (sink.closed, pipeline.state) == (True, "stopped")


@pytest.mark.parametrize("timeout_s", [0.0, 0.3])
def test_stopping_is_bounded_when_the_sink_refuses(
    spool: Spool, start: Start, timeout_s: float
) -> None:
    pipeline = start(FakeSink("fake", *[OSError("no network")] * 1000))
    append(spool, 1)
    wait_until(lambda: pipeline.state == "retrying")
    began = time.monotonic()
    pipeline.stop(timeout_s)
    assert time.monotonic() - began < timeout_s + DEADLINE_S


def test_stopping_is_bounded_when_the_sink_is_slow(
    spool: Spool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "DELIVERY_BYTES", 1)
    sink = FakeSink()
    sink.gate.clear()
    pipeline = start(sink)
    for step in range(200):
        append(spool, step)
    wait_until(lambda: sink.tried)
    monkeypatch.setattr(sink, "deliver", lambda batch: threading.Event().wait(0.05))
    sink.gate.set()
    pipeline.stop(0.2)
    assert 0 < left(spool) < 200


def test_what_was_not_delivered_before_the_end_stays_spooled(spool: Spool, start: Start) -> None:
    pipeline = start(FakeSink("fake", *[OSError("no network")] * 1000))
    append(spool, 1)
    wait_until(lambda: pipeline.state == "retrying")
    pipeline.stop(0)
    assert left(spool) == 1


def test_the_next_pipeline_delivers_the_rest_with_the_same_id(spool: Spool, start: Start) -> None:
    first = FakeSink("fake", *[OSError("no network")] * 1000)
    pipeline = start(first)
    append(spool, 1)
    wait_until(lambda: pipeline.state == "retrying")
    pipeline.stop(0)
    append(spool, 2)
    second = FakeSink()
    start(second)
    wait_until(lambda: second.steps == [1, 2])
    assert second.accepted[0].id == first.tried[0].id


def test_being_told_to_stop_tries_again_at_once(
    spool: Spool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "FIRST_BACKOFF_S", 3600.0)
    sink = FakeSink("fake", OSError("no network"))
    pipeline = start(sink)
    append(spool, 1)
    wait_until(lambda: pipeline.state == "retrying")
    pipeline.stop(DEADLINE_S)
    assert sink.steps == [1]
