"""Producers whose journal vanished, as after a restart of their node: they do not stay open for ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from tests.agent.samples import journal, losses, producer
from tests.fakes import DEADLINE_S, AgentProcess, Folders, next_line, start_script, wait_until
from trackagent.agent.decode import decode
from trackagent.agent.orphans import GONE_INTERVAL_S, Orphans
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import Batch

GONE_S = 1000.0
ID = producer().producer_id
REASON = "its process and its journal are gone: what it had not delivered is unknown"


class Node:
    """What the agent of a node looks at, and its clock."""

    def __init__(self, spool: Spool, folders: Folders) -> None:
        spool.add_sink("store").result()
        self.now = 0.0
        self.connected: set[bytes] = set()
        self.spool = spool
        self.orphans = Orphans(
            spool,
            folders.directory,
            folders.state,
            folders.state / "quarantine",
            connected=self.connected.__contains__,
            gone_after_s=GONE_S,
            clock=lambda: self.now,
        )

    def look_after(self, seconds: float) -> None:
        self.now += seconds
        self.orphans.look()

    def not_ended(self) -> list[bytes]:
        statistics = self.spool.statistics().result()
        return [one["info"].producer_id for one in statistics["producers"]]

    def spooled(self) -> Batch:
        delivery = self.spool.next_delivery("store", 1 << 40).result()
        assert delivery is not None
        return decode(delivery, self.spool.keys)


@pytest.fixture
def node(spool: Spool, folders: Folders) -> Node:
    made = Node(spool, folders)
    spool.open_producer(producer(), {}).result()
    spool.append(ID, 0, 0, losses(range(3))).result()
    return made


def test_one_whose_journal_is_gone_and_that_does_not_come_back_ends_as_killed(node: Node) -> None:
    node.look_after(0)
    node.look_after(GONE_S)
    assert node.not_ended() == []
    batch = node.spooled()
    assert [(end.status, end.error) for end in batch.ends] == [("killed", REASON)]
    [event] = batch.events
    assert (event.level, event.message) == (
        "error",
        f"rank 0 on node host-a (pid 4711) never ended: {REASON}",
    )


def test_its_end_is_told_once(node: Node) -> None:
    for _ in range(3):
        node.look_after(GONE_S)
    assert len(node.spooled().ends) == 1


def test_one_that_is_gone_for_a_while_only_goes_on(node: Node) -> None:
    node.look_after(0)
    node.look_after(GONE_S - 1)
    assert node.not_ended() == [ID]


def test_one_that_came_back_meanwhile_goes_on(node: Node) -> None:
    node.look_after(0)
    node.connected.add(ID)
    node.look_after(GONE_INTERVAL_S)
    node.connected.clear()
    node.look_after(GONE_S - GONE_INTERVAL_S)
    assert node.not_ended() == [ID]


def test_one_that_is_connected_goes_on(node: Node) -> None:
    node.connected.add(ID)
    for _ in range(3):
        node.look_after(GONE_S)
    assert node.not_ended() == [ID]


def test_what_is_sampled_has_no_journal_and_goes_on(node: Node) -> None:
    node.spool.open_producer(producer(1, sampled="node host-a"), {}).result()
    for _ in range(3):
        node.look_after(GONE_S)
    assert node.not_ended() == [producer(1).producer_id]


def test_one_that_has_its_journal_goes_on(node: Node, folders: Folders) -> None:
    held = journal(folders)
    for _ in range(3):
        node.look_after(GONE_S)
    assert node.not_ended() == [ID]
    held.close()


# --- the real agent

IDLE = """
import sys
from trackagent import client

run = client.init(experiment="idle")
client.log({"loss": 1.0}, step=0)
print(run.id, flush=True)
sys.stdin.readline()
client.finish()
"""


def test_a_node_that_starts_anew_ends_the_runs_that_it_took_along(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    agent = own_agent("--deliver-interval-s", "0.02", "--gone-after-s", "1").start()
    with start_script(folders, IDLE) as process:
        run_id = next_line(process)
        wait_until(lambda: (run := agent.run(run_id)) and run.records_stored == 1)
        agent.stop()
        process.kill()
        process.wait(DEADLINE_S)
    shutil.rmtree(folders.directory)
    agent.start()
    run = agent.wait_for_status(run_id, "killed")
    assert (run.error, run.records_stored) == (REASON, 1)
    [event] = agent.shown(run_id)["events"]
    assert (event["level"], event["message"].endswith(REASON)) == ("error", True)


def test_a_rank_that_has_nothing_to_send_is_connected_and_goes_on(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    agent = own_agent("--deliver-interval-s", "0.02", "--gone-after-s", "1").start()
    with start_script(folders, IDLE) as idle, start_script(folders, IDLE) as other:
        runs = [next_line(idle), next_line(other)]
        for run_id in runs:
            wait_until(lambda run_id=run_id: (r := agent.run(run_id)) and r.records_stored == 1)
        # As those of containers whose folders are their own.
        for number, journal in enumerate(folders.journals()):
            journal.rename(folders.state / f"elsewhere-{number}")
        other.kill()
        assert agent.wait_for_status(runs[1], "killed").error == REASON
        idle.communicate("\n", timeout=DEADLINE_S)
    assert agent.wait_for_status(runs[0], "finished").lost_records == 0
    assert agent.shown(runs[0])["events"] == []
