"""Other users of the node: real processes of theirs can neither read, nor write, nor take the place of what
is somebody's own."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.fakes import (
    COMMAND,
    DEADLINE_S,
    AgentProcess,
    FakeAgent,
    Folders,
    logged_records,
    short_folder,
)
from tests.strangers import ALICE, BOB, being, command_as, give
from trackagent.agent import daemon
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError

STEPS = 50

TRAIN = """
import logging, sys
from trackagent import client
logging.basicConfig(format="%(message)s")
run = client.init("gpt", run_id=sys.argv[1])
for step in range(int(sys.argv[2])):
    run.log({"loss": step}, step=step)
print(run.finish())
"""


@pytest.fixture
def alices() -> Iterator[Folders]:
    """Folders in one of Alice's, which everyone may enter."""
    command_as(ALICE)  # skips where there are no other users
    base = short_folder()
    yield Folders.under(give(base, ALICE, 0o755))
    shutil.rmtree(base)


@pytest.fixture
def start_agent(alices: Folders) -> Iterator[Callable[..., AgentProcess]]:
    """start_agent(*flags): Alice's agent, running."""
    made: list[AgentProcess] = []

    def start(*flags: str, groups: tuple[int, ...] = ()) -> AgentProcess:
        command = (*command_as(ALICE, *groups), str(COMMAND))
        made.append(AgentProcess(alices, *flags, command=command))
        return made[-1].start()

    yield start
    for process in made:
        process.close()


def train(
    folders: Folders, uid: int, run_id: str = "", *, groups: tuple[int, ...] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """A user's training process, which logs STEPS steps."""
    command = [*command_as(uid, *groups), sys.executable, "-W", "error", "-c", TRAIN]
    return subprocess.run(
        [*command, run_id or uuid4().hex, str(STEPS)],
        env=folders.environment | {"TRACKAGENT_EXIT_TIMEOUT_S": "3"} | more,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def modes(base: Path) -> dict[str, int]:
    """What group and others may do with each file and folder below `base`, where it is anything."""
    paths = [path for path in base.rglob("*") if path.name != "agent.log"]
    found = {str(path): stat.S_IMODE(path.lstat().st_mode) & 0o077 for path in paths}
    return {path: mode for path, mode in found.items() if mode}


# --- what is one's own


def test_a_user_and_an_agent_of_theirs_store_what_they_log(
    alices: Folders, start_agent: Callable[..., AgentProcess]
) -> None:
    agent = start_agent()
    run_id = uuid4().hex
    done = train(alices, ALICE, run_id)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    agent.wait_for_status(run_id, "finished")
    assert [point.step for point in agent.exported(run_id)] == list(range(STEPS))


def test_everything_that_is_written_is_for_its_user_alone(
    alices: Folders, start_agent: Callable[..., AgentProcess]
) -> None:
    alices.state.mkdir()
    give(alices.state, ALICE, 0o700)
    (alices.state / "spool.db").write_bytes(b"damaged " * 1000)
    give(alices.state / "spool.db", ALICE, 0o644)
    agent = start_agent()
    train(alices, ALICE)
    open_while_it_runs = modes(alices.directory.parent)
    agent.stop()
    assert (open_while_it_runs, modes(alices.directory.parent)) == ({}, {})


def test_another_user_cannot_reach_the_agent(
    alices: Folders, start_agent: Callable[..., AgentProcess]
) -> None:
    start_agent()
    asked = subprocess.run(
        [*command_as(BOB), str(COMMAND), "status"],
        env=alices.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (asked.returncode, asked.stdout) == (1, "")


# --- a place that somebody else has taken


def test_nothing_is_sent_to_a_socket_that_another_user_put_there(alices: Folders) -> None:
    alices.directory.mkdir()
    squatter = FakeAgent(alices.socket)
    squatter.start()
    give(alices.directory, BOB, 0o777)
    give(alices.socket, BOB, 0o777)
    try:
        done = train(alices, ALICE)
    finally:
        squatter.stop()
    assert (done.returncode, done.stdout, squatter.opened) == (0, "False\n", [])
    assert f"no journal is kept there: {alices.directory} belongs to user {BOB}" in done.stderr
    assert f"nothing is sent to unix:{alices.socket}: {alices.socket} belongs to user {BOB}" in (
        done.stderr
    )


def test_what_is_logged_beside_a_squatter_is_safe_on_the_disk(alices: Folders) -> None:
    alices.directory.mkdir()
    give(alices.directory, BOB, 0o777)
    train(alices, ALICE)
    assert [one.step for one in logged_records(alices)] == list(range(STEPS))
    assert list(alices.directory.iterdir()) == []


def refused_start(folders: Folders, uid: int = ALICE) -> str:
    """Why an agent of the user does not take these folders."""
    config = AgentConfig(directory=folders.directory, state_directory=folders.state)
    with being(uid), pytest.raises(AgentError) as caught:
        daemon.take_folders(config)
    return str(caught.value)


def test_an_agent_does_not_start_in_a_folder_of_another_user(alices: Folders) -> None:
    alices.directory.mkdir()
    give(alices.directory, BOB, 0o777)
    agent = AgentProcess(alices, command=(*command_as(ALICE), str(COMMAND)))
    code = agent.launch().wait(DEADLINE_S)
    assert (code, len(agent.output.splitlines())) == (1, 1)


@pytest.mark.parametrize("name", ["directory", "state"])
def test_an_agent_refuses_a_folder_of_another_user(alices: Folders, name: str) -> None:
    folder: Path = getattr(alices, name)
    folder.mkdir()
    give(folder, BOB, 0o777)
    expected = f"cannot use the agent's folders: {folder} belongs to user {BOB}"
    assert refused_start(alices).startswith(expected)


@pytest.mark.parametrize("name", ["directory", "state"])
def test_an_agent_refuses_a_link_in_the_place_of_its_folder(alices: Folders, name: str) -> None:
    folder: Path = getattr(alices, name)
    real = folder.with_name("real")
    real.mkdir()
    folder.symlink_to(give(real, ALICE, 0o700))
    assert refused_start(alices).endswith("is a link: name the folder that it leads to")
    assert list(real.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["state/journals", "state/quarantine", "state/dead-letters", "dir/journals"]
)
def test_an_agent_refuses_a_link_within_its_folders(alices: Folders, name: str) -> None:
    path = alices.directory.parent / name
    path.parent.mkdir()
    give(path.parent, ALICE, 0o700)
    path.symlink_to("/")
    assert f"{path} is a link" in refused_start(alices)


@pytest.mark.parametrize("name", ["state/spool.db", "state/store.db", "dir/agent.lock"])
@pytest.mark.parametrize("kind", ["link", "another user's", "fifo"])
def test_an_agent_refuses_a_file_that_is_not_its_own(alices: Folders, name: str, kind: str) -> None:
    path = alices.directory.parent / name
    path.parent.mkdir()
    if kind == "link":
        path.symlink_to(path.with_name("elsewhere"))
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.touch()
        give(path, BOB, 0o666)
    give(path.parent, ALICE, 0o700)
    said = refused_start(alices)
    problem = f"belongs to user {BOB}" if kind == "another user's" else "is a link or no file"
    assert (f"{path} {problem}" in said, path.with_name("elsewhere").exists()) == (True, False)
