"""An agent whose spool is new goes on with ranks that were there before."""

from __future__ import annotations

import shutil

from tests.fakes import (
    AgentProcess,
    Folders,
    next_line,
    short_folder,
    start_script,
    wait_until,
)

PROGRAM = """
import sys
from trackagent import client

run = client.init(experiment="moved")
print(run.id, flush=True)
for step in range(10):
    client.log({"loss": float(step), "lr": 0.5}, step=step)
sys.stdin.readline()
for step in range(10, 20):
    client.log({"loss": float(step), "lr": 0.5}, step=step)
print(client.finish(), flush=True)
"""


def test_records_after_a_change_of_state_folders_can_be_read() -> None:
    base = short_folder()
    first = AgentProcess(Folders.under(base))
    second = AgentProcess(Folders(base / "dir", base / "other"))
    try:
        first.start()
        with start_script(first.folders, PROGRAM) as rank:
            run_id = next_line(rank)
            wait_until(lambda: first.run(run_id) is not None)
            wait_until(lambda: len(first.exported(run_id)) == 20)
            first.stop()
            second.start()
            assert rank.stdin is not None
            print(file=rank.stdin, flush=True)
            assert next_line(rank) == "True"
        wait_until(lambda: second.run(run_id) is not None)
        wait_until(lambda: len(second.exported(run_id)) == 20)
        steps = [point.step for point in second.exported(run_id) if point.key == "loss"]
        assert sorted(steps) == list(range(10, 20))
    finally:
        first.close()
        second.close()
        shutil.rmtree(base)
