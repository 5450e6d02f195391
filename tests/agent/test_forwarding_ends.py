"""When a hub is let go: once nobody here delivers to it, and not before it has everything."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.agent.leaves import HubServer, Leaf, node_samples
from tests.agent.samples import producer
from tests.agent.spools import OpenSpool
from tests.fakes import DEADLINE_S, wait_until
from trackagent.agent.spool import Spool, SpoolError
from trackagent.agent.store.contract import ProducerInfo


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer(tmp_path / "hub")
    yield server
    server.close()


def test_a_hub_that_nobody_delivers_to_any_more_is_let_go(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer
) -> None:
    leaf = Leaf(open_spool(), tmp_path, hub, idle_s=0.05)
    leaf.forwarding.start()
    info = leaf.open()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    assert any(name.startswith("hub-") for name in leaf.spool.sinks().result())
    leaf.spool.end_producer(info.producer_id).result()
    wait_until(lambda: leaf.spool.sinks().result() == ["store"])
    leaf.log(leaf.open(3), 5)
    wait_until(lambda: hub.steps == [1, 5])
    leaf.close()


def test_a_hub_is_let_go_after_all_when_the_spool_failed(tmp_path: Path, hub: HubServer) -> None:
    failures = [sqlite3.OperationalError("disk I/O error"), SpoolError("no space left")]

    class Failing(Spool):
        def remove_sink(self, name: str) -> Future[None]:
            if not failures:
                return super().remove_sink(name)
            failed: Future[None] = Future()
            failed.set_exception(failures.pop())
            return failed

    spool = Failing(tmp_path / "spool.db", max_bytes=1 << 30, linger_s=0.0)
    leaf = Leaf(spool, tmp_path, hub, idle_s=0.05)
    leaf.forwarding.start()
    info = leaf.open()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    leaf.spool.end_producer(info.producer_id).result()
    wait_until(lambda: leaf.spool.sinks().result() == ["store"])
    assert not failures
    leaf.close()
    spool.close()


def test_a_hub_that_cannot_be_let_go_is_fed(tmp_path: Path, hub: HubServer) -> None:
    failed = threading.Event()

    class Failing(Spool):
        def remove_sink(self, name: str) -> Future[None]:
            failed.set()
            never: Future[None] = Future()
            never.set_exception(sqlite3.OperationalError("disk I/O error"))
            return never

    spool = Failing(tmp_path / "spool.db", max_bytes=1 << 30, linger_s=0.0)
    leaf = Leaf(spool, tmp_path, hub, idle_s=0.05)
    leaf.forwarding.start()
    info = leaf.open()
    leaf.log(info, 1)
    leaf.spool.end_producer(info.producer_id).result()
    assert failed.wait(DEADLINE_S)
    leaf.log(info, 2)
    wait_until(lambda: hub.steps == [1, 2])
    leaf.log(leaf.open(3), 3)
    wait_until(lambda: hub.steps == [1, 2, 3])
    leaf.close()
    spool.close()


def test_nobody_waits_for_a_hub_that_is_let_go(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="trackagent")
    now = [0.0]
    leaf = Leaf(open_spool(), tmp_path, hub, clock=lambda: now[0], idle_s=0.1)
    leaf.forwarding.start()
    info = leaf.open()
    node = node_samples()
    leaf.spool.open_producer(node, {}).result()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    hub.hold.clear()
    leaf.log(node, 2)
    assert hub.held.wait(DEADLINE_S)
    leaf.spool.end_producer(info.producer_id).result()
    now[0] = 3600.0
    wait_until(lambda: "nobody here delivers to the hub" in caplog.text)
    (pipeline,) = leaf.forwarding.pipelines()
    leaf.open(4)
    assert pipeline.is_alive()
    hub.hold.set()
    leaf.log(leaf.open(5), 5)
    wait_until(lambda: hub.steps == [1, 2, 5])
    leaf.close()


def test_samples_hold_no_hub_that_has_ended(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer
) -> None:
    leaf = Leaf(open_spool(), tmp_path, hub, idle_s=0.05)
    leaf.forwarding.start()
    info = leaf.open()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    hub.stop()
    for sampled in (
        producer(8, sampled="rank 0", hub=info.hub),
        node_samples(),
    ):
        leaf.spool.open_producer(sampled, {}).result()
        leaf.log(sampled, 1_700_000_000)
    leaf.spool.end_producer(info.producer_id).result()
    wait_until(lambda: leaf.spool.sinks().result() == ["store"])
    leaf.close()


def test_what_a_run_logged_waits_for_a_hub_that_is_away(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer
) -> None:
    looked = threading.Event()

    class Watched(Spool):
        def awaited(self, sink: str) -> Future[list[ProducerInfo]]:
            found = super().awaited(sink)
            found.add_done_callback(lambda _: looked.set())
            return found

    spool = Watched(tmp_path / "spool.db", max_bytes=1 << 30, linger_s=0.0)
    leaf = Leaf(spool, tmp_path, hub, idle_s=0.05)
    leaf.forwarding.start()
    hub.stop()
    info = leaf.open()
    leaf.log(info, 1)
    leaf.spool.end_producer(info.producer_id).result()
    for _ in range(2):
        looked.clear()
        assert looked.wait(DEADLINE_S)
    hub.start()
    wait_until(lambda: hub.steps == [1])
    leaf.close()
    spool.close()


def test_a_hub_gets_no_samples_once_its_runs_have_ended(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer
) -> None:
    now = [0.0]
    leaf = Leaf(open_spool(), tmp_path, hub, clock=lambda: now[0])
    leaf.forwarding.start()
    info = leaf.open()
    node = node_samples()
    leaf.spool.open_producer(node, {}).result()
    leaf.log(node, 1)
    wait_until(lambda: hub.steps == [1])
    leaf.spool.end_producer(info.producer_id).result()
    now[0] = 3600.0
    leaf.log(node, 2)
    leaf.log(info, 3)
    wait_until(lambda: hub.steps == [1, 3])
    leaf.close()
