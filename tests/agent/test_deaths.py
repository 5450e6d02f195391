"""What is said of a rank that died, and folders whose makers died before they were named."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest

from tests.agent.samples import TIME_NS, journal, log_losses, producer
from tests.fakes import Folders, wait_until
from trackagent.agent.deaths import MemoryGroup, memory_group
from trackagent.agent.decode import decode
from trackagent.agent.orphans import MAKING_S, Orphans
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import EventData
from trackagent.client import record
from trackagent.client.folder import LOCK_NAME
from trackagent.client.record import Kind

V2 = "0::/pods/a\n"
V1 = "5:devices:/pods/a\n4:cpu,memory:/pods/a\n0::/\n"
EVENTS = "pods/a/memory.events"
CONTROL = "memory/pods/a/memory.oom_control"


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[[str, str, int], None]:
    """kernel(cgroup, file, kills): what /proc and /sys/fs/cgroup say of process 7, which holds the lock."""
    (tmp_path / "proc/7/fd").mkdir(parents=True)
    (tmp_path / "lock").touch()
    (tmp_path / "proc/7/fd/3").symlink_to(tmp_path / "lock")

    def say(cgroup: str, file: str, kills: int) -> None:
        (tmp_path / "proc/7/cgroup").write_text(cgroup)
        path = tmp_path / "groups" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"low 0\noom 9\noom_kill {kills}\noom_group_kill 0\n")

    return say


def group(tmp_path: Path, pid: int = 7) -> MemoryGroup | None:
    lock = tmp_path / "lock"
    return memory_group(pid, lock, proc=tmp_path / "proc", groups=tmp_path / "groups")


@pytest.mark.parametrize(
    ("cgroup", "file"),
    [(V2, EVENTS), (V2, f"unified/{EVENTS}"), (V1, CONTROL)],
    ids=["v2", "hybrid", "v1"],
)
def test_kills_are_counted_from_the_first_look(
    kernel: Callable[[str, str, int], None], tmp_path: Path, cgroup: str, file: str
) -> None:
    kernel(cgroup, file, 4)
    seen = group(tmp_path)
    assert seen is not None
    assert seen.killed_since() == 0
    kernel(cgroup, file, 6)
    assert seen.killed_since() == 2


def test_a_group_that_is_gone_tells_nothing(
    kernel: Callable[[str, str, int], None], tmp_path: Path
) -> None:
    kernel(V2, EVENTS, 4)
    seen = group(tmp_path)
    (tmp_path / "groups" / EVENTS).unlink()
    assert seen is not None
    assert seen.killed_since() is None


def test_a_process_that_does_not_hold_the_lock_is_another(
    kernel: Callable[[str, str, int], None], tmp_path: Path
) -> None:
    kernel(V2, EVENTS, 4)
    (tmp_path / "proc/7/fd/3").unlink()
    assert group(tmp_path) is None


@pytest.mark.parametrize("cgroup", ["0::/../secret\n", "", "nonsense\n", "4:memory:/elsewhere\n"])
def test_no_group_that_can_be_seen_is_none(
    kernel: Callable[[str, str, int], None], tmp_path: Path, cgroup: str
) -> None:
    kernel(cgroup, "secret/memory.events", 4)
    assert group(tmp_path) is None


def test_a_process_that_is_gone_has_no_group(tmp_path: Path) -> None:
    assert group(tmp_path, pid=8) is None


def test_the_group_of_a_real_process_is_the_kernels(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w"):
        seen = memory_group(os.getpid(), path)
    assert seen is None or seen.killed_since() == 0


# --- as orphans tell it


def deaths(spool: Spool) -> list[EventData]:
    """The events that say of a rank that it died."""
    delivery = spool.next_delivery("store", 1 << 40).result()
    events = [] if delivery is None else decode(delivery, spool.keys).events
    return [one for one in events if "last_step" in one.data]


def test_the_last_step_is_found_in_several_lanes(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    target = journal(folders)
    first, second = target.take(), target.take()
    for step, lane in ((5, first), (6, second), (4, first)):
        target.write_metrics(lane, {"loss": 1.0}, step=step, time_ns=TIME_NS + step)
    target.give(first)
    target.give(second)
    target.close()
    orphans.look()
    [died] = deaths(spool)
    assert (died.data["last_step"], died.data["last_time_ns"]) == (6, TIME_NS + 6)


def test_the_last_step_of_a_long_journal_is_found(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    with closing(journal(folders)) as target:
        log_losses(target, range(5000))
    orphans.look()
    [died] = deaths(spool)
    assert died.data["last_step"] == 4999


def test_the_last_step_is_told_where_the_sender_had_delivered_it(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    with closing(journal(folders)) as target:
        log_losses(target, range(10))
        spool.open_producer(producer(), target.ends()).result()
    orphans.look()
    [died] = deaths(spool)
    assert died.data["last_step"] == 9


def test_a_rank_that_had_said_its_end_did_not_die(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    with closing(journal(folders)) as target:
        log_losses(target, range(10))
        lane = target.take()
        end = {"status": "finished", "error": "", "records": 10}
        target.write(lane, record.encode_json(Kind.FINISH, end, step=0, time_ns=TIME_NS))
        target.give(lane)
    orphans.look()
    assert deaths(spool) == []


def test_a_death_is_told_once_when_the_journal_could_not_be_deleted(
    spool: Spool, orphans: Orphans, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(journal(folders)) as target:
        log_losses(target, range(10))

    def fail(path: Path) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr("trackagent.agent.orphans.shutil.rmtree", fail)
        orphans.look()
    orphans.look()
    assert folders.journals() == []
    assert len(deaths(spool)) == 1


# --- folders in the making

NAME = f".{producer().producer_id.hex()}.4711.0"


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def patient(spool: Spool, folders: Folders, now: list[float]) -> Orphans:
    """With a clock that the test sets."""
    return Orphans(
        spool,
        folders.directory,
        folders.state,
        folders.state / "quarantine",
        clock=lambda: now[0],
    )


def in_the_making(base: Path, *, lock: bool) -> Path:
    path = base / "journals" / NAME
    path.mkdir(parents=True)
    if lock:
        (path / LOCK_NAME).touch(mode=0o600)
    return path


@pytest.mark.parametrize("lock", [True, False], ids=["with a lock", "without"])
@pytest.mark.parametrize("base", ["directory", "state"])
def test_a_folder_whose_maker_died_is_removed_after_a_while(
    patient: Orphans, folders: Folders, now: list[float], base: str, lock: bool
) -> None:
    path = in_the_making(getattr(folders, base), lock=lock)
    patient.look()
    now[0] += MAKING_S - 1
    patient.look()
    assert path.exists()
    now[0] += 1
    patient.look()
    assert not path.exists()


def test_a_folder_whose_maker_lives_is_left_alone(
    patient: Orphans, folders: Folders, now: list[float]
) -> None:
    path = in_the_making(folders.directory, lock=True)
    with (path / LOCK_NAME).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patient.look()
        now[0] += 10 * MAKING_S
        patient.look()
        assert path.exists()


@pytest.mark.parametrize("name", [".cache", ".0123.17", "..", f"{NAME}.old"])
def test_other_hidden_folders_are_left_alone(
    patient: Orphans, folders: Folders, now: list[float], name: str
) -> None:
    path = folders.directory / "journals" / name
    path.mkdir(parents=True, exist_ok=True)
    patient.look()
    now[0] += 10 * MAKING_S
    patient.look()
    assert path.exists()


def test_other_hidden_folders_are_left_alone_however_often_the_agent_tidies(
    patient: Orphans,
    spool: Spool,
    folders: Folders,
    now: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trackagent.agent.orphans.SCAN_INTERVAL_S", 0.01)
    monkeypatch.setattr("trackagent.agent.orphans.TIDY_INTERVAL_S", 0.0)
    tidied = 0

    def forget_ended(kept: list[bytes]) -> Future[None]:
        nonlocal tidied
        tidied += 1
        now[0] += MAKING_S
        return forget(kept)

    forget = spool.forget_ended
    monkeypatch.setattr(spool, "forget_ended", forget_ended)
    path = folders.directory / "journals" / ".cache"
    path.mkdir(parents=True)
    patient.start()
    wait_until(lambda: tidied > 2 or not path.exists())
    patient.stop()
    assert path.exists()


def test_a_process_killed_while_it_makes_its_folder_leaves_such_a_folder(
    patient: Orphans, folders: Folders, now: list[float]
) -> None:
    program = """
import os, sys
from pathlib import Path
from trackagent.client.folder import ProducerFolder
Path.rename = lambda self, target: os._exit(9)
ProducerFolder(Path(sys.argv[1]), "ab" * 16).open()
"""
    done = subprocess.run([sys.executable, "-c", program, str(folders.directory)], check=False)
    assert done.returncode == 9
    [left] = (folders.directory / "journals").iterdir()
    assert left.name.startswith(f".{'ab' * 16}.")
    patient.look()
    now[0] += MAKING_S
    patient.look()
    assert list((folders.directory / "journals").iterdir()) == []
