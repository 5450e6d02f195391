"""log() from many threads at once: every record arrives, once."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fakes import AgentProcess, run_script

# 8 threads, each 2000 records; argv[1]: the arguments of log() after the dict.
TRAINING = """
import sys, threading
from trackagent import client

sys.setswitchinterval(1e-5)  # as often as possible in the middle of a call
run = client.init(experiment="threads")
log = eval(f"lambda thread, i: client.log({{f't{{thread}}': i}}, {sys.argv[1]})")
barrier = threading.Barrier(8)

def work(thread):
    barrier.wait()
    for i in range(2000):
        log(thread, i)

threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
client.finish()
print(run.id)
"""


@pytest.mark.parametrize("how", ["step=i", "i, 1000.0 + i", ""], ids=["step", "timestamp", "bare"])
def test_every_record_of_eight_threads_is_stored_once(agent: AgentProcess, how: str) -> None:
    run_id = run_script(agent.folders, TRAINING, how).stdout.strip()
    run = agent.wait_for_status(run_id, "finished")
    points = agent.exported(run_id)
    assert Counter((point.key, point.value) for point in points) == Counter(
        (f"t{thread}", float(i)) for thread in range(8) for i in range(2000)
    )
    assert (run.records_logged, run.lost_records) == (16_000, 0)


def test_explicit_steps_of_eight_threads_stay_with_their_values(agent: AgentProcess) -> None:
    run_id = run_script(agent.folders, TRAINING, "step=i").stdout.strip()
    agent.wait_for_status(run_id, "finished")
    assert [point for point in agent.exported(run_id) if point.step != point.value] == []


def test_refusals_of_eight_threads_are_all_counted(agent: AgentProcess) -> None:
    program = TRAINING.replace("': i}", "': None}")
    run_id = run_script(agent.folders, program, "").stdout.strip()
    agent.wait_for_status(run_id, "finished")
    assert agent.shown(run_id)["losses"] == {"not a number": 16_000}
