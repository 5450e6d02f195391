"""Processes that a rank makes: DataLoader workers, forks, spawned ones, other programs."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes import (
    DEADLINE_S,
    AgentProcess,
    Point,
    next_line,
    run_script,
    start_script,
    wait_until,
)

# 4 forked workers log one record a sample, the rank one a batch. Prints the worker of each sample.
LOADER = """
import os, warnings
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from trackagent import client

class Samples(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        client.log({"worker/sample": index, "worker/number": get_worker_info().id}, step=index)
        return torch.tensor([index, os.getpid()])

warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")  # for few cores
run = client.init(experiment="loader")
client.log({"loss": torch.tensor(-1.0)})
made = {}
for epoch in range(2):
    loader = DataLoader(Samples(), batch_size=4, num_workers=4, multiprocessing_context="fork")
    for batch in loader:
        for index, pid in batch.tolist():
            print(epoch, index, pid)
        client.log({"loss": batch[:, 0].float().mean()})
print(run.id, client.finish())
"""


def series(points: list[Point], key: str) -> Counter[tuple[str, int, float]]:
    return Counter((p.source, p.step, p.value) for p in points if p.key == key)


def test_dataloader_workers_log_beside_the_rank_that_forked_them(agent: AgentProcess) -> None:
    *samples, end = run_script(agent.folders, LOADER).stdout.splitlines()
    run_id, delivered = end.split()
    assert delivered == "True"
    run = agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    points = agent.exported(run_id)
    expected = Counter(
        (f"rank 0 pid {pid}", int(index), float(index))
        for epoch, index, pid in (line.split() for line in samples)
    )
    assert expected.total() == 128
    assert series(points, "worker/sample") == expected
    assert [(p.source, p.step) for p in points if p.key == "loss"] == [
        ("rank 0", step) for step in range(33)
    ]
    assert (run.ranks, run.lost_records) == (1, 0)


# Logs, forks a child that outlives it, and waits to be killed. The child logs if argv[1] says so, tells its
# pid, and waits until its stdin is closed.
OUTLIVED = """
import os, signal, sys
from trackagent import client

run = client.init(experiment="outlived")
client.log({"loss": 1.0}, step=0)
if os.fork() == 0:
    if sys.argv[1] == "logs":
        client.log({"worker": 1.0}, step=0)
    print(run.id, os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("worker", ["logs", "is silent"])
def test_a_worker_that_outlives_its_rank_does_not_hide_the_death(
    agent: AgentProcess, worker: str
) -> None:
    process = start_script(agent.folders, OUTLIVED, worker)
    run_id, pid = next_line(process).split()
    process.kill()
    process.wait(DEADLINE_S)
    run = agent.wait_for_status(run_id, "killed")
    assert Path(f"/proc/{pid}").exists()
    assert run.error == "the process ended without finish()"
    process.communicate(timeout=DEADLINE_S)


def test_what_a_living_worker_logs_is_stored_while_it_lives(agent: AgentProcess) -> None:
    with start_script(agent.folders, OUTLIVED, "logs") as process:
        run_id, pid = next_line(process).split()
        process.kill()
        agent.wait_for_status(run_id, "killed")
        logged = Point("worker", f"rank 0 pid {pid}", 0, 1.0)
        wait_until(lambda: logged in agent.exported(run_id), "what the worker logged is stored")
        assert Path(f"/proc/{pid}").exists()


FORK = """
import os
from trackagent import client

run = client.init(experiment="fork")
client.log({"before": 1.0}, step=0)
pids = []
for child in range(3):
    pid = os.fork()
    if pid == 0:
        for step in range(1000):
            client.log({"child": step}, step=step)
        os._exit(0)
    pids.append(pid)
for step in range(1000):
    client.log({"parent": step}, step=step)
for pid in pids:
    os.waitpid(pid, 0)
print(run.id, client.finish(), *pids)
"""


def test_forked_children_that_end_without_finish_lose_nothing(agent: AgentProcess) -> None:
    run_id, delivered, *pids = run_script(agent.folders, FORK).stdout.split()
    assert delivered == "True"
    agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    points = agent.exported(run_id)
    steps = range(1000)
    assert series(points, "parent") == Counter(("rank 0", step, step) for step in steps)
    assert series(points, "child") == Counter(
        (f"rank 0 pid {pid}", step, step) for pid in pids for step in steps
    )
    assert series(points, "before") == Counter([("rank 0", 0, 1.0)])


def test_forked_children_decide_nothing_about_the_run(agent: AgentProcess) -> None:
    program = """
import os
from trackagent import client

run = client.init(experiment="fork")
pid = os.fork()
if pid == 0:
    client.log({"child": 1.0})
    client.finish("failed", "the child's own trouble")
    os._exit(0)
os.waitpid(pid, 0)
client.log({"parent": 1.0})
print(run.id, client.finish())
"""
    run_id, delivered = run_script(agent.folders, program).stdout.split()
    assert delivered == "True"
    run = agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    assert (run.error, run.ranks) == ("", 1)
    assert len(agent.exported(run_id)) == 2


def test_a_forked_child_of_a_forked_child_logs(agent: AgentProcess) -> None:
    program = """
import os
from trackagent import client

run = client.init(experiment="fork")
child = os.fork()
if child == 0:
    client.log({"child": 1.0})
    grandchild = os.fork()
    if grandchild == 0:
        client.log({"grandchild": 1.0})
        os._exit(0)
    os.waitpid(grandchild, 0)
    client.log({"child": 2.0})
    os._exit(0)
os.waitpid(child, 0)
print(run.id, client.finish())
"""
    run_id, _ = run_script(agent.folders, program).stdout.split()
    agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    values = sorted((point.key, point.value) for point in agent.exported(run_id))
    assert values == [("child", 1.0), ("child", 2.0), ("grandchild", 1.0)]


def test_a_multiprocessing_fork_that_logs_nothing_leaves_nothing(agent: AgentProcess) -> None:
    program = """
import multiprocessing
from trackagent import client

run = client.init(experiment="fork")
worker = multiprocessing.get_context("fork").Process(target=print, args=("worked",))
worker.start()
worker.join()
client.log({"loss": 1.0})
print(run.id, client.finish(), worker.exitcode)
"""
    worked, end = run_script(agent.folders, program).stdout.splitlines()
    run_id, delivered, code = end.split()
    assert (worked, delivered, code) == ("worked", "True", "0")
    agent.wait_for_status(run_id, "finished")
    assert agent.shown(run_id)["ranks"] == 1
    assert [point.source for point in agent.exported(run_id)] == ["rank 0"]


def test_a_spawned_process_logs_as_the_rank_that_it_says_it_is(
    agent: AgentProcess, tmp_path: Path
) -> None:
    script = tmp_path / "spawning.py"
    script.write_text("""
import multiprocessing, os
from trackagent import client

def work(run_id):
    os.environ["RANK"] = "1"
    client.init(experiment="spawn", run_id=run_id)
    client.log({"loss": 11.0}, step=0)
    assert client.finish()

if __name__ == "__main__":
    os.environ.update(RANK="0", WORLD_SIZE="2")
    run = client.init(experiment="spawn", run_id="ab" * 16)
    client.log({"loss": 10.0}, step=0)
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(run.id,))
    worker.start()
    worker.join()
    client.finish()
    print(worker.exitcode)
""")
    done = run_script(
        agent.folders, f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    assert done.stdout == "0\n", done.stderr
    run_id = "ab" * 16
    agent.wait_for_status(run_id, "finished")
    assert sorted(agent.exported(run_id)) == [
        Point("loss", "rank 0", 0, 10.0),
        Point("loss", "rank 1", 0, 11.0),
    ]


def test_programs_may_be_started_while_threads_log(agent: AgentProcess) -> None:
    program = """
import subprocess, threading
from trackagent import client

run = client.init(experiment="subprocess")
done = threading.Event()
counts = [0, 0]

def work(thread):
    while not done.is_set() or counts[thread] < 100:
        client.log({f"t{thread}": counts[thread]}, step=counts[thread])
        counts[thread] += 1
        done.wait(0.0001)

threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    assert subprocess.run(["true"]).returncode == 0
    assert subprocess.run(["true"], preexec_fn=lambda: None).returncode == 0
done.set()
for thread in threads:
    thread.join()
print(run.id, client.finish(), *counts)
"""
    run_id, delivered, *counts = run_script(agent.folders, program).stdout.split()
    assert delivered == "True"
    agent.wait_for_status(run_id, "finished")
    points = agent.exported(run_id)
    assert Counter((point.key, point.step) for point in points) == Counter(
        (f"t{thread}", step) for thread, count in enumerate(counts) for step in range(int(count))
    )


def test_a_started_program_does_not_hold_the_journal(agent: AgentProcess) -> None:
    program = """
import os, subprocess, sys
from trackagent import client

run = client.init(experiment="subprocess")
client.log({"loss": 1.0})
nowhere = subprocess.DEVNULL
child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=nowhere, stderr=nowhere)
print(run.id, child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = run_script(agent.folders, program, expect=-signal.SIGKILL)
    run_id, pid = done.stdout.split()
    try:
        agent.wait_for_status(run_id, "killed")
        assert Path(f"/proc/{pid}").exists()
    finally:
        os.kill(int(pid), signal.SIGKILL)
