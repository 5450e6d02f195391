"""A job that begins again continues its run as the next attempt: restarts by torchrun, and by hand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fakes import (
    TORCHRUN_S,
    AgentProcess,
    Folders,
    next_line,
    run_script,
    start_script,
    torchrun,
    wait_until,
)
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader

RUN_ID = "5" * 32

# Each start logs ten steps, from the checkpoint that the one before had written: the last two again.
TRAIN = """
import os, signal, sys, time
from pathlib import Path
from trackagent import client

run = client.init(experiment="attempts")
begun = len(list(Path(sys.argv[1]).glob(f"{run.rank}.*")))
Path(sys.argv[1], f"{run.rank}.{begun}").write_text(run.id)
for step in range(8 * begun, 8 * begun + 10):
    client.log({"loss": 100 * begun + step}, step=step)
if begun == 0:
    if run.rank == run.world_size - 1:
        while len(list(Path(sys.argv[1]).glob("*.0"))) < run.world_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""
EXPECTED = [*range(8), *range(108, 118)]


def losses(folders: Folders, run_id: str, source: str) -> list[float]:
    with contextlib.closing(open_reader(folders.state / STORE_NAME)) as reader:
        series = reader.series(run_id, "loss", source)
    assert series.steps.tolist() == list(range(18))
    return series.values.tolist()


def exported(agent: AgentProcess, run_id: str, attempt: int) -> dict[str, list[float]]:
    """The losses of one attempt by source, in order of steps."""
    lines = agent.run_cli("export", run_id, "--attempt", str(attempt)).stdout.splitlines()
    points = sorted((json.loads(line) for line in lines), key=lambda point: point["step"])
    assert {point["attempt"] for point in points} == {attempt}
    found: dict[str, list[float]] = {}
    for point in points:
        found.setdefault(point["source"], []).append(point["value"])
    return found


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is in the demo extra")
def test_a_worker_group_that_torchrun_restarts_is_the_runs_next_attempt(
    agent: AgentProcess, tmp_path: Path
) -> None:
    script, told = tmp_path / "train.py", tmp_path / "told"
    script.write_text(TRAIN)
    told.mkdir()
    with torchrun(agent.folders, script, told, restarts=1) as process:
        _, errors = process.communicate(timeout=TORCHRUN_S)
    assert process.returncode == 0, errors
    [run_id] = {path.read_text() for path in told.iterdir()}
    run = agent.wait_for_status(run_id, "finished")
    assert (run.attempt, run.ranks) == (2, 2)
    died = "died without finish(): last step 9 "

    def stored() -> bool:
        events = [one["message"] for one in agent.shown(run_id)["events"]]
        return sum(died in message for message in events) == 2

    wait_until(stored, "both ranks of the first attempt are said to have died")
    for rank in (0, 1):
        assert losses(agent.folders, run_id, f"rank {rank}") == EXPECTED
    assert exported(agent, run_id, 1) == {key: [*range(10)] for key in ("rank 0", "rank 1")}
    assert exported(agent, run_id, 2) == {key: [*range(108, 118)] for key in ("rank 0", "rank 1")}


@pytest.mark.parametrize("late", [False, True], ids=["in order", "the first comes last"])
def test_a_job_that_is_started_again_continues_its_run_as_the_next_attempt(
    folders: Folders, own_agent: Callable[..., AgentProcess], tmp_path: Path, late: bool
) -> None:
    agent = own_agent("--deliver-interval-s", "0.02")
    if not late:
        agent.start()
    run_script(folders, TRAIN, tmp_path, expect=-9, TRACKAGENT_RUN_ID=RUN_ID)
    if late:
        # Out of the agent's sight until the second attempt has ended.
        (folders.directory / "journals").rename(folders.directory.parent / "first")
        agent.start()
    else:
        agent.wait_for_status(RUN_ID, "killed")
    run_script(folders, TRAIN, tmp_path, TRACKAGENT_RUN_ID=RUN_ID)
    agent.wait_for_status(RUN_ID, "finished")
    if late:
        [journal] = (folders.directory.parent / "first").iterdir()
        journal.rename(folders.directory / "journals" / journal.name)
        wait_until(lambda: (run := agent.run(RUN_ID)) and run.attempt == 2)
        agent.wait_for_delivery()
    run = agent.wait_for_status(RUN_ID, "finished")
    assert run.attempt == 2
    assert losses(folders, RUN_ID, "rank 0") == EXPECTED
    assert exported(agent, RUN_ID, 1) == {"rank 0": [*range(10)]}
    assert exported(agent, RUN_ID, 2) == {"rank 0": [*range(108, 118)]}


def test_a_run_is_running_again_when_its_job_is_started_again(
    agent: AgentProcess, tmp_path: Path
) -> None:
    run_id = "6" * 32
    run_script(agent.folders, TRAIN, tmp_path, expect=-9, TRACKAGENT_RUN_ID=run_id)
    agent.wait_for_status(run_id, "killed")
    program = TRAIN + "\nprint(flush=True); sys.stdin.readline()"
    with start_script(agent.folders, program, tmp_path, TRACKAGENT_RUN_ID=run_id) as process:
        next_line(process)
        run = agent.wait_for_status(run_id, "running")
        assert (run.attempt, run.error) == (2, "")
        process.communicate("\n")
    agent.wait_for_status(run_id, "finished")
