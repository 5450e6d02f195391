"""A journal that was full leaves a hole that the run shows, from the log call to the drawn curve."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.fakes import AgentProcess, Folders, next_line, start_script

OwnAgent = Callable[..., AgentProcess]

# Without an agent until told so: the journal fills, and there is room again once an agent is there.
PROGRAM = """
import sys, time
from trackagent import client

run = client.init(experiment="hole")
print(run.id, flush=True)
for _ in range(8_000):
    client.log({"loss": 1.0})
print("full", flush=True)
sys.stdin.readline()
deadline = time.monotonic() + 30
step = 8_000
# Until records get through for good: all of the last thousand.
while time.monotonic() < deadline:
    client.log({"loss": 1.0})
    step += 1
    if step % 50 == 0:
        time.sleep(0.02)
    if step == 10_000:
        break
print(step, client.finish(), flush=True)
"""
SMALL = {"TRACKAGENT_SEGMENT_BYTES": "65536", "TRACKAGENT_JOURNAL_BYTES": str(4 * 65536)}


@pytest.fixture
def holed(own_agent: OwnAgent, folders: Folders) -> tuple[AgentProcess, str]:
    """An agent whose store has the run, and the run."""
    agent = own_agent("--deliver-interval-s", "0.02")
    with start_script(folders, PROGRAM, **SMALL) as process:
        run_id = next_line(process)
        assert next_line(process) == "full"
        agent.start()
        output, errors = process.communicate("\n", timeout=60)
        assert output == "10000 True\n", errors
    agent.wait_for_status(run_id, "finished")
    return agent, run_id


def test_the_run_shows_the_hole_and_how_much_is_missing(holed: tuple[AgentProcess, str]) -> None:
    agent, run_id = holed
    steps = [point.step for point in agent.exported(run_id)]
    missing = sorted(set(range(10_000)) - set(steps))
    assert (len(steps) + len(missing), missing != []) == (10_000, True)
    shown = agent.shown(run_id)
    # Every step is stored, or lies in a gap: nothing is missing in silence.
    in_gaps = {
        step for gap in shown["gaps"] for step in range(gap["first_step"], gap["last_step"] + 1)
    }
    assert in_gaps == set(missing)
    assert sum(gap["records"] for gap in shown["gaps"]) == len(missing)
    # Tags that say where the run began may have found no room either.
    assert list(shown["losses"]) == ["journal full"]
    assert len(missing) <= shown["lost_records"] < len(missing) + 50
    assert [run["losses"] for run in agent.runs()] == [shown["losses"]]
    # An agent that has not seen it happen knows it too.
    agent.stop()
    agent.start()
    status = json.loads(agent.run_cli("status", "--json").stdout)
    assert (status["lost_records"], status["lost_since_start"]) == (shown["losses"], 0)

    text = agent.run_cli("show", run_id).stdout
    first = shown["gaps"][0]
    assert f"steps {first['first_step']} to {first['last_step']}: journal full" in text
    assert "× records are missing" in text
    tail = agent.run_cli("tail", run_id, "--once", "--json", "-n", "100000").stdout.splitlines()
    told = [json.loads(line)["gap"]["records"] for line in tail if '"gap"' in line]
    assert sum(told) == len(missing)
    export = agent.run_cli("export", run_id, "--gaps", "--format", "csv").stdout.splitlines()
    assert export[0] == (
        "source,attempt,reason,first_step,last_step,first_time_ns,last_time_ns,records"
    )
    assert len(export) == 1 + len(shown["gaps"])
    warned = agent.run_cli("export", run_id).stderr
    assert "records of this run were refused" in warned
