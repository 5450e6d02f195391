"""An agent dies at each named step, the next one goes on, and the oracle finds nothing wrong."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from itertools import count
from uuid import uuid4

import pytest

from tests.chaos.node import SMALL, Node, Rank
from tests.chaos.records import Producer
from tests.chaos.steps import AGENT_STEPS, Step
from tests.chaos.switches import DEATHS, REACHED, STEP
from tests.fakes import DEADLINE_S, wait_until
from trackagent.agent.config import LOCK_NAME

pytestmark = pytest.mark.slow

SEEDS = count(1)
FRESH = [step for step in AGENT_STEPS if step.fresh]


def start_rank(node: Node, per_second: float = 50, **variables: str) -> Rank:
    variables |= {"TRACKAGENT_FLUSH_INTERVAL_S": "0.02", **SMALL}
    return node.start_rank(Producer(uuid4().hex, 0, 0, next(SEEDS)), per_second, **variables)


@pytest.fixture(scope="module")
def busy_node() -> Iterator[Node]:
    """Two ranks log on it for as long as the tests of this file last; an agent that dies has a successor."""
    node = Node(deliver_interval_s=0.02, again=True)
    try:
        node.agent.start()
        node.wait_for_new_records([start_rank(node), start_rank(node)])
        yield node
        assert node.finish() == []
    finally:
        node.close()


def wait_for_deaths(node: Node, steps: Sequence[Step]) -> None:
    """Until an agent has died at each of the steps, by SIGKILL, and nowhere else."""
    deaths = [str(-signal.SIGKILL)] * len(steps)

    def died() -> bool:
        return len(node.switches.get(DEATHS).splitlines()) >= len(deaths)

    wait_until(
        died, f"agents die at {[step.name for step in steps]}; they said:\n{node.agent.output}"
    )
    assert node.switches.get(DEATHS).splitlines() == deaths
    assert node.switches.get(REACHED).splitlines() == [step.name for step in steps]
    node.switches.clear(DEATHS)
    node.switches.clear(REACHED)


def reach(node: Node, step: Step) -> None:
    """Does what brings an agent to the step, where the ranks that are there do not."""
    if "producer" in step.name:
        node.switches.set(STEP, step.name)
        start_rank(node)
    elif "goodbye" in step.name:
        guest = start_rank(node)
        node.wait_for_new_records([guest])
        node.switches.set(STEP, step.name)
        guest.tell_to_end()
    elif "orphan" in step.name:
        # Nothing of it is delivered before it is killed.
        guest = start_rank(node, 1000, TRACKAGENT_AGENT=f"unix:{node.base}/nobody")
        wait_until(lambda: len(guest.noted().returned) > 200)
        node.switches.set(STEP, step.name)
        node.kill(guest)
    else:
        node.switches.set(STEP, step.name)
        if "stop" in step.name:
            about = json.loads((node.folders.directory / LOCK_NAME).read_text())
            os.kill(about["pid"], signal.SIGTERM)


@pytest.mark.parametrize(
    "step", [step for step in AGENT_STEPS if not step.fresh], ids=lambda step: step.name
)
def test_nothing_is_lost_or_doubled_when_an_agent_dies_at(busy_node: Node, step: Step) -> None:
    staying = busy_node.living
    reach(busy_node, step)
    wait_for_deaths(busy_node, [step])
    busy_node.wait_for_new_records(staying)
    assert busy_node.check_now() == []
    for rank in busy_node.living:
        if rank not in staying:
            rank.tell_to_end()
            assert rank.process.wait(DEADLINE_S) == 0


def test_nothing_is_lost_or_doubled_when_agents_die_while_they_make_their_files() -> None:
    node = Node(deliver_interval_s=0.02, again=True)
    try:
        rank = start_rank(node)
        node.switches.set(STEP, "\n".join(step.name for step in FRESH))
        node.agent.start()
        wait_for_deaths(node, FRESH)
        node.wait_for_new_records([rank])
        assert node.finish() == []
    finally:
        node.close()
