"""`kill -9` of ranks, of the agent, of both, in the middle of logging: the store ends up with every
record whose log() had returned, once."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

import pytest

from tests.fakes import DEADLINE_S, AgentProcess, Folders, Point, start_script, wait_until

# Logs until it is killed, or until the file in argv[2] exists, with a pause of argv[3] seconds
# every 20 steps. argv[1] gets a line for every log() that has returned, by a system call each, so
# that a line stands there only if the record was safe before.
TRAINING = """
import os, sys, time
from trackagent import client

returned = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
client.init(experiment="kill")
step = 0
while not os.path.exists(sys.argv[2]):
    client.log({"loss": step / 7, f"group{step // 100 % 5}/x": step}, step=step)
    os.write(returned, b"%d\\n" % step)
    step += 1
    if step % 20 == 0:
        time.sleep(float(sys.argv[3]))
client.finish()
"""

# Small segments, of which few fit in memory: so that processes die while they go from one to the next.
SMALL = {"TRACKAGENT_SEGMENT_BYTES": "65536", "TRACKAGENT_MEMORY_BYTES": "262144"}
PAUSE_S = 0.02


class Job:
    """Ranks of one run on one node, each a process that logs."""

    def __init__(self, folders: Folders, pauses_s: Sequence[float]) -> None:
        """pauses_s: of each rank; 0 is as fast as it can."""
        base = folders.directory.parent
        self.run_id = uuid4().hex
        self.stop_file = base / f"{self.run_id}.stop"
        self.returned_files = [base / f"{self.run_id}.{rank}" for rank in range(len(pauses_s))]
        self.processes = [
            start_script(
                folders,
                TRAINING,
                path,
                self.stop_file,
                pause_s,
                RANK=str(rank),
                WORLD_SIZE=str(len(pauses_s)),
                TRACKAGENT_RUN_ID=self.run_id,
                **SMALL,
            )
            for rank, (path, pause_s) in enumerate(zip(self.returned_files, pauses_s, strict=True))
        ]

    def wait_for_records(self, count: int, rank: int) -> None:
        """Until `rank` has logged `count` records more than now."""
        path = self.returned_files[rank]
        goal = count + (len(returned(path)) if path.exists() else 0)
        wait_until(lambda: path.exists() and len(returned(path)) >= goal, f"{goal} in {path}")

    def kill(self, rank: int) -> None:
        self.processes[rank].send_signal(signal.SIGKILL)
        self.processes[rank].wait(DEADLINE_S)

    def finish(self) -> None:
        """Tells the ranks that are left to end, and waits for them."""
        self.stop_file.touch()
        for process in self.processes:
            if process.returncode is None:
                _, errors = process.communicate(timeout=DEADLINE_S)
                assert process.returncode == 0, errors

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def check_stored(self, points: Sequence[Point]) -> None:
        """Each record once, in full: all that had returned, and at most one more of a rank (the one
        under way)."""
        for rank, path in enumerate(self.returned_files):
            mine = [point for point in points if point.source == f"rank {rank}"]
            losses = {point.step: point.value for point in mine if point.key == "loss"}
            logged = len(returned(path))
            count = len(losses)
            assert logged <= count <= logged + 1
            assert Counter((point.key, point.step) for point in mine) == Counter(
                pair for step in range(count) for pair in (("loss", step), (group(step), step))
            )
            assert losses == {step: step / 7 for step in range(count)}


def group(step: int) -> str:
    return f"group{step // 100 % 5}/x"


def returned(path: Path) -> list[int]:
    """The steps in the file, whose last line may be incomplete."""
    return [int(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.fixture
def job(request: pytest.FixtureRequest) -> Callable[..., Job]:
    def start(folders: Folders, *pauses_s: float) -> Job:
        started = Job(folders, pauses_s)
        request.addfinalizer(started.close)
        return started

    return start


@pytest.mark.parametrize("records", [1, 3000])
def test_a_killed_rank_loses_no_record_whose_log_had_returned(
    agent: AgentProcess, job: Callable[..., Job], records: int
) -> None:
    running = job(agent.folders, PAUSE_S, 0.0)
    running.wait_for_records(records, rank=1)
    running.kill(1)
    running.finish()
    agent.wait_for_status(running.run_id, "killed")
    agent.wait_for_delivery()
    running.check_stored(agent.exported(running.run_id))


def test_a_rank_that_is_killed_without_an_agent_loses_no_record(
    folders: Folders, own_agent: Callable[..., AgentProcess], job: Callable[..., Job]
) -> None:
    running = job(folders, 0.0)
    running.wait_for_records(2000, rank=0)
    running.kill(0)
    agent = own_agent().start()
    agent.wait_for_status(running.run_id, "killed")
    agent.wait_for_delivery()
    running.check_stored(agent.exported(running.run_id))


def test_an_agent_that_is_killed_again_and_again_loses_and_doubles_nothing(
    folders: Folders, own_agent: Callable[..., AgentProcess], job: Callable[..., Job]
) -> None:
    agent = own_agent().start()
    running = job(folders, PAUSE_S, PAUSE_S)
    for _ in range(3):
        running.wait_for_records(200, rank=0)
        agent.kill()
        running.wait_for_records(100, rank=1)
        agent.start()
    running.wait_for_records(200, rank=0)
    running.finish()
    run = agent.wait_for_status(running.run_id, "finished")
    agent.wait_for_delivery()
    running.check_stored(agent.exported(running.run_id))
    assert run.lost_records == 0


def test_agent_and_rank_killed_at_once_lose_nothing(
    folders: Folders, own_agent: Callable[..., AgentProcess], job: Callable[..., Job]
) -> None:
    agent = own_agent().start()
    running = job(folders, 0.0)
    running.wait_for_records(1000, rank=0)
    subprocess.run(
        ["kill", "-9", str(agent.process.pid), str(running.processes[0].pid)], check=True
    )
    agent.kill()
    running.kill(0)
    agent.start()
    agent.wait_for_status(running.run_id, "killed")
    agent.wait_for_delivery()
    running.check_stored(agent.exported(running.run_id))


def test_a_killed_rank_leaves_no_journal_behind(
    agent: AgentProcess, job: Callable[..., Job]
) -> None:
    running = job(agent.folders, 0.0)
    running.wait_for_records(10, rank=0)
    assert agent.folders.journals() != []
    running.kill(0)
    agent.wait_for_status(running.run_id, "killed")
    agent.wait_for_no_journals()
