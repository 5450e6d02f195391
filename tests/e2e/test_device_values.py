"""Values of a device all the way to the store: what comes, what a kill takes, and what the run says of it."""

from __future__ import annotations

import signal

from tests.fakes import AgentProcess, Point, next_line, run_script, start_script, wait_until

# A run on a device whose copies land when told to.
BEGIN = """
import sys, threading
from tests.client.devices import DeviceTensor, FakeDevices
from trackagent.client.config import ClientConfig
from trackagent.client.device import Rings
from trackagent.client.identity import decide
from trackagent.client.run import Run

devices = FakeDevices()
who = decide(run_id=None, timeout_s=10.0).identity
run = Run(config=ClientConfig.load(), who=who, experiment="device", rings=Rings(lambda: devices))
"""


def test_values_of_a_device_are_stored_beside_the_hosts(agent: AgentProcess) -> None:
    program = f"""{BEGIN}
for step in range(300):
    run.log({{"loss": DeviceTensor(step / 7), "lr": 0.1 * step}}, step=step)
    devices.land(-1 if step % 3 else 0)
devices.land_all()
print(run.id, run.finish())
"""
    run_id, delivered = run_script(agent.folders, program).stdout.split()
    assert delivered == "True"
    run = agent.wait_for_status(run_id, "finished")
    assert (run.records_stored, run.records_logged, run.lost_records) == (600, 600, 0)
    logged = {Point("loss", "rank 0", step, step / 7) for step in range(300)}
    logged |= {Point("lr", "rank 0", step, 0.1 * step) for step in range(300)}
    assert set(agent.exported(run_id)) == logged


def test_what_never_came_is_a_hole_in_the_run(agent: AgentProcess) -> None:
    program = f"""{BEGIN}
for step in range(5):
    run.log({{"loss": DeviceTensor(1.0), "lr": 0.1}}, step=step)
devices.land(4)
devices.land(0)
run.finish()
print(run.id)
"""
    run_id = run_script(agent.folders, program, TRACKAGENT_EXIT_TIMEOUT_S="1").stdout.strip()
    run = agent.wait_for_status(run_id, "finished")
    assert (run.records_stored, run.lost_records) == (7, 3)
    loss = [point.step for point in agent.exported(run_id) if point.key == "loss"]
    assert sorted(loss) == [0, 4]
    assert "not computed in time" in agent.run_cli("show", run_id).stdout


def test_a_kill_takes_what_the_device_had_not_computed_and_nothing_else(
    agent: AgentProcess,
) -> None:
    program = f"""{BEGIN}
run.log({{"loss": DeviceTensor(0.0), "lr": 0.0}}, step=0)
devices.land()
print(run.id, flush=True)
sys.stdin.readline()
for step in range(1, 9):
    run.log({{"loss": DeviceTensor(1.0), "lr": 0.1}}, step=step)
print("logged", flush=True)
threading.Event().wait()
"""
    with start_script(agent.folders, program) as process:
        run_id = next_line(process)
        wait_until(lambda: (run := agent.run(run_id)) is not None and run.records_stored == 2)
        assert process.stdin is not None
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert next_line(process) == "logged"
        process.send_signal(signal.SIGKILL)
    assert agent.wait_for_status(run_id, "killed").records_stored == 10
    agent.wait_for_delivery()
    steps = [(point.key, point.step) for point in agent.exported(run_id)]
    assert sorted(steps) == [("loss", 0), *(("lr", step) for step in range(9))]
