"""Delivery: everything reaches the agent, however often the connection or the agent breaks."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import grpc
import pytest

from tests.fakes import DEADLINE_S, FakeAgent, Folders, Refusal, wait_until
from trackagent.client import record, sender
from trackagent.client.config import ClientConfig
from trackagent.client.journal import Journal
from trackagent.client.record import Kind
from trackagent.client.sender import Sender
from trackagent.protos.v1 import agent_pb2

PRODUCER = {
    "producer_id": uuid4().hex,
    "run_id": "ab" * 16,
    "attempt": 2,
    "rank": 3,
    "local_rank": 1,
    "world_size": 8,
    "node": "node-a",
    "pid": 4711,
    "start_time_ns": 1_700_000_000_000_000_000,
    "experiment": "sending",
    "run_name": "first",
    "forked": False,
}


class Producer:
    """A journal and its sender, as a run has them."""

    def __init__(self, config: ClientConfig) -> None:
        self.housekept = 0
        self.written: dict[int, bytes] = {}
        self.sender = Sender(PRODUCER, config, self.housekeep)
        self.journal = Journal(
            PRODUCER,
            directory=config.directory,
            state_directory=config.state_directory,
            segment_bytes=config.segment_bytes,
            memory_bytes=config.memory_bytes,
            journal_bytes=config.journal_bytes,
            wake=self.sender.wake,
        )
        self.sender.start(self.journal)

    def housekeep(self) -> None:
        self.housekept += 1

    def write(self, records: int, size: int = 1024) -> None:
        for _ in range(records):
            data = record.encode(Kind.EVENT, b"x" * (size - 32), step=0, time_ns=0)
            lane = self.journal.take()
            self.journal.write(lane, data)
            self.journal.give(lane)
            self.written[lane.number] = self.written.get(lane.number, b"") + data

    def end(self, timeout_s: float = 10.0) -> bool:
        """Drains; whether everything was delivered."""
        try:
            return self.sender.drain(time.monotonic() + timeout_s)
        finally:
            self.journal.seal(0.0, "over")
            self.journal.close(remove=self.sender.ended)


@pytest.fixture
def agent(folders: Folders) -> Iterator[FakeAgent]:
    fake = FakeAgent(folders.socket)
    yield fake
    fake.stop()
    assert fake.problems == []


@pytest.fixture
def start(
    folders: Folders, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Producer]]:
    """start(**settings): a producer whose agent is `agent`."""
    monkeypatch.setattr(sender, "GRACE_S", 0.0)
    monkeypatch.setattr(sender, "MAX_BACKOFF_S", 0.2)
    begun: list[Producer] = []
    config = ClientConfig(
        directory=folders.directory,
        state_directory=folders.state,
        agent=f"unix:{folders.socket}",
        flush_interval_s=0.01,
        segment_bytes=64 * 1024,
    )

    def begin(**settings: Any) -> Producer:
        begun.append(Producer(dataclasses.replace(config, **settings)))
        return begun[-1]

    yield begin
    for producer in begun:
        producer.end(0.0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "trackagent"]


# --- the good case


def test_the_agent_gets_the_bytes_of_the_journal(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.start()
    producer = start()
    producer.write(500)
    assert producer.end() is True
    assert agent.received == producer.written


def test_the_agent_is_told_who_sends(agent: FakeAgent, start: Callable[..., Producer]) -> None:
    agent.start()
    start().end()
    (request,) = agent.opened
    expected = {**PRODUCER, "producer_id": bytes.fromhex(PRODUCER["producer_id"])}  # type: ignore[arg-type]
    assert request.producer == agent_pb2.Producer(**expected)
    assert request.protocol_version == 1
    assert not request.HasField("hub")


def test_the_agent_is_told_the_end(agent: FakeAgent, start: Callable[..., Producer]) -> None:
    agent.start()
    producer = start()
    producer.write(10)
    producer.end()
    (request,) = agent.closed
    ends = {one.lane: one.offset for one in request.ends if one.offset}
    assert ends == {lane: len(data) for lane, data in producer.written.items()}


def test_records_arrive_while_training_goes_on(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.start()
    producer = start()
    producer.write(10)
    wait_until(lambda: agent.received == producer.written)


def test_acknowledged_segments_are_freed(
    agent: FakeAgent, start: Callable[..., Producer], folders: Folders
) -> None:
    agent.start()
    producer = start()
    producer.write(600)  # about ten segments
    wait_until(lambda: len(list(folders.directory.glob("journals/*/*.seg"))) <= 3)


def test_no_batch_is_larger_than_the_agent_takes(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.max_batch_bytes = 4096
    agent.start()
    producer = start()
    producer.write(300)
    assert producer.end() is True
    assert agent.received == producer.written  # the fake objects to larger ones


def test_housekeeping_is_called_again_and_again(start: Callable[..., Producer]) -> None:
    producer = start()
    wait_until(lambda: producer.housekept > 5)


def test_a_wake_is_heard_before_the_interval_ends(start: Callable[..., Producer]) -> None:
    producer = start(flush_interval_s=3600.0)
    producer.sender.wake()
    wait_until(lambda: producer.housekept == 1)


def test_wakes_that_come_together_are_one(start: Callable[..., Producer]) -> None:
    producer = start(flush_interval_s=3600.0)
    for _ in range(100):
        producer.sender.wake()
    wait_until(lambda: producer.housekept >= 1)
    producer.end(0.0)
    assert producer.housekept < 100


# --- what is not acknowledged is sent again


def test_what_a_broken_connection_left_unacknowledged_is_not_lost(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.break_after = 3
    agent.max_batch_bytes = 4096
    agent.start()
    producer = start()
    producer.write(200)
    wait_until(lambda: len(agent.opened) >= 5)
    agent.break_after = None
    assert producer.end() is True
    assert agent.received == producer.written


def test_after_a_break_sending_goes_on_where_the_agent_is(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.acknowledge = False
    agent.start()
    producer = start()
    producer.write(20)
    wait_until(lambda: agent.received == producer.written)
    agent.stop()
    sent = len(agent.batches)
    agent.acknowledge = True
    agent.start()
    assert producer.end() is True
    assert agent.batches[sent:] == []  # OpenRun's answer said it all


def test_an_agent_that_has_lost_everything_gets_what_is_still_held(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.start()
    producer = start()
    producer.write(100)
    wait_until(lambda: producer.journal.delivered)
    agent.stop()
    lost = agent.received
    agent.lanes.clear()
    producer.write(100)
    agent.start()
    assert producer.end() is True
    received = {lane: lost[lane] + data[len(lost[lane]) :] for lane, data in agent.received.items()}
    assert received == producer.written


def test_an_agent_that_starts_late_gets_everything(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    producer = start()
    producer.write(300)
    wait_until(lambda: producer.housekept > 3)
    agent.start()
    wait_until(lambda: agent.received == producer.written)


def test_an_agent_that_restarts_in_the_middle_of_logging_gets_everything(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.start()
    producer = start()
    done = threading.Event()

    def restart() -> None:
        while not done.is_set():
            agent.stop()
            agent.start()
            wait_until(lambda: len(agent.batches) > seen or done.is_set())

    seen = 0
    thread = threading.Thread(target=restart)
    thread.start()
    for _ in range(50):
        producer.write(20)
        seen = len(agent.batches)
    done.set()
    thread.join()
    assert producer.end() is True
    assert agent.received == producer.written


@pytest.mark.parametrize(
    ("lane", "offset"), [(0, 2**40), (1, 2**40), (63, 8), (255, 2**40)], ids=str
)
def test_a_false_acknowledgement_breaks_nothing(
    agent: FakeAgent, start: Callable[..., Producer], lane: int, offset: int
) -> None:
    agent.extra_answers = [agent_pb2.PushResponse(lane=lane, offset=offset)]
    agent.start()
    producer = start()
    producer.write(10)
    wait_until(lambda: not agent.extra_answers)
    producer.write(10)
    wait_until(lambda: agent.received == producer.written)


# --- bounds


def test_what_is_in_flight_is_bounded(
    agent: FakeAgent, start: Callable[..., Producer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "MAX_IN_FLIGHT_BYTES", 256 * 1024)
    agent.acknowledge = False
    agent.start()
    producer = start()
    producer.write(1000)
    wait_until(lambda: producer.journal.in_flight >= 256 * 1024)
    seen = producer.housekept
    wait_until(lambda: producer.housekept > seen + 5)
    assert producer.journal.in_flight < (256 + 64) * 1024


def test_the_end_is_bounded_when_nothing_is_acknowledged(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.acknowledge = False
    agent.start()
    producer = start()
    producer.write(10)
    begin = time.monotonic()
    assert producer.end(0.5) is False
    assert 0.5 <= time.monotonic() - begin < DEADLINE_S


def test_the_end_is_bounded_when_the_agent_never_has_everything(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.complete = False
    agent.start()
    producer = start()
    producer.write(10)
    begin = time.monotonic()
    producer.end(0.5)
    assert 0.5 <= time.monotonic() - begin < DEADLINE_S


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_journal_stays_for_the_agent_to_find_when_it_has_not_confirmed_the_end(
    agent: FakeAgent, folders: Folders, start: Callable[..., Producer], confirmed: bool
) -> None:
    if not confirmed:
        agent.refuse_close = Refusal(grpc.StatusCode.UNAVAILABLE, "killed by the test")
    agent.start()
    producer = start()
    producer.write(3)
    assert producer.end()
    assert (folders.journals() == []) is confirmed


def test_the_end_waits_for_no_agent_that_is_not_there(start: Callable[..., Producer]) -> None:
    producer = start()
    producer.write(10)
    begin = time.monotonic()
    assert producer.end(10 * DEADLINE_S) is False
    assert time.monotonic() - begin < DEADLINE_S


def test_an_agent_that_refuses_batches_is_not_hammered(
    agent: FakeAgent, start: Callable[..., Producer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "MAX_BACKOFF_S", 5.0)
    agent.refuse_push = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "the spool is full")
    agent.start()
    producer = start()
    producer.write(10)
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() - begin > 1.0)
    assert 1 < len(agent.opened) <= 8


def test_an_agent_that_refuses_batches_for_a_while_gets_everything(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.refuse_push = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "the spool is full")
    agent.start()
    producer = start()
    producer.write(10)
    wait_until(lambda: len(agent.opened) >= 3)
    agent.refuse_push = None
    wait_until(lambda: agent.received == producer.written)


# --- what people are told


def test_that_no_agent_is_there_is_said_once(
    start: Callable[..., Producer], folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    producer = start()
    wait_until(lambda: producer.housekept > 50)
    assert warnings(caplog) == [
        f"no agent listens at unix:{folders.socket}: records are kept in {folders.directory} and delivered "
        "when one starts; run `trackagent start` on this node"
    ]


def test_an_agent_that_comes_within_the_grace_is_not_missed(
    agent: FakeAgent,
    start: Callable[..., Producer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sender, "GRACE_S", 60.0)
    producer = start()
    wait_until(lambda: producer.housekept > 10)
    agent.start()
    assert producer.end() is True
    assert warnings(caplog) == []


def test_a_refusal_is_said_once_in_the_agents_words(
    agent: FakeAgent,
    start: Callable[..., Producer],
    folders: Folders,
    caplog: pytest.LogCaptureFixture,
) -> None:
    agent.refuse_open = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "install the same trackagent")
    agent.start()
    start()
    wait_until(lambda: len(agent.opened) >= 4)
    assert warnings(caplog) == [
        f"the agent at unix:{folders.socket} refuses this process: install the same trackagent"
    ]


def test_an_agent_that_refuses_does_not_hold_up_the_end(
    agent: FakeAgent, start: Callable[..., Producer]
) -> None:
    agent.refuse_open = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "install the same trackagent")
    agent.start()
    producer = start()
    producer.write(10)
    begin = time.monotonic()
    assert producer.end(10 * DEADLINE_S) is False
    assert time.monotonic() - begin < DEADLINE_S


def test_refused_batches_are_said_once_in_the_agents_words(
    agent: FakeAgent, start: Callable[..., Producer], caplog: pytest.LogCaptureFixture
) -> None:
    agent.refuse_push = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "the spool is full")
    agent.start()
    producer = start()
    producer.write(10)
    wait_until(lambda: len(agent.opened) >= 4)
    assert warnings(caplog) == ["the agent ended the connection: the spool is full"]


def test_a_failure_in_housekeeping_stops_no_delivery(
    agent: FakeAgent,
    start: Callable[..., Producer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    failures = iter([OSError("first"), OSError("second")])

    def housekeep(self: Producer) -> None:
        self.housekept += 1
        for error in failures:
            raise error

    monkeypatch.setattr(Producer, "housekeep", housekeep)
    agent.start()
    producer = start()
    producer.write(10)
    wait_until(lambda: agent.received == producer.written)
    assert warnings(caplog)[0] == "sending failed (OSError('first')); trying again"


def test_after_the_end_no_thread_is_left(agent: FakeAgent, start: Callable[..., Producer]) -> None:
    agent.start()
    producer = start()
    producer.write(10)
    producer.end()
    names = [thread.name for thread in threading.enumerate()]
    assert [name for name in names if name.startswith("trackagent")] == []
