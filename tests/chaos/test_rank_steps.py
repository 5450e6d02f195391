"""Ranks die at each named step, and at any instruction, and the oracle finds nothing wrong."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.chaos import oracle
from tests.chaos.node import ROOT, SMALL, Node
from tests.chaos.records import KILLED, Producer, read_notes
from tests.chaos.steps import RANK_STEPS
from tests.chaos.switches import REACHED
from tests.fakes import DEADLINE_S
from trackagent.agent.config import STORE_NAME

PROGRAM = (sys.executable, "-W", "error", "-m", "tests.chaos.dying")


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node(deliver_interval_s=0.02)
    try:
        yield made
    finally:
        made.close()


def test_nothing_is_lost_or_doubled_when_ranks_die_at_each_step(node: Node) -> None:
    node.agent.start()
    ranks = {
        step: node.start_rank(
            Producer(uuid4().hex, 0, 0, number),
            400,
            dies_at=step.name,
            TRACKAGENT_FLUSH_INTERVAL_S="0.02",
            **SMALL,
        )
        for number, step in enumerate(RANK_STEPS)
    }
    for step, rank in ranks.items():
        if step.at_end:
            rank.tell_to_end()
    for step, rank in ranks.items():
        assert rank.process.wait(DEADLINE_S) == -signal.SIGKILL, step.name
        node.killed.add(rank.producer)
    reached = node.switches.get(REACHED).splitlines()
    assert sorted(reached) == sorted(step.name for step in RANK_STEPS)
    assert node.finish() == []


# How many instructions lie between two deaths.
@pytest.mark.parametrize(("where", "stride"), [("records", 197), ("segments", 149)])
def test_nothing_is_lost_or_doubled_when_ranks_die_at_an_instruction_in(
    node: Node, where: str, stride: int
) -> None:
    run_id, seed = uuid4().hex, 5
    first = random.randint(1, stride)
    notes = node.base / "notes"
    done = subprocess.run(
        [*PROGRAM, where, run_id, str(seed), str(notes), str(first), str(stride)],
        env={
            **node.folders.environment,
            "PYTHONPATH": str(ROOT),
            "WORLD_SIZE": "4096",
            "TRACKAGENT_AGENT": f"unix:{node.base}/nobody",
            **SMALL,
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ranks = int(done.stdout)
    assert ranks > 10
    node.agent.start()
    node.agent.wait_for_delivery()
    noted = [
        read_notes(Producer(run_id, rank, 0, seed), notes / f"{run_id}-{rank}", KILLED)
        for rank in range(1, ranks + 1)
    ]
    assert sum(len(one.under_way) for one in noted) > 0
    stored = oracle.read_store(node.folders.state / STORE_NAME, [run_id])
    assert oracle.check(noted, stored) == [], f"the first died at instruction {first}"
