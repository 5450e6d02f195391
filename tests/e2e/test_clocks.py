"""Clocks that are wrong: everything arrives, with the times that they told."""

from __future__ import annotations

from tests.fakes import AgentProcess, run_script

# Its clock stands at the beginning of 1969, and of what it logs some is refused and counted.
BEFORE_1970 = """
import time
told, years = time.time_ns, time.time_ns() + 364 * 86_400 * 10**9
time.time_ns = lambda: told() - years
from trackagent import client
run = client.init(experiment="clock", params={"lr": 0.1})
for step in range(100):
    client.log({"loss": float(step)}, step=step)
client.log({"loss": object()}, step=100)
client.event("over")
print(run.id, client.finish())
"""


def test_a_rank_whose_clock_stands_before_1970_is_stored_and_shown(agent: AgentProcess) -> None:
    run_id, delivered = run_script(agent.folders, BEFORE_1970).stdout.split()
    assert delivered == "True"
    run = agent.wait_for_status(run_id, "finished")
    assert (run.start_time_ns, run.lost_records) == (0, 1)
    assert sorted(point.step for point in agent.exported(run_id)) == list(range(100))
    shown = agent.shown(run_id)
    assert [event["message"] for event in shown["events"]] == ["over"]
    assert shown["gaps"] == []
    for command in (["runs"], ["show", run_id], ["tail", run_id, "--once"]):
        agent.run_cli(*command)
    agent.wait_for_delivery()
    assert not (agent.folders.state / "quarantine").exists()
