"""A run that its hub does not know holds up no other for long, and is lost no more than any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.agent.hubs import RunningHub
from tests.agent.leaves import NODE
from tests.agent.samples import losses, metrics, producer
from tests.agent.spools import OpenSpool
from tests.fakes import short_folder, wait_until
from trackagent.agent import tls, wire
from trackagent.agent.deadletters import DeadLetters, found, mark
from trackagent.agent.forwarding import Forwarding
from trackagent.agent.routes import Routes
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import Batch, ProducerInfo
from trackagent.client.hub import Hub

KNOWN, UNKNOWN = "a" * 32, "b" * 32
TOKENS = {KNOWN: "1" * 32, UNKNOWN: "2" * 32}


@pytest.fixture
def hub() -> Iterator[RunningHub]:
    """A hub that knows one of the runs."""
    one = RunningHub(short_folder())
    one.server.tokens.note(KNOWN, TOKENS[KNOWN])
    yield one
    one.close()


class Node:
    """An agent's part of forwarding to that hub; `now` is its time."""

    def __init__(self, spool: Spool, folder: Path, hub: RunningHub) -> None:
        self.spool, self.hub, self.letters, self.now = spool, hub, folder / "letters", 0.0
        spool.add_sink("store").result()
        self.routes = Routes(folder / "routes.db", folder / "quarantine")
        self.forwarding = Forwarding(
            spool,
            self.routes,
            node=NODE,
            interval_s=0.01,
            dead_letters=lambda sink: DeadLetters(self.letters, sink, max_bytes=1 << 30),
            connect=self._connect,
            clock=lambda: self.now,
        )
        self.forwarding.start()

    def _connect(self, address: str, pin: str) -> grpc.Channel:
        return tls.channel(address, pin=pin)

    def open(self, run_id: str, rank: int) -> ProducerInfo:
        named = Hub(self.hub.address, self.hub.server.pin, TOKENS[run_id])
        info = producer(rank, run_id=run_id, hub=self.forwarding.route(run_id, named))
        self.spool.open_producer(info, {}).result()
        return info

    def log(self, info: ProducerInfo, step: int) -> None:
        data = losses(range(0)) + metrics(0, step, 0.0, 0.0)
        at = self.spool.committed(info.producer_id).result().get(0, 0)
        self.spool.append(info.producer_id, 0, at, data).result()

    def is_refused(self) -> bool:
        (pipeline,) = self.forwarding.pipelines()
        return pipeline.state == "retrying" and UNKNOWN in pipeline.error

    def close(self) -> None:
        self.forwarding.stop(0.0)
        self.routes.close()


@pytest.fixture
def node(open_spool: OpenSpool, tmp_path: Path, hub: RunningHub) -> Iterator[Node]:
    one = Node(open_spool(), tmp_path, hub)
    yield one
    one.close()


@pytest.fixture
def steps(hub: RunningHub) -> Callable[[str], Counter[int]]:
    """steps(run): how often the hub took each step of the run."""

    def taken(run_id: str) -> Counter[int]:
        batches = [
            wire.decode(part.content, id_) for id_, (_, part) in hub.spool.parts.copy().items()
        ]
        return Counter(
            int(step)
            for batch in batches
            for points in batch.points
            if any(
                info.producer_id == points.producer_id and info.run_id == run_id
                for info in batch.producers
            )
            for step in points.steps
        )

    return taken


def test_a_run_that_its_hub_comes_to_know_was_only_late(
    node: Node, hub: RunningHub, steps: Callable[[str], Counter[int]]
) -> None:
    known, unknown = node.open(KNOWN, 2), node.open(UNKNOWN, 1)
    for step in range(3):
        node.log(unknown, step)
        node.log(known, step)
    wait_until(node.is_refused)
    hub.server.tokens.note(UNKNOWN, TOKENS[UNKNOWN])
    every = dict.fromkeys(range(3), 1)
    wait_until(lambda: (steps(UNKNOWN), steps(KNOWN)) == (every, every))
    assert found(node.letters) == []


def test_a_run_that_its_hub_does_not_know_is_set_aside_after_a_while(
    node: Node, hub: RunningHub, steps: Callable[[str], Counter[int]]
) -> None:
    known, unknown = node.open(KNOWN, 2), node.open(UNKNOWN, 1)
    for step in range(3):
        node.log(unknown, step)
        node.log(known, step)
    wait_until(node.is_refused)
    node.now = 3600.0
    every = dict.fromkeys(range(3), 1)
    wait_until(lambda: steps(KNOWN) == every)
    assert steps(UNKNOWN) == {}
    hub.server.tokens.note(UNKNOWN, TOKENS[UNKNOWN])
    node.log(known, 3)
    wait_until(lambda: steps(KNOWN) == {**every, 3: 1})
    for letter in found(node.letters):
        assert letter.producer == unknown
        assert f"this token of the run {UNKNOWN}" in letter.reason
        mark(letter)
    wait_until(lambda: found(node.letters) == [])
    assert steps(UNKNOWN) == every


def test_a_run_that_its_hub_has_forgotten_keeps_no_other_from_hearing_of_a_loss(
    open_spool: OpenSpool, tmp_path: Path
) -> None:
    base = short_folder()
    hub = RunningHub(base)
    for run_id, token in TOKENS.items():
        hub.server.tokens.note(run_id, token)
    node = Node(open_spool(), tmp_path, hub)
    for rank, run_id in enumerate(TOKENS):
        node.log(node.open(run_id, rank), 0)
    wait_until(lambda: sum(len(batch.points) for batch in said(hub)) == 2)
    node.close()
    hub.close()
    hub.config.tokens_path.unlink()
    hub = RunningHub(base)
    hub.server.tokens.note(KNOWN, TOKENS[KNOWN])
    node = Node(node.spool, tmp_path, hub)
    node.log(node.open(KNOWN, 2), 1)
    wait_until(node.is_refused)
    node.now = 3600.0
    wait_until(lambda: [len(batch.points) for batch in said(hub)] == [0, 1])
    (event,) = said(hub)[0].events
    assert "does not have any more what it had accepted" in event.message
    node.close()
    hub.close()


def said(hub: RunningHub) -> list[Batch]:
    """What a hub was sent, in that order."""
    return [wire.decode(part.content, id_) for id_, (_, part) in hub.spool.parts.copy().items()]


def test_a_newer_run_that_a_hub_does_not_know_keeps_nobody_from_asking_it(
    node: Node, steps: Callable[[str], Counter[int]]
) -> None:
    known = node.open(KNOWN, 2)
    node.log(known, 0)
    wait_until(lambda: steps(KNOWN) == {0: 1})
    node.open(UNKNOWN, 1)
    node.forwarding.stop(0.0)
    node.log(known, 1)
    again = Node(node.spool, node.letters.parent, node.hub)
    wait_until(lambda: steps(KNOWN) == {0: 1, 1: 1})
    again.close()
