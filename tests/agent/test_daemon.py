"""The agent's process: one for each folder, gone cleanly when told to, back without a loss when killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest

from tests.agent.samples import RUN_ID, journal, log_losses
from tests.fakes import COMMAND, DEADLINE_S, AgentProcess, Folders, start_script, wait_until
from trackagent.agent import daemon
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

OwnAgent = Callable[..., AgentProcess]
MANY = range(2000)


def left_behind(folders: Folders, steps: range = MANY) -> None:
    """The journal of a rank that is gone."""
    target = journal(folders)
    log_losses(target, steps)
    target.close()


def stored(agent: AgentProcess) -> list[int]:
    """The steps of the losses of RUN_ID, as exported."""
    return [point.step for point in agent.exported(RUN_ID)]


def status(folders: Folders) -> agent_pb2.StatusResponse:
    with grpc.insecure_channel(f"unix:{folders.socket}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        return stub.Status(agent_pb2.StatusRequest(), timeout=DEADLINE_S)


def refused(directory: Path, state: Path) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of an agent that cannot start."""
    done = subprocess.run(
        [COMMAND, "start"],
        env=Folders(directory, state).environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()


# --- starting


def test_the_socket_is_for_its_owner_alone(agent: AgentProcess) -> None:
    assert stat.S_IMODE(agent.folders.socket.stat().st_mode) == 0o600


def test_status_names_the_process_and_its_folders(agent: AgentProcess) -> None:
    assert agent.process is not None
    answer = status(agent.folders)
    assert (answer.pid, answer.directory, answer.state_directory) == (
        agent.process.pid,
        str(agent.folders.directory),
        str(agent.folders.state),
    )


@pytest.mark.parametrize("shared", ["directory", "state"])
def test_a_second_agent_on_the_same_folder_is_refused_with_the_firsts_pid(
    agent: AgentProcess, tmp_path: Path, shared: str
) -> None:
    assert agent.process is not None
    held: Path = getattr(agent.folders, shared)
    second = {"directory": tmp_path / "dir", "state": tmp_path / "state", shared: held}
    assert refused(**second) == (
        1,
        [
            f"trackagent: an agent already uses {held} (pid {agent.process.pid}): use it, or "
            "`trackagent stop` it, or give this one other folders with --dir and --state"
        ],
    )


def test_a_refused_agent_does_not_disturb_the_first(agent: AgentProcess) -> None:
    assert agent.process is not None
    refused(*agent.folders)
    assert status(agent.folders).pid == agent.process.pid


def test_the_lock_tells_who_holds_it(agent: AgentProcess) -> None:
    assert agent.process is not None
    about = json.loads((agent.folders.directory / "agent.lock").read_text())
    assert about["pid"] == agent.process.pid


def test_a_lock_file_that_nobody_holds_is_taken(own_agent: OwnAgent, folders: Folders) -> None:
    folders.directory.mkdir()
    (folders.directory / "agent.lock").write_text('{"pid": 1, "much": "' + "x" * 1000 + '"}')
    agent = own_agent().start()
    assert agent.process is not None
    about = json.loads((folders.directory / "agent.lock").read_text())
    assert about["pid"] == agent.process.pid


def test_the_socket_of_a_killed_agent_is_replaced(own_agent: OwnAgent, folders: Folders) -> None:
    agent = own_agent().start()
    agent.kill()
    assert folders.socket.exists()
    agent.start()
    assert agent.process is not None
    assert status(folders).pid == agent.process.pid


def config(directory: Path, state: Path) -> AgentConfig:
    return AgentConfig(directory=directory, state_directory=state)


def test_folders_that_cannot_be_made_are_one_error(folders: Folders) -> None:
    folders.directory.parent.joinpath("state").write_text("in the way")
    with pytest.raises(AgentError, match=r"cannot use the agent's folders: .*state"):
        daemon.serve(config(folders.directory, folders.state))


def test_a_state_folder_that_cannot_be_written_is_one_error(folders: Folders) -> None:
    # /proc/<pid> is a folder of our own in which not even root can make a file.
    with pytest.raises(AgentError, match=rf"folders: /proc/{os.getpid()}: not writable; .*--state"):
        daemon.serve(config(folders.directory, Path(f"/proc/{os.getpid()}")))


def test_an_error_at_the_start_is_one_line(folders: Folders) -> None:
    folders.state.parent.joinpath("state").write_text("in the way")
    code, lines = refused(*folders)
    assert (code, len(lines), lines[0].startswith("trackagent: cannot use")) == (1, 1, True)


def test_a_spool_of_a_newer_version_is_one_line(folders: Folders) -> None:
    folders.state.mkdir(mode=0o700)
    with sqlite3.connect(folders.state / "spool.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    code, lines = refused(*folders)
    assert (code, len(lines), "has version 99" in lines[-1]) == (1, 1, True)


# --- damaged files


def damage(path: Path, start: int = 0) -> None:
    """The file with noise in it from `start` on."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as file:
        file.seek(start)
        file.write(random.Random(1).randbytes(20_000))


@pytest.mark.parametrize("name", ["spool.db", "store.db"])
def test_a_damaged_database_does_not_block_a_start(
    own_agent: OwnAgent, folders: Folders, name: str
) -> None:
    damage(folders.state / name)
    left_behind(folders)
    agent = own_agent().start()
    agent.wait_for_delivery()
    assert stored(agent) == list(MANY)


def test_a_spool_damaged_in_use_does_not_block_the_next_start(
    own_agent: OwnAgent, folders: Folders
) -> None:
    agent = own_agent().start()
    agent.stop()
    damage(folders.state / "spool.db", 8192)
    left_behind(folders)
    agent.start()
    agent.wait_for_delivery()
    assert (stored(agent), "spool.db is unreadable" in agent.output) == (list(MANY), True)


# --- stopping


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name
)
def test_being_told_to_stop_stores_everything_and_exits_with_0(
    own_agent: OwnAgent, folders: Folders, number: signal.Signals
) -> None:
    # Nothing is delivered before the end, and the journal is found at the end at the latest.
    agent = own_agent("--deliver-interval-s", "3600").start()
    assert agent.process is not None
    left_behind(folders)
    agent.process.send_signal(number)
    code = agent.process.wait(DEADLINE_S)
    assert (code, stored(agent), folders.journals()) == (0, list(MANY), [])
    assert not folders.socket.exists()


def test_an_agent_that_is_started_with_nohup_outlives_its_terminal(folders: Folders) -> None:
    agent = AgentProcess(folders, command=("nohup", str(COMMAND)))
    try:
        process = agent.start().process
        assert process is not None
        ignored = re.search("SigIgn:\t(.*)", Path(f"/proc/{process.pid}/status").read_text())
        assert ignored is not None
        assert int(ignored[1], 16) & 1 << signal.SIGHUP - 1
    finally:
        agent.close()


def test_a_stopped_agent_leaves_no_socket(own_agent: OwnAgent, folders: Folders) -> None:
    own_agent().start().stop()
    assert not folders.socket.exists()


def test_a_stopped_agent_gives_its_folders_free(own_agent: OwnAgent, folders: Folders) -> None:
    agent = own_agent().start()
    agent.stop()
    assert agent.start().stop() == 0


def test_a_connected_rank_does_not_hold_up_the_end(own_agent: OwnAgent, folders: Folders) -> None:
    agent = own_agent().start()
    with grpc.insecure_channel(f"unix:{folders.socket}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        requests: SimpleQueue[None] = SimpleQueue()
        stub.Push(iter(requests.get, None))
        code = agent.stop()
        requests.put(None)
    assert code == 0


def test_what_cannot_be_delivered_before_the_end_waits_for_the_next_agent(
    own_agent: OwnAgent, folders: Folders
) -> None:
    left_behind(folders)
    first = own_agent("--drain-timeout-s", "0", "--deliver-interval-s", "3600")
    first.start()
    first.wait_for_no_journals()
    left_behind(folders, range(0))
    code = first.stop()
    agent = own_agent().start()
    agent.wait_for_delivery()
    assert (code, stored(agent)) == (0, list(MANY))


# --- kill -9

TRAIN = """
import sys
from trackagent import client
run = client.init(experiment="load")
for step in range(int(sys.argv[1])):
    client.log({"loss": float(step)}, step=step)
    if step % 100 == 99:
        print(step, flush=True)
        sys.stdin.readline()
print(run.id, client.finish(), flush=True)
"""


def test_an_agent_killed_under_load_loses_and_doubles_nothing(
    own_agent: OwnAgent, folders: Folders
) -> None:
    agent = own_agent().start()
    with start_script(folders, TRAIN, 3000) as training:
        assert training.stdin is not None
        assert training.stdout is not None
        for number in range(30):
            training.stdout.readline()
            if number in (5, 12, 20):
                agent.kill()
                agent.start()
            training.stdin.write("\n")
            training.stdin.flush()
        run_id, delivered = training.stdout.readline().split()
    agent.wait_for_status(run_id, "finished")
    steps = [point.step for point in agent.exported(run_id) if point.key == "loss"]
    assert (delivered, sorted(steps)) == ("True", list(range(3000)))


def test_an_agent_killed_while_it_spools_and_delivers_doubles_nothing(
    own_agent: OwnAgent, folders: Folders
) -> None:
    left_behind(folders, range(40_000))
    agent = own_agent().start()
    agent.kill()
    agent.start()
    log = folders.state / "spool.db-wal"
    wait_until(lambda: log.stat().st_size > 100_000, "something is spooled")
    agent.kill()
    agent.start()
    wait_until(lambda: not folders.journals(), "everything is spooled")
    agent.kill()
    agent.start()
    agent.wait_for_delivery()
    assert stored(agent) == list(range(40_000))


def test_a_rank_and_its_agent_killed_lose_nothing(own_agent: OwnAgent, folders: Folders) -> None:
    agent = own_agent().start()
    with start_script(folders, TRAIN, 3000) as training:
        assert training.stdout is not None
        training.stdout.readline()
        agent.kill()
        training.kill()
    agent.start()
    agent.wait_for_delivery()
    (run,) = agent.runs()
    steps = [point.step for point in agent.exported(run["run_id"]) if point.key == "loss"]
    assert (run["status"], steps) == ("killed", list(range(100)))
