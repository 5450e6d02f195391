"""At their caps: nothing waits, nothing is dropped in silence, and everything flows on when there is room."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import (
    COMMAND,
    DEADLINE_S,
    AgentProcess,
    Folders,
    holes,
    logged_records,
    next_line,
    run_script,
    said,
    start_script,
    wait_until,
)
from trackagent.agent.config import STORE_NAME
from trackagent.client.record import Kind

OwnAgent = Callable[..., AgentProcess]


@contextlib.contextmanager
def locked(folders: Folders) -> Iterator[None]:
    """The store of a running agent, so that it cannot be written."""
    path = folders.state / STORE_NAME
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def waiting(folders: Folders) -> int:
    """Batches in the spool of an agent that is gone."""
    with contextlib.closing(sqlite3.connect(folders.state / "spool.db")) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM batches").fetchone()[0])


# --- a sink that is down

TRAIN = """
from trackagent import client
run = client.init(experiment="down")
for step in range(500):
    client.log({"loss": float(step)}, step=step)
print(run.id, client.finish())
"""


def test_shutting_down_while_a_sink_is_down_deletes_nothing(
    own_agent: OwnAgent, folders: Folders
) -> None:
    agent = own_agent("--deliver-interval-s", "0.02", "--drain-timeout-s", "0.2").start()
    with locked(folders):
        run_id, delivered = run_script(folders, TRAIN).stdout.split()
        code = agent.stop()
        assert (delivered, code) == ("True", 0)
        assert re.search(r"1 batch stays|\d+ batches stay in the spool", agent.output)
        assert waiting(folders) > 0
        # What was acknowledged is the spool's alone now.
        assert folders.journals() == []
    agent.start()
    agent.wait_for_status(run_id, "finished")
    assert sorted(point.step for point in agent.exported(run_id)) == list(range(500))
    assert agent.shown(run_id)["losses"] == {}


BIG = """
import sys
from trackagent import client
run = client.init(experiment="big")
for number in range(3_600):
    run.event(f"{number} " + "x" * 5_900)
print(run.id, flush=True)
sys.stdin.readline()
print(client.finish(), flush=True)
"""


def test_a_full_spool_pushes_back_drops_nothing_and_flows_on(
    own_agent: OwnAgent, folders: Folders
) -> None:
    agent = own_agent(
        *("--spool-bytes", str(16 << 20), "--max-batch-bytes", str(1 << 20)),
        *("--deliver-interval-s", "0.02"),
    ).start()

    def spooled() -> int:
        status = json.loads(agent.run_cli("status", "--json").stdout)
        assert status["spool"]["bytes"] <= status["spool"]["max_bytes"] == 16 << 20
        return int(status["spool"]["bytes"])

    with start_script(folders, BIG, TRACKAGENT_EXIT_TIMEOUT_S="50") as process:
        with locked(folders):
            run_id = next_line(process)
            # 21 MB: more than fits. The rest waits in the journal.
            wait_until(lambda: spooled() > 15 << 20, "the spool is full")
            (journal,) = folders.journals()
            assert list(journal.glob("*.seg")) != []
        output, errors = process.communicate("\n", timeout=DEADLINE_S)
        assert output == "True\n", errors
    agent.wait_for_status(run_id, "finished")
    # The last word may come before the last events, which wait in another lane.
    agent.wait_for_delivery()
    shown = agent.shown(run_id)
    numbers = [int(event["message"].split()[0]) for event in shown["events"]]
    assert (sorted(numbers), shown["losses"]) == (list(range(3_600)), {})


# --- file systems that are full

FILL = """
import sys, threading
from trackagent import client
run = client.init(experiment="small")
for thread in threading.enumerate():
    if thread.name == "trackagent-git":
        thread.join()
step = 0
while step < 60_000:
    client.log({"loss": float(step)})
    step += 1
print("full", flush=True)
sys.stdin.readline()
while step < 60_100:
    client.log({"loss": float(step)})
    step += 1
    if step % 10 == 0:
        import time
        time.sleep(0.02)
client.finish()
"""


def test_full_memory_and_a_full_disk_refuse_count_and_go_on(small_file_system: Path) -> None:
    """As in a container with a small /dev/shm and a full disk: the process gets no SIGBUS."""
    folders = Folders.under(small_file_system)
    ballast = small_file_system / "ballast"
    ballast.write_bytes(bytes(300_000))
    variables = {"TRACKAGENT_SEGMENT_BYTES": "65536", "TRACKAGENT_MEMORY_BYTES": "262144"}
    with start_script(folders, FILL, **variables) as process:
        assert next_line(process) == "full"
        # In memory first, then on the disk, which is the same small file system here.
        assert [len(list(path.glob("*.seg"))) > 1 for path in folders.journals()] == [True, True]
        wait_until(lambda: said(folders, Kind.GAP), "the hole is told while all is full")
        ballast.unlink()
        process.communicate("\n", timeout=DEADLINE_S)
    assert process.returncode == 0
    steps = {one.step for one in logged_records(folders)}
    missing = holes(folders)
    assert (steps | missing, steps & missing) == (set(range(60_100)), set())
    assert 60_099 in steps
    assert said(folders, Kind.LOSS)[-1] == {"journal full": len(missing)}


# --- files that may be open


def limited(files: int, *, hard: int | None = None) -> tuple[str, ...]:
    """`trackagent` with so many open files allowed."""
    limits = f"ulimit -Sn {files}" + (f" && ulimit -Hn {hard}" if hard else "")
    return ("sh", "-c", f'{limits}; exec "$0" "$@"', str(COMMAND))


def test_the_agent_takes_as_many_files_as_it_may_have(folders: Folders) -> None:
    agent = AgentProcess(folders, command=limited(128, hard=2048))
    try:
        process = agent.start().process
        assert process is not None
        limits = Path(f"/proc/{process.pid}/limits").read_text()
    finally:
        agent.close()
    assert re.search(r"Max open files +2048 +2048 ", limits)
    assert "max_streams" not in agent.output


def test_an_agent_without_a_file_to_open_goes_on_and_says_so(folders: Folders) -> None:
    agent = AgentProcess(folders, "--deliver-interval-s", "0.02", command=limited(64, hard=64))
    try:
        process = agent.start().process
        assert process is not None
        assert "may open 64 files, so about 0 ranks can connect" in agent.output
        with contextlib.ExitStack() as connections:
            for _ in range(200):
                one = connections.enter_context(socket.socket(socket.AF_UNIX))
                one.settimeout(1.0)
                one.connect(str(folders.socket))
            open_files = Path(f"/proc/{process.pid}/fd")
            wait_until(lambda: len(os.listdir(open_files)) >= 64, "no file can be opened")
            wait_until(lambda: "Too many open files" in agent.output, "it says so")
            done = run_script(folders, TRAIN, TRACKAGENT_EXIT_TIMEOUT_S="1")
            run_id, delivered = done.stdout.split()
            assert (delivered, process.poll()) == ("False", None)
        agent.wait_for_status(run_id, "finished")
        steps = sorted(point.step for point in agent.exported(run_id))
    finally:
        agent.close()
    assert steps == list(range(500))


# Begins with so few descriptors left, and has room again when it is told so.
SHORT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.dup(1))
except OSError:
    pass
for _ in range(int(sys.argv[1])):
    os.close(taken.pop())
from trackagent import client
run = client.init(experiment="short")
for step in range(100):
    client.log({"loss": float(step)}, step=step)
print(run.id, flush=True)
sys.stdin.readline()
for descriptor in taken:
    os.close(descriptor)
for step in range(100, 200):
    client.log({"loss": float(step)}, step=step)
print(client.finish(), flush=True)
"""


@pytest.mark.parametrize("free", [6, 12])
def test_a_rank_that_is_short_of_files_says_so_and_sends_when_it_has_some(
    agent: AgentProcess, free: int
) -> None:
    with start_script(agent.folders, SHORT, free) as process:
        run_id = next_line(process)
        warning = process.stderr.readline()
        assert "of the 64 files that this process may have open, fewer than 20 are left" in warning
        output, errors = process.communicate("\n", timeout=DEADLINE_S)
    assert (process.returncode, output, errors) == (0, "True\n", "")
    agent.wait_for_status(run_id, "finished")
    assert sorted(point.step for point in agent.exported(run_id)) == list(range(200))
