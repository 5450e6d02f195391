"""Folders that cannot be written, or not even be looked into: what works, and what people are told to do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import (
    COMMAND,
    DEADLINE_S,
    AgentProcess,
    Folders,
    run_script,
    short_folder,
)
from tests.strangers import ALICE, BOB, command_as, command_as_one_who_may_not_look, give
from trackagent.agent.config import AgentConfig

TRAIN = """
from trackagent import client
run = client.init(experiment="read-only")
for step in range(3):
    client.log({"loss": step}, step=step)
print(run.id, client.finish())
"""
STEPS = [0, 1, 2]
KEPT = (
    "not everything was delivered before the end: the rest is kept in {} and delivered by the next agent on "
    "this node (`trackagent start`)\n"
)


def mount(*arguments: object) -> None:
    command = ["mount", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")


def remount(folder: Path, how: str) -> None:
    mount("-o", f"remount,{how}", folder)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be mounted read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


Place = Callable[[str], Folders]


@pytest.fixture
def place(disk: Path, tmp_path: Path) -> Iterator[Place]:
    """place(which): folders of which these lie on the disk."""
    memory = short_folder()

    def placed(which: str) -> Folders:
        directory = disk / "d" if which != "state" else memory / "d"
        state = disk / "s" if which != "directory" else tmp_path / "s"
        for folder in (directory, state):
            folder.mkdir(mode=0o700)
        return Folders(directory, state)

    yield placed
    shutil.rmtree(memory)


def trained(folders: Folders, **variables: str) -> tuple[str, str, str]:
    """The run, whether it was delivered, and what was said."""
    done = run_script(folders, TRAIN, **variables)
    run_id, delivered = done.stdout.split()
    return run_id, delivered, done.stderr


def told(folders: Folders, *arguments: str, as_user: tuple[str, ...] = ()) -> tuple[int, str]:
    done = subprocess.run(
        [*as_user, str(COMMAND), *arguments],
        env=folders.environment | {"HOME": "/"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_a_store_on_a_read_only_disk_can_be_read(disk: Path, place: Place, *, killed: bool) -> None:
    agent = AgentProcess(place("both"), "--deliver-interval-s", "0.02")
    agent.output_path = disk.with_name("agent.log")
    agent.start()
    try:
        run_id, *_ = trained(agent.folders)
        agent.wait_for_status(run_id, "finished")
        agent.kill() if killed else agent.stop()
    finally:
        agent.close()
    remount(disk, "ro")
    assert [point.step for point in agent.exported(run_id)] == STEPS
    assert [run["run_id"] for run in agent.runs()] == [run_id]
    assert agent.shown(run_id)["status"] == "finished"


@pytest.mark.parametrize("which", ["directory", "state", "both"])
def test_an_agent_does_not_start_on_a_read_only_disk_and_says_what_to_do(
    disk: Path, place: Place, which: str
) -> None:
    folders = place(which)
    remount(disk, "ro")
    folder = folders.state if which == "state" else folders.directory
    expected = (
        f"trackagent: cannot use the agent's folders: {folder}: not writable; "
        "give others with --dir and --state\n"
    )
    assert told(folders, "start") == (1, expected)


@pytest.mark.parametrize("which", ["directory", "state"])
def test_a_rank_keeps_its_records_in_the_folder_that_can_be_written_and_names_it(
    disk: Path, place: Place, which: str
) -> None:
    folders = place(which)
    remount(disk, "ro")
    kept = folders.state if which == "directory" else folders.directory
    run_id, delivered, said = trained(folders, TRACKAGENT_FINISH_TIMEOUT_S="1")
    assert (delivered, said) == ("False", KEPT.format(kept))
    remount(disk, "rw")
    agent = AgentProcess(folders, "--deliver-interval-s", "0.02")
    agent.output_path = disk.with_name("agent.log")
    agent.start()
    try:
        agent.wait_for_status(run_id, "finished")
        assert [point.step for point in agent.exported(run_id)] == STEPS
    finally:
        agent.close()


def test_a_rank_that_can_write_nowhere_is_told_at_its_beginning(disk: Path, place: Place) -> None:
    folders = place("both")
    remount(disk, "ro")
    done = run_script(folders, TRAIN, expect=1)
    problem = done.stderr.splitlines()[-1]
    assert "JournalError: " in problem
    assert str(folders.directory) in problem
    assert str(folders.state) in problem
    assert problem.endswith("set TRACKAGENT_DIR and TRACKAGENT_STATE")


# --- without the right


@pytest.fixture
def alices() -> Iterator[Folders]:
    """Folders of another user's, on the way to which everyone may go."""
    base = short_folder()
    base.chmod(0o755)
    folders = Folders(base / "d", base / "s")
    for folder in folders:
        folder.mkdir()
        give(folder, ALICE, 0o700)
    yield folders
    shutil.rmtree(base)


@pytest.mark.parametrize("which", [0, 1], ids=["directory", "state"])
def test_an_agent_that_may_not_write_says_what_to_do(alices: Folders, which: int) -> None:
    folder = alices[which]
    folder.chmod(0o500)
    code, said = told(alices, "start", as_user=command_as(ALICE))
    expected = f"{folder}: not writable; give others with --dir and --state\n"
    assert (code, said) == (1, f"trackagent: cannot use the agent's folders: {expected}")


def test_folders_that_may_not_be_made_are_named(alices: Folders) -> None:
    folders = Folders(Path("/trackagent-of-alice"), alices.state)
    code, said = told(folders, "start", as_user=command_as(ALICE))
    expected = f"{folders.directory}: Permission denied; give others with --dir and --state\n"
    assert (code, said) == (1, f"trackagent: cannot use the agent's folders: {expected}")


@pytest.mark.parametrize(
    "arguments",
    [["runs"], ["show"], ["export", "latest"], ["tail"], ["status"], ["dead-letters", "list"]],
    ids=lambda arguments: arguments[0],
)
def test_who_may_not_look_is_told_who_may(alices: Folders, arguments: list[str]) -> None:
    config = AgentConfig(directory=alices.directory, state_directory=alices.state)
    path = {"status": config.socket_path, "dead-letters": config.dead_letters_path}
    code, said = told(alices, *arguments, as_user=command_as_one_who_may_not_look(BOB))
    assert (code, said) == (
        1,
        f"trackagent: may not look for {path.get(arguments[0], config.store_path)}: ask as the user who "
        "runs the agent, or name other folders with --dir and --state\n",
    )
