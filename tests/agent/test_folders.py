"""Folders that are full, or deleted under a running agent: it starts all the same, and never stays deaf."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import (
    COMMAND,
    DEADLINE_S,
    AgentProcess,
    Folders,
    next_line,
    run_script,
    start_script,
    wait_until,
)

OwnAgent = Callable[..., AgentProcess]
TRAIN = """
import sys
from trackagent import client
run = client.init(experiment="folders")
for step in range(int(sys.argv[1])):
    client.log({"loss": float(step)}, step=step)
print(run.id, flush=True)
if sys.argv[2:]:
    sys.stdin.readline()
    for step in range(int(sys.argv[1]), int(sys.argv[2])):
        client.log({"loss": float(step)}, step=step)
print(client.finish(), flush=True)
"""


def fill(folder: Path) -> None:
    """Until not one page is left."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    with pytest.raises(OSError, match="No space left") as refused:
        (folder / "one more").write_bytes(b"1")
    assert refused.value.errno == errno.ENOSPC


def steps(agent: AgentProcess, run_id: str) -> list[int]:
    return sorted(point.step for point in agent.exported(run_id) if point.key == "loss")


def run_cli(folders: Folders, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        env=folders.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


# --- full


@pytest.fixture
def full_memory(small_file_system: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent, not yet started, whose folder in memory is a small file system."""
    agent = AgentProcess(Folders(small_file_system / "dir", tmp_path / "state"))
    agent.output_path = tmp_path / "agent.log"
    yield agent
    agent.close()


def test_an_agent_empties_a_full_folder(full_memory: AgentProcess, small_file_system: Path) -> None:
    folders = full_memory.folders
    variables = {"TRACKAGENT_SEGMENT_BYTES": "65536", "TRACKAGENT_EXIT_TIMEOUT_S": "0.1"}
    done = run_script(folders, TRAIN, 40_000, **variables)
    run_id, delivered = done.stdout.split()
    assert delivered == "False"
    assert shutil.disk_usage(small_file_system).free < 65536
    fill(small_file_system)
    full_memory.start().wait_for_delivery()
    assert steps(full_memory, run_id) == list(range(40_000))


def test_the_lock_of_a_full_folder_says_whose_it_is_as_soon_as_there_is_room(
    full_memory: AgentProcess, small_file_system: Path
) -> None:
    folders = full_memory.folders
    folders.directory.mkdir(mode=0o700)
    fill(small_file_system)
    process = full_memory.start().process
    assert process is not None
    lock = folders.directory / "agent.lock"
    assert lock.read_text() == ""
    assert json.loads(run_cli(folders, "status", "--json").stdout)["pid"] == process.pid
    (small_file_system / "ballast").unlink()
    wait_until(lock.read_text)
    assert json.loads(lock.read_text())["pid"] == process.pid


def test_an_agent_of_a_full_folder_can_be_stopped(
    full_memory: AgentProcess, small_file_system: Path
) -> None:
    full_memory.folders.directory.mkdir(mode=0o700)
    fill(small_file_system)
    process = full_memory.start().process
    assert process is not None
    done = run_cli(full_memory.folders, "stop")
    assert done.stdout == f"the agent (pid {process.pid}) has stopped\n"


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_an_agent_without_room_for_its_state_says_what_to_do(
    small_file_system: Path, folders: Folders, used: bool
) -> None:
    folders = Folders(folders.directory, small_file_system / "state")
    folders.state.mkdir(mode=0o700)
    if used:
        agent = AgentProcess(folders).start()
        agent.kill()
    fill(small_file_system)
    done = run_cli(folders, "start")
    said = done.stderr.splitlines()[-1]
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert str(folders.state) in said
    assert "free some space on that disk" in said


# --- deleted


def vanish(folders: Folders, what: str) -> None:
    if what == "folder":
        shutil.rmtree(folders.directory)
    elif what == "socket":
        folders.socket.unlink()
    elif what == "state":
        shutil.rmtree(folders.state)
    else:
        another = folders.directory / "another"
        another.touch()
        another.replace(folders.directory / "agent.lock")


@pytest.mark.parametrize("what", ["folder", "socket", "lock", "state"])
def test_an_agent_whose_files_are_deleted_begins_anew(
    own_agent: OwnAgent, folders: Folders, what: str
) -> None:
    agent = own_agent("--deliver-interval-s", "0.02").start()
    assert agent.process is not None
    vanish(folders, what)
    wait_until(lambda: agent.output.count("listens at") == 2, "it listens again")
    assert "was deleted or replaced under this agent" in agent.output
    run_id, delivered = run_script(folders, TRAIN, 100).stdout.split()
    agent.wait_for_status(run_id, "finished")
    shown = json.loads(agent.run_cli("status", "--json").stdout)
    assert (delivered, shown["pid"]) == ("True", agent.process.pid)
    assert (steps(agent, run_id), agent.stop()) == (list(range(100)), 0)
    assert agent.output.count("listens at") == 2


def test_a_rank_whose_folder_is_deleted_goes_on_at_the_same_agent(
    own_agent: OwnAgent, folders: Folders
) -> None:
    agent = own_agent("--deliver-interval-s", "0.02").start()
    with start_script(folders, TRAIN, 100, 200) as rank:
        run_id = next_line(rank)
        wait_until(lambda: agent.run(run_id) is not None)
        wait_until(lambda: len(steps(agent, run_id)) == 100)
        shutil.rmtree(folders.directory)
        wait_until(lambda: agent.output.count("listens at") == 2, "it listens again")
        assert rank.stdin is not None
        print(file=rank.stdin, flush=True)
        assert next_line(rank) == "True"
    agent.wait_for_status(run_id, "finished")
    assert steps(agent, run_id) == list(range(200))


def test_an_agent_whose_folder_was_deleted_can_be_seen_and_stopped(
    own_agent: OwnAgent, folders: Folders
) -> None:
    agent = own_agent().start()
    assert agent.process is not None
    # So that it cannot notice.
    agent.process.send_signal(signal.SIGSTOP)
    shutil.rmtree(folders.directory)
    seen = run_cli(folders, "status")
    told = run_cli(folders, "stop", "--timeout", "0.1")
    agent.process.send_signal(signal.SIGCONT)
    assert f"the agent (pid {agent.process.pid}) runs and does not listen" in seen.stderr
    assert (told.returncode, "has not ended within 0.1 s" in told.stderr) == (1, True)
    assert agent.process.wait(DEADLINE_S) == 0


def test_stop_leaves_the_agent_of_another_folder_alone(
    own_agent: OwnAgent, folders: Folders, tmp_path: Path
) -> None:
    agent = own_agent().start()
    done = run_cli(Folders(tmp_path / "other", folders.state), "stop")
    assert agent.process is not None
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            f"no agent runs for {tmp_path / 'other'}",
            f"{folders.state} is used by the agent of {folders.directory} (pid {agent.process.pid}): "
            f"trackagent stop --dir {folders.directory}",
        ],
    )
    assert json.loads(agent.run_cli("status", "--json").stdout)["directory"] == str(
        folders.directory
    )
