"""Values of several ranks, from log() to what people see across them, through kills and restarts."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import (
    DEADLINE_S,
    AgentProcess,
    Folders,
    next_line,
    short_folder,
    start_script,
)

RUN_ID = "6" * 32
WORLD_SIZE = 3

TRAIN = """
import os, sys
from trackagent import client

rank, first, last = int(os.environ["RANK"]), int(sys.argv[1]), int(sys.argv[2])
client.init(experiment="reduced", groups={"tp": rank % 2})
client.define("loss", keep=sys.argv[3] if sys.argv[3] != "default" else None)
client.define("tokens", reduce="sum", keep="none")
for step in range(first, last):
    client.log({"loss": float(step + rank), "tokens": 10.0}, step=step, weight=rank + 1)
print("logged", flush=True)
for step in range(last, last + int(sys.stdin.readline())):
    client.log({"loss": float(step + rank), "tokens": 10.0}, step=step, weight=rank + 1)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(folders: Folders) -> Iterator[Start]:
    """start(rank, first, last, keep): a rank that logs these steps, and waits to be told of more."""
    started = []

    def begin(
        rank: int,
        first: int,
        last: int,
        keep: str,
        *,
        folders: Folders = folders,
        **more: str,
    ) -> subprocess.Popen[str]:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD_SIZE),
            "TRACKAGENT_RUN_ID": RUN_ID,
            # Where no agent listens it delivers later.
            "TRACKAGENT_EXIT_TIMEOUT_S": "2",
            **more,
        }
        process = start_script(folders, TRAIN, first, last, keep, **environment)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def go_on(processes: Sequence[subprocess.Popen[str]], steps: int = 0) -> None:
    """Each logs so many steps more, and ends."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    for process in processes:
        output, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, output + errors


def reduction(
    agent: AgentProcess, key: str = "loss", over: str = "all"
) -> dict[int, dict[str, Any]]:
    """What `trackagent reduction --json` says, by step."""
    done = agent.run_cli("reduction", RUN_ID, key, "--over", over, "--json")
    return {step["step"]: step for step in json.loads(done.stdout)["steps"]}


def steps_of(agent: AgentProcess, source: str, key: str = "loss") -> list[int]:
    """Those of which a rank's own points are stored."""
    found = agent.exported(RUN_ID)
    return sorted(point.step for point in found if (point.key, point.source) == (key, source))


def test_ranks_are_reduced_with_their_weights_over_all_and_over_groups(
    own_agent: Callable[..., AgentProcess], start: Start
) -> None:
    agent = own_agent("--keep-all-ranks", "2").start()
    ranks = [start(rank, 0, 50, "default") for rank in range(WORLD_SIZE)]
    go_on(ranks)
    agent.wait_for_delivery()
    over_all, group = reduction(agent), reduction(agent, over="tp=0")
    assert sorted(over_all) == list(range(50))
    assert over_all[7] | {"time_ns": 0} == {
        "step": 7,
        "time_ns": 0,
        "count": 3,
        "nans": 0,
        "world_size": 3,
        "weight": 6.0,
        "sum": 50.0,
        "mean": 50 / 6,
        "std": pytest.approx(math.sqrt(5) / 3),
        "min": 7.0,
        "max": 9.0,
        "min_rank": 0,
        "max_rank": 2,
    }
    assert (group[7]["count"], group[7]["world_size"], group[7]["mean"]) == (2, 2, 8.5)
    assert reduction(agent, "tokens")[7]["sum"] == 30.0
    # Of rank 1 there may be some too, where it was alone in a delivery.
    assert [steps_of(agent, f"rank {rank}") for rank in (0, 2)] == [list(range(50))] * 2
    assert steps_of(agent, "rank 2", "tokens") == []
    summary = agent.run(RUN_ID)
    assert summary is not None
    assert (summary.records_stored, summary.records_logged, summary.ranks) == (150, 150, 3)


def test_kills_of_a_rank_and_of_the_agent_lose_and_double_nothing(
    own_agent: Callable[..., AgentProcess], start: Start
) -> None:
    agent = own_agent().start()
    ranks = [start(rank, 0, 100, "none") for rank in range(WORLD_SIZE)]
    for process in ranks:
        assert next_line(process) == "logged"
    agent.kill()
    ranks[2].kill()
    go_on(ranks[:1], 50)
    agent.start()
    go_on(ranks[1:2], 50)
    agent.wait_for_delivery()
    found = reduction(agent)
    counts = [found[step]["count"] for step in range(150)]
    assert counts == [3] * 100 + [2] * 50
    means = [found[step]["mean"] for step in (0, 99, 100, 149)]
    assert means == pytest.approx([8 / 6, 99 + 8 / 6, 100 + 2 / 3, 149 + 2 / 3])
    assert {found[step]["max_rank"] for step in range(100)} == {2}
    assert {found[step]["world_size"] for step in found} == {3}
    assert steps_of(agent, "rank 0") == []
    (told,) = [one for one in agent.shown(RUN_ID)["reductions"] if one["key"] == "loss"]
    assert (told["last_step"], told["reported"], told["world_size"]) == (149, 2, 3)


def test_of_steps_that_a_restarted_job_logs_again_its_own_values_count(
    own_agent: Callable[..., AgentProcess], start: Start
) -> None:
    agent = own_agent().start()
    go_on([start(rank, 0, 10, "none") for rank in range(WORLD_SIZE)])
    agent.wait_for_delivery()
    go_on([start(rank, 5, 20, "none", TRACKAGENT_ATTEMPT="2") for rank in (0, 1)])
    agent.wait_for_delivery()
    found = reduction(agent)
    assert [found[step]["count"] for step in range(20)] == [3] * 5 + [2] * 15


@pytest.fixture
def node() -> Iterator[Callable[..., AgentProcess]]:
    """node(name, *flags): an agent on folders of its own, started, ended after the test."""
    agents: list[AgentProcess] = []

    def begin(name: str, *flags: str) -> AgentProcess:
        folders = Folders.under(short_folder())
        agents.append(AgentProcess(folders, "--node", name, "--collect", "none", *flags))
        return agents[-1].start()

    yield begin
    for agent in agents:
        agent.close()
        shutil.rmtree(agent.folders.directory.parent)


def test_over_the_ranks_of_two_nodes_their_hub_says_the_same_through_kills_of_all_agents(
    node: Callable[..., AgentProcess], start: Start, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    trust = ("--token-file", str(token), "--keep-all-ranks", "1")
    hub = node("hub", "--listen", "127.0.0.1:0", *trust)
    address = json.loads((hub.folders.directory / "hub.json").read_text())["address"]
    forwarders = {
        name: node(name, "--store", address, "--forward-interval-s", "0.1", *trust)
        for name in ("left", "right")
    }
    places = ("left", "left", "right")
    ranks = [
        start(rank, 0, 40, "default", TRACKAGENT_NODE=name, folders=forwarders[name].folders)
        for rank, name in enumerate(places)
    ]
    for process in ranks:
        assert next_line(process) == "logged"
    hub.flags = tuple(address if flag == "127.0.0.1:0" else flag for flag in hub.flags)
    for agent in (hub, *forwarders.values()):
        agent.kill()
        agent.start()
    go_on(ranks, 40)
    for forwarder in forwarders.values():
        forwarder.wait_for_delivery()
    hub.wait_for_delivery()
    found, left = reduction(hub), reduction(hub, over="node left")
    assert {step: (one["count"], one["mean"]) for step, one in found.items()} == {
        step: (3, pytest.approx(step + 8 / 6)) for step in range(80)
    }
    assert {(one["min_rank"], one["max_rank"]) for one in found.values()} == {(0, 2)}
    assert {(one["count"], one["world_size"], one["max_rank"]) for one in left.values()} == {
        (2, 2, 1)
    }
    assert [steps_of(hub, f"rank {rank}") for rank in (0, 2)] == [list(range(80))] * 2
    summary = hub.wait_for_status(RUN_ID, "finished")
    assert (summary.records_stored, summary.records_logged, summary.ranks) == (240, 240, 3)
