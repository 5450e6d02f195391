"""A hub that is told to stop waits for the ranks of other nodes: not for ever, and not for its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.hubs import token_file
from tests.fakes import (
    DEADLINE_S,
    AgentProcess,
    Folders,
    next_line,
    short_folder,
    start_script,
    wait_until,
)

JOB = "job 8"
QUICK = ("--deliver-interval-s", "0.02", "--forward-interval-s", "0.02")
TRAIN = """
import sys
from trackagent import client
run = client.init("hub ends")
run.log({"loss": 1.0}, step=0)
print("logged", flush=True)
sys.stdin.readline()
run.log({"loss": 2.0}, step=1)
assert run.finish()
"""

Node = Callable[..., AgentProcess]


@pytest.fixture
def start_node() -> Iterator[Node]:
    """start_node(*flags): an agent in folders of its own, running."""
    made: list[AgentProcess] = []

    def start(*flags: str) -> AgentProcess:
        made.append(AgentProcess(Folders.under(short_folder()), *QUICK, *flags))
        return made[-1].start()

    yield start
    for node in made:
        node.close()
        shutil.rmtree(node.folders.directory.parent)


@pytest.fixture
def cluster(tmp_path: Path, start_node: Node) -> Callable[..., tuple[AgentProcess, AgentProcess]]:
    """cluster(*flags): a hub with these flags, and another node that delivers to it."""
    token = str(token_file(tmp_path))

    def start(*flags: str) -> tuple[AgentProcess, AgentProcess]:
        hub = start_node("--listen", "127.0.0.1:0", "--token-file", token, *flags)
        address = json.loads(hub.run_cli("status", "--json").stdout)["listen"]
        return hub, start_node("--store", address, "--token-file", token)

    return start


def rank(node: AgentProcess, number: int) -> subprocess.Popen[str]:
    environment = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    return start_script(node.folders, TRAIN, TRACKAGENT_JOB_ID=JOB, **environment)


def both(hub: AgentProcess, other: AgentProcess) -> Iterator[subprocess.Popen[str]]:
    """A rank on each, once both have logged."""
    started = [rank(hub, 0), rank(other, 1)]
    for process in started:
        assert next_line(process) == "logged"
    return iter(started)


def end(process: subprocess.Popen[str]) -> None:
    output, errors = process.communicate("\n", timeout=DEADLINE_S)
    assert process.returncode == 0, output + errors


def is_lingering(hub: AgentProcess) -> bool:
    return "waiting up to" in hub.output


def test_a_hub_takes_what_the_other_nodes_ranks_log_last(
    cluster: Callable[..., tuple[AgentProcess, AgentProcess]],
) -> None:
    hub, other = cluster("--linger", "60")
    first, last = both(hub, other)
    end(first)
    assert hub.process is not None
    hub.process.terminate()
    wait_until(lambda: is_lingering(hub))
    end(last)
    hub.process.wait(DEADLINE_S)
    (run,) = hub.runs()
    assert (run["status"], run["ranks"], run["records_stored"]) == ("finished", 2, 4)


def test_a_hub_waits_no_longer_than_it_may(
    cluster: Callable[..., tuple[AgentProcess, AgentProcess]],
) -> None:
    hub, other = cluster("--linger", "0.2")
    first, last = both(hub, other)
    end(first)
    hub.stop()
    assert "ranks of other nodes have not ended" in hub.output
    last.kill()
    last.communicate()


def test_a_second_signal_ends_the_wait(
    cluster: Callable[..., tuple[AgentProcess, AgentProcess]],
) -> None:
    hub, other = cluster("--linger", "3600")
    first, last = both(hub, other)
    end(first)
    assert hub.process is not None
    hub.process.terminate()
    wait_until(lambda: is_lingering(hub))
    hub.process.terminate()
    hub.process.wait(DEADLINE_S)
    last.kill()
    last.communicate()


def test_a_hub_under_its_own_ranks_does_not_wait(
    cluster: Callable[..., tuple[AgentProcess, AgentProcess]],
) -> None:
    hub, other = cluster("--linger", "3600")
    ranks = both(hub, other)
    hub.stop()
    assert not is_lingering(hub)
    for process in ranks:
        process.kill()
        process.communicate()


def test_a_hub_without_ranks_of_its_own_waits_for_nobody(
    cluster: Callable[..., tuple[AgentProcess, AgentProcess]],
) -> None:
    hub, other = cluster("--linger", "3600")
    environment = {"RANK": "0", "WORLD_SIZE": "2", "TRACKAGENT_RUN_ID": "5" * 32}
    process = start_script(other.folders, TRAIN, **environment)
    assert next_line(process) == "logged"
    wait_until(hub.runs)
    hub.stop()
    assert not is_lingering(hub)
    process.kill()
    process.communicate()


def test_an_agent_that_cannot_go_on_once_it_listens_ends(tmp_path: Path) -> None:
    folders = Folders.under(short_folder())
    (folders.directory / "hub.json").mkdir(mode=0o700, parents=True)
    folders.directory.chmod(0o700)
    agent = AgentProcess(folders, *QUICK, "--listen", "127.0.0.1:0")
    process = agent.launch()
    assert process.wait(DEADLINE_S) == 1
    assert "hub.json" in agent.output
    shutil.rmtree(folders.directory.parent)
