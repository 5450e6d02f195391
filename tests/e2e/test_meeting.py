"""Ranks without torch, as real processes: they meet in their job's table at the agent, and agree on a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from tests.fakes import (
    DEADLINE_S,
    AgentProcess,
    Folders,
    next_line,
    short_folder,
    start_script,
    wait_until,
)
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

# Says which run it is in, and ends it at the end of its input.
RANK = """
import sys
from trackagent import client

run = client.init("meeting")
assert "torch" not in sys.modules
print(run.id, run.attempt, run.rank, run.world_size, flush=True)
sys.stdin.read()
client.finish()
"""


class Told(NamedTuple):
    run_id: str
    attempt: int
    rank: int
    world_size: int


class Job:
    """The ranks of a job, each a process of its own."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.started: list[subprocess.Popen[str]] = []

    def rank(
        self, rank: int, of: int = 2, folders: Folders | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(of),
            "TRACKAGENT_JOB_ID": "seven",
            "TRACKAGENT_IDENTITY_TIMEOUT_S": str(DEADLINE_S),
            "TRACKAGENT_EXIT_TIMEOUT_S": "0.1",
        } | variables
        self.started.append(start_script(folders or self.folders, RANK, **variables))
        return self.started[-1]

    def kill(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate(timeout=DEADLINE_S)
        self.started.clear()


def told(process: subprocess.Popen[str]) -> Told:
    run_id, *numbers = next_line(process).split()
    return Told(run_id, *map(int, numbers))


def refusal(process: subprocess.Popen[str]) -> str:
    """What the process dies of."""
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, errors
    return errors.strip().splitlines()[-1]


@pytest.fixture
def job(folders: Folders) -> Iterator[Job]:
    job = Job(folders)
    yield job
    job.kill()


@pytest.fixture
def agent(own_agent: Callable[..., AgentProcess]) -> AgentProcess:
    """Not yet started."""
    return own_agent()


def asks(agent: AgentProcess) -> int:
    """How many ranks have asked for rank 0's word at the first init()."""
    request = agent_pb2.MeetRequest(job="job seven", operation="GET", key="trackagent/1/asks")
    with grpc.insecure_channel(agent.address) as channel:
        answer = agent_pb2_grpc.AgentStub(channel).Meet(request, timeout=DEADLINE_S)
    return int(answer.value or b"0")


def test_ranks_agree_and_count_their_restarts_as_attempts(job: Job, agent: AgentProcess) -> None:
    agent.start()
    first = [told(process) for process in [job.rank(rank, of=3) for rank in (2, 0, 1)]]
    assert {(one.run_id, one.attempt) for one in first} == {(first[0].run_id, 1)}
    assert sorted((one.rank, one.world_size) for one in first) == [(0, 3), (1, 3), (2, 3)]
    job.kill()
    late = job.rank(0)
    assert told(late)[:2] == (first[0].run_id, 2)
    # Rank 0 has begun when the other one asks.
    assert told(job.rank(1))[:2] == (first[0].run_id, 2)


def test_jobs_of_other_names_are_other_runs(job: Job, agent: AgentProcess) -> None:
    agent.start()
    ranks = [job.rank(rank, TRACKAGENT_JOB_ID=name) for name in ("a", "b") for rank in (0, 1)]
    runs = [told(process).run_id for process in ranks]
    assert (runs[0] == runs[1], runs[2] == runs[3], runs[0] == runs[2]) == (True, True, False)


def test_ranks_wait_for_an_agent_and_for_one_that_is_killed_meanwhile(
    job: Job, agent: AgentProcess
) -> None:
    other = job.rank(1)
    # It is at work by now, or will be: either way there is nobody to ask.
    agent.start()
    wait_until(lambda: asks(agent) == 1, "rank 1 asks")
    agent.kill()
    agent.start()
    first = told(job.rank(0))
    assert (told(other).run_id, first.attempt) == (first.run_id, 1)


def test_an_agent_that_is_killed_after_rank_0_began_keeps_no_rank_out(
    job: Job, agent: AgentProcess
) -> None:
    agent.start()
    first, second = (told(process) for process in [job.rank(rank, of=3) for rank in (0, 1)])
    agent.kill()
    agent.start()
    assert told(job.rank(2, of=3))[:2] == first[:2] == second[:2]


@pytest.fixture
def node() -> Iterator[Callable[..., AgentProcess]]:
    """node(*flags): an agent on folders of its own, started, ended after the test."""
    agents: list[AgentProcess] = []

    def start(*flags: str) -> AgentProcess:
        agents.append(AgentProcess(Folders.under(short_folder()), *flags))
        return agents[-1].start()

    yield start
    for agent in agents:
        agent.close()
        shutil.rmtree(agent.folders.directory.parent)


def test_ranks_of_two_nodes_meet_at_the_hub_that_their_agents_deliver_to(
    node: Callable[..., AgentProcess], job: Job, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    hub = node("--listen", "127.0.0.1:0", "--token-file", str(token))
    said = json.loads((hub.folders.directory / "hub.json").read_text())
    nodes = [node("--store", said["address"], "--token-file", str(token)) for _ in range(2)]
    ranks = [job.rank(rank, folders=nodes[rank].folders, LOCAL_WORLD_SIZE="1") for rank in (0, 1)]
    first, second = (told(process) for process in ranks)
    assert first[:2] == second[:2]


def test_ranks_of_two_nodes_that_have_no_common_hub_are_told_what_to_set(
    job: Job, agent: AgentProcess
) -> None:
    agent.start()
    said = refusal(job.rank(0, LOCAL_WORLD_SIZE="1"))
    assert "IdentityError: the ranks are on several nodes" in said
    assert "start every node's agent with `trackagent start --store HOST:PORT`" in said


def test_ranks_without_an_agent_are_told_after_their_time(job: Job) -> None:
    said = refusal(job.rank(1, TRACKAGENT_IDENTITY_TIMEOUT_S="0.2"))
    assert "rank 1 of 2 waited 0.2 s for the agent at unix:/" in said
    assert "(`trackagent start`)" in said


def test_ranks_of_a_job_without_a_name_are_told_how_to_name_it(job: Job) -> None:
    said = refusal(job.rank(1, TRACKAGENT_JOB_ID=""))
    assert "set TRACKAGENT_JOB_ID to the same text for every rank" in said


def test_ranks_that_were_given_a_run_id_ask_nobody(job: Job) -> None:
    ranks = [job.rank(rank, TRACKAGENT_RUN_ID="a" * 32) for rank in (0, 1)]
    assert {told(process)[:2] for process in ranks} == {("a" * 32, 1)}
