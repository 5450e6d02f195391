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

pytestmark = pytest.mark.slow

PROGRAM = (sys.executable, "-W", "error", "-m", "tests.chaos.dying")


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node(deliver_interval_s=0.02, again=True)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_is_lost_or_doubled_when_ranks_die_at_each_step(node: Node, at_end: bool) -> None:
    node.agent.start()
    steps = [step for step in RANK_STEPS if step.at_end == at_end]
    for number, step in enumerate(steps):
        producer = Producer(uuid4().hex, 0, 0, number)
        rank = node.start_rank(
            producer,
            400 if at_end else 3000,
            dies_at=step.name,
            TRACKAGENT_FLUSH_INTERVAL_S="0.02",
            **SMALL,
        )
        if at_end:
            rank.tell_to_end()
    for step, rank in zip(steps, node.ranks, strict=True):
        assert rank.process.wait(DEADLINE_S) == -signal.SIGKILL, step.name
        node.killed.add(rank.producer)
    reached = node.switches.get(REACHED).splitlines()
    assert sorted(reached) == sorted(step.name for step in steps)
    assert node.finish() == []


# How many instructions lie between two deaths.
STRIDES = {"records": 151, "segments": 131}


def test_nothing_is_lost_or_doubled_when_ranks_die_at_any_instruction(node: Node) -> None:
    run_ids = {where: uuid4().hex for where in STRIDES}
    ranks = {where: dying_ranks(node, where, run_id) for where, run_id in run_ids.items()}
    node.agent.start()
    node.agent.wait_for_delivery()
    stored = oracle.read_store(node.folders.state / STORE_NAME, run_ids.values())
    noted = [
        read_notes(Producer(run_id, rank, 0, 5), node.base / "notes" / f"{run_id}-{rank}", KILLED)
        for where, run_id in run_ids.items()
        for rank in range(1, ranks[where] + 1)
    ]
    assert len(noted) > 20
    assert sum(len(one.under_way) for one in noted) > 0
    assert oracle.check(noted, stored) == []


def dying_ranks(node: Node, where: str, run_id: str) -> int:
    """Lets ranks log one after the other, each dying some instructions later than the last; how many."""
    first, stride = random.randint(1, STRIDES[where]), STRIDES[where]
    notes = str(node.base / "notes")
    done = subprocess.run(
        [*PROGRAM, where, run_id, "5", notes, str(first), str(stride)],
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
    print(f"{where}: the first died at instruction {first}")  # noqa: T201 - shown when it fails
    return int(done.stdout)
