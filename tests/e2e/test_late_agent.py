"""Training without an agent, with a late one, or one that hangs: nothing waits for it, nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes import (
    DEADLINE_S,
    AgentProcess,
    Folders,
    Point,
    next_line,
    run_script,
    start_script,
)

# Prints how long finish() took.
TRAINING = """
import time
from trackagent import client

run = client.init(experiment="late", params={"lr": 0.1})
for step in range(100):
    client.log({"loss": step / 7}, step=step)
client.event("halfway", "warning", step=50)
start = time.monotonic()
delivered = client.finish()
print(run.id, delivered, time.monotonic() - start)
"""
EVERY_POINT = [Point("loss", "rank 0", step, step / 7) for step in range(100)]


def train(folders: Folders, **variables: str) -> tuple[str, bool, float, str]:
    """Run id, whether finish() had delivered, its seconds, stderr."""
    done = run_script(folders, TRAINING, **variables)
    run_id, delivered, seconds = done.stdout.split()
    return run_id, delivered == "True", float(seconds), done.stderr


def test_an_agent_that_starts_after_training_has_ended_delivers_everything(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    run_id, *_ = train(folders)
    agent = own_agent().start()
    agent.wait_for_status(run_id, "finished")
    shown = agent.shown(run_id)
    events = [(event["message"], event["step"]) for event in shown["events"]]
    assert agent.exported(run_id) == EVERY_POINT
    assert (shown["params"], events) == ({"lr": "0.1"}, [("halfway", 50)])
    agent.wait_for_no_journals()


def test_runs_that_ended_without_an_agent_are_all_delivered(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    run_ids = [train(folders)[0] for _ in range(3)]
    agent = own_agent().start()
    for run_id in run_ids:
        agent.wait_for_status(run_id, "finished")
        assert agent.exported(run_id) == EVERY_POINT


def test_an_agent_that_starts_in_the_middle_of_training_gets_everything(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    program = TRAINING.replace("client.event", "print(run.id, flush=True)\ninput()\nclient.event")
    process = start_script(folders, program)
    run_id = next_line(process)
    agent = own_agent().start()
    output, _ = process.communicate("\n", timeout=30)
    assert output.split()[1] == "True"
    agent.wait_for_status(run_id, "finished")
    assert agent.exported(run_id) == EVERY_POINT


def test_finish_without_an_agent_returns_within_seconds(folders: Folders) -> None:
    _, delivered, seconds, _ = train(folders)
    assert not delivered
    assert seconds < 3.0


def test_finish_without_an_agent_says_where_the_data_is_and_what_to_do(folders: Folders) -> None:
    *_, errors = train(folders)
    assert errors == (
        "not everything was delivered before the end: the rest is kept in "
        f"{folders.directory} and delivered by the next agent on this node (`trackagent start`)\n"
    )


def test_a_script_without_finish_is_finished_and_delivered_at_its_end(agent: AgentProcess) -> None:
    program = TRAINING.replace("client.finish()", "None")
    run_id = run_script(agent.folders, program).stdout.split()[0]
    run = agent.wait_for_status(run_id, "finished")
    assert (run.records_logged, len(agent.exported(run_id))) == (100, 100)


@pytest.fixture
def stopped_agent(own_agent: Callable[..., AgentProcess]) -> AgentProcess:
    """An agent that does nothing any more, its socket open."""
    process = own_agent().start()
    assert process.process is not None
    process.process.send_signal(signal.SIGSTOP)
    return process


def test_finish_is_bounded_when_the_agent_hangs(
    folders: Folders, stopped_agent: AgentProcess
) -> None:
    _, delivered, seconds, errors = train(folders, TRACKAGENT_EXIT_TIMEOUT_S="1")
    assert not delivered
    assert 1.0 <= seconds < DEADLINE_S
    assert str(folders.directory) in errors


def test_an_agent_that_hung_during_training_delivers_when_it_goes_on(
    folders: Folders, stopped_agent: AgentProcess
) -> None:
    run_id, *_ = train(folders, TRACKAGENT_EXIT_TIMEOUT_S="0.5")
    assert stopped_agent.process is not None
    stopped_agent.process.send_signal(signal.SIGCONT)
    stopped_agent.wait_for_status(run_id, "finished")
    stopped_agent.wait_for_delivery()
    assert stopped_agent.exported(run_id) == EVERY_POINT


def test_the_exit_hook_leaves_the_exit_status_and_the_traceback_alone(folders: Folders) -> None:
    program = """
from trackagent import client
client.init(experiment="endings")
raise ValueError("no such layer")
"""
    done = run_script(folders, program, expect=1)
    assert done.stderr.splitlines()[:3] == [
        "Traceback (most recent call last):",
        '  File "<string>", line 4, in <module>',
        "ValueError: no such layer",
    ]


def test_ctrl_c_marks_the_run_killed(agent: AgentProcess) -> None:
    program = """
from trackagent import client
run = client.init(experiment="endings")
client.log({"loss": 1.0}, step=0)
print(run.id, flush=True)
while True:
    client.log({"loss": 1.0})
"""
    process = start_script(agent.folders, program)
    run_id = next_line(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    run = agent.wait_for_status(run_id, "killed")
    assert run.error == "KeyboardInterrupt"


def test_a_finished_run_leaves_no_journal(agent: AgentProcess) -> None:
    program = (
        TRAINING
        + """
from pathlib import Path
from trackagent.client.config import default_directory, default_state_directory
folders = default_directory(), default_state_directory()
print([str(path) for folder in folders for path in folder.glob("journals/*")])
"""
    )
    assert run_script(agent.folders, program).stdout.splitlines()[1:] == ["[]"]


def test_a_finished_run_leaves_no_thread(agent: AgentProcess) -> None:
    program = (
        TRAINING
        + """
import threading, time
deadline = time.monotonic() + 30  # gRPC's own end when they get to it
while threading.active_count() > 1 and time.monotonic() < deadline:
    time.sleep(0.01)
print([thread.name for thread in threading.enumerate()])
"""
    )
    output = run_script(agent.folders, program).stdout.splitlines()
    assert output[1:] == ["['MainThread']"]


def test_grpc_is_not_shut_down_between_two_connections(agent: AgentProcess) -> None:
    # Who makes a channel meanwhile waits for it, for up to 10 s, and all other threads with them.
    program = (
        TRAINING
        + """
import contextlib, os, pathlib, time
def connected():
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                return True
    return False
while connected():
    time.sleep(0.01)
names = set()
for task in pathlib.Path("/proc/self/task").iterdir():
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        names.add((task / "comm").read_text().strip())
print("event_engine" in names)
"""
    )
    assert run_script(agent.folders, program).stdout.splitlines()[1:] == ["True"]


@pytest.mark.parametrize("connected", [True, False], ids=["delivered", "without an agent"])
def test_a_finished_run_leaves_no_descriptor_and_no_mapping(
    agent: AgentProcess, folders: Folders, connected: bool
) -> None:
    program = (
        TRAINING
        + """
import os, pathlib
from trackagent.client.config import default_directory
base = str(default_directory().parent)
links = []
for descriptor in os.listdir("/proc/self/fd"):
    try:
        links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    except FileNotFoundError:
        pass  # the listing's own
print([link for link in links if link.startswith(base)])
print([line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if base in line])
"""
    )
    output = run_script(agent.folders if connected else folders, program).stdout.splitlines()
    assert output[1:] == ["[]", "[]"]


def test_the_agents_folders_hold_no_file_of_a_delivered_run(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    run_id, *_ = train(folders)
    agent = own_agent().start()
    agent.wait_for_status(run_id, "finished")
    agent.wait_for_no_journals()
    assert agent.stop() == 0

    def files(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    assert files(folders.directory) == ["agent.lock", "journals"]
