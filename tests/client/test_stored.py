"""What a run records, through an agent, as the store holds it."""

from __future__ import annotations

import contextlib

import numpy as np

from tests.fakes import AgentProcess, run_script
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader


def test_every_bit_of_a_value_arrives_in_the_store(agent: AgentProcess) -> None:
    program = """
import math, struct, sys
from trackagent import client

def nan(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]

values = [0.1, -0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, math.pi, 2.0**53 + 2,
          nan(0x7FF8000000000001), nan(0xFFF80000DEADBEEF)]
run = client.init(experiment="bits")
for value in values:
    client.log({"x": value})
client.finish()
print(run.id, *(struct.pack("<d", value).hex() for value in values))
"""
    run_id, *expected = run_script(agent.folders, program).stdout.split()
    agent.wait_for_status(run_id, "finished")
    with contextlib.closing(open_reader(agent.folders.state / STORE_NAME)) as reader:
        values = np.concatenate([block.values[0] for block in reader.export(run_id)])
    assert [value.tobytes().hex() for value in values] == expected


def test_what_was_refused_is_shown_in_the_run(agent: AgentProcess) -> None:
    program = """
from trackagent import client

run = client.init(experiment="losses")
for _ in range(5):
    client.log({"loss": "high", "lr": 0.1})
client.log({"loss": 1.0}, step=0.5)
print(run.id, client.finish())
"""
    done = run_script(agent.folders, program)
    run_id, delivered = done.stdout.split()
    agent.wait_for_status(run_id, "finished")
    shown = agent.shown(run_id)
    assert (delivered, shown["lost_records"]) == ("True", 6)
    assert shown["losses"] == {"not a number": 5, "bad step": 1}
    assert done.stderr.splitlines() == [
        "'loss' is a str, 'high', which is no number: log a float",
        "the step 0.5 is no whole number",
    ]


def test_settings_of_a_run_arrive_in_the_store(agent: AgentProcess) -> None:
    program = """
from trackagent import client

params = {"model": {"depth": 3}}
run = client.init(experiment="settings", run_name="first try", params=params, tags={"team": "a"})
client.set_tags({"team": "b"})
client.event("odd", "error", step=4)
client.finish()
print(run.id)
"""
    run_id = run_script(agent.folders, program).stdout.strip()
    run = agent.wait_for_status(run_id, "finished")
    shown = agent.shown(run_id)
    assert (run.name, run.experiment) == ("first try", "settings")
    assert (shown["params"], shown["tags"]["team"]) == ({"model.depth": "3"}, "b")
    assert [(one["level"], one["message"], one["step"]) for one in shown["events"]] == [
        ("error", "odd", 4)
    ]


FORK = """
import os, time
from trackagent import client
from trackagent.client.config import default_directory

run = client.init(experiment="fork")
before = set(default_directory().glob("journals/*"))
pid = os.fork()
if pid == 0:
    WORK
    os._exit(0)
os.waitpid(pid, 0)
print(run.id, client.finish())
"""


def test_a_forked_child_counts_and_warns_too(agent: AgentProcess) -> None:
    program = FORK.replace("WORK", "for _ in range(3): client.log({'loss': None})")
    done = run_script(agent.folders, program)
    run_id, _ = done.stdout.split()
    agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    assert agent.shown(run_id)["losses"] == {"not a number": 3}
    assert done.stderr == "'loss' is a NoneType, None, which is no number: log a float\n"


def test_a_forked_child_may_log_more_in_all_than_a_journal_holds(agent: AgentProcess) -> None:
    work = """
    for step in range(8000):
        client.log({"loss": float(step)}, step=step)
        deadline = time.monotonic() + 20
        while step % 500 == 0:
            own = set(default_directory().glob("journals/*")) - before
            if len([path for folder in own for path in folder.glob("*.seg")]) <= 3:
                break
            assert time.monotonic() < deadline, own
            time.sleep(0.01)
"""
    done = run_script(
        agent.folders,
        FORK.replace("    WORK\n", work),
        TRACKAGENT_SEGMENT_BYTES="65536",
        TRACKAGENT_JOURNAL_BYTES=str(4 * 65536),
    )
    run_id, _ = done.stdout.split()
    assert done.stderr == ""
    agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    assert [point.step for point in agent.exported(run_id)] == list(range(8000))
    assert agent.shown(run_id)["lost_records"] == 0
