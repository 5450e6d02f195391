"""What lies in a journal and no rank of this user has put there: not read, not followed, not waited for, not
deleted, and in nobody's way."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

import trackagent.agent.orphans as orphans_module
from tests.agent.samples import journal, log_losses, producer
from tests.fakes import Folders, wait_until
from tests.strangers import BOB, give
from trackagent.agent.decode import decode
from trackagent.agent.orphans import Orphans
from trackagent.agent.spool import Spool
from trackagent.client.folder import LOCK_NAME

NAME = producer().producer_id.hex()
MANY = range(2000)


@pytest.fixture
def orphans(spool: Spool, folders: Folders, tmp_path: Path) -> Orphans:
    """Not running: the tests let it look. Its quarantine lies on another file system than the journals."""
    spool.add_sink("store").result()
    return Orphans(spool, folders.directory, tmp_path / "state", tmp_path / "state" / "quarantine")


@pytest.fixture
def left(folders: Folders) -> Path:
    """The folder of the journal of a rank that logged MANY steps and is gone."""
    target = journal(folders)
    log_losses(target, MANY)
    target.close()
    return folders.directory / "journals" / NAME


def steps(spool: Spool) -> list[int]:
    delivery = spool.next_delivery("store", 1 << 40).result()
    if delivery is None:
        return []
    return [int(step) for points in decode(delivery, spool.keys).points for step in points.steps]


def link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "mine.seg")


def hard_link(path: Path) -> None:
    os.link(path.parent.parent / "mine.seg", path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def anothers(path: Path) -> None:
    shutil.copy(path.parent.parent / "mine.seg", path)
    give(path, BOB, 0o600)


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # /dev/null
    except PermissionError:
        pytest.skip("may not make a device")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)  # a hole, which would not be one as a copy


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (os.mkfifo, "not a file"),
    "socket": (listening, "not a file"),
    "device": (device, "not a file"),
    "folder": (Path.mkdir, "not a file"),
    "link": (link, "not a file"),
    "huge file": (huge, f"{1 << 40} bytes: no segment is so large"),
    "hard link": (hard_link, "it has 2 names: a hard link"),
    "another user's file": (anothers, f"it belongs to user {BOB}"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_no_rank_has_written_is_set_aside_as_it_is(
    spool: Spool, orphans: Orphans, folders: Folders, left: Path, kind: str
) -> None:
    # A segment with good records, which must not be read a second time under another name.
    mine = left.parent / "mine.seg"
    shutil.copy(next(left.glob("*.seg")), mine)
    before = mine.read_bytes()
    make, reason = ODD[kind]
    odd = left / "00000099.seg"
    make(odd)
    was = odd.lstat()
    orphans.look()
    aside = folders.directory / "quarantine" / f"{NAME}-00000099.seg"
    told = aside.with_suffix(".reason").read_text()
    assert (steps(spool), folders.journals(), told) == (list(MANY), [], f"{reason}\n")
    assert (aside.lstat().st_ino, aside.lstat().st_mode) == (was.st_ino, was.st_mode)
    assert mine.read_bytes() == before


def test_a_journal_that_another_user_made_is_left_alone(
    spool: Spool, orphans: Orphans, left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    give(left, BOB, 0o700)
    orphans.look()
    orphans.look()
    assert (steps(spool), len(list(left.iterdir())) > 1) == ([], True)
    assert [f"{left} belongs to user {BOB}" in said for said in caplog.messages] == [True]


def test_a_journal_in_which_others_may_write_is_left_alone(
    spool: Spool, orphans: Orphans, left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left.chmod(0o777)
    orphans.look()
    assert (steps(spool), "can be written by everyone" in caplog.text) == ([], True)


def test_the_link_of_a_lock_is_not_followed(
    spool: Spool, orphans: Orphans, left: Path, tmp_path: Path
) -> None:
    (left / LOCK_NAME).unlink()
    (left / LOCK_NAME).symlink_to(tmp_path / "made")
    orphans.look()
    assert (steps(spool), (tmp_path / "made").exists()) == ([], False)


def test_the_link_of_a_folder_in_the_making_is_not_followed(
    orphans: Orphans, left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans_module, "SCAN_INTERVAL_S", 0.01)
    monkeypatch.setattr(orphans_module, "MAKING_S", 0.0)
    unfinished = left.parent / f".{uuid4().hex}.4711.0"
    unfinished.mkdir()
    link = left.parent / f".{uuid4().hex}.4711.1"
    link.symlink_to(tmp_path)
    orphans.start()
    try:
        wait_until(lambda: not unfinished.exists())
    finally:
        orphans.stop()
    assert (link.is_symlink(), (tmp_path / LOCK_NAME).exists()) == (True, False)
