"""Whom the file system lets in: which folders, files and sockets another user could meddle with."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import short_folder
from tests.strangers import ALICE, BOB, being, give
from trackagent.client import trust


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of Alice's that everyone may enter."""
    base = short_folder()
    try:
        if os.geteuid() == 0:
            give(base, ALICE, 0o755)
        yield base
    finally:
        shutil.rmtree(base)


def refused(path: Path, uid: int = ALICE) -> str:
    """Why the user is refused `path` as a folder."""
    with being(uid), pytest.raises(PermissionError) as caught:
        trust.private_folder(path)
    return str(caught.value.strerror)


def listening(path: Path, uid: int = ALICE) -> Path:
    """A socket of the user's."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return give(path, uid, 0o600)


# --- folders


def test_folders_are_made_for_this_user_alone_whatever_the_umask(home: Path) -> None:
    mask = os.umask(0)
    try:
        trust.private_folder(home / "a" / "b")
    finally:
        os.umask(mask)
    assert [stat.S_IMODE((home / name).stat().st_mode) for name in ("a", "a/b")] == [0o700] * 2


def test_a_folder_of_ones_own_is_fine(home: Path) -> None:
    give(home, ALICE, 0o700)
    with being(ALICE):
        assert trust.private_folder(home / "mine") == home / "mine"


def test_a_folder_of_another_user_is_refused(home: Path) -> None:
    place = give(home, BOB, 0o700)
    assert refused(place).startswith(f"{place} belongs to user {BOB}, this is user {ALICE}")


def test_a_link_in_the_place_of_a_folder_is_refused(home: Path) -> None:
    (home / "mine").mkdir()
    (home / "link").symlink_to(home / "mine")
    assert refused(home / "link").endswith("is a link: name the folder that it leads to")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_in_which_others_may_write_is_refused(home: Path, mode: int) -> None:
    give(home, ALICE, mode)
    assert f"(mode {mode:04o}): chmod go-w {home}" in refused(home)


def test_why_a_folder_is_refused_is_told_beforehand(home: Path) -> None:
    give(home, BOB, 0o700)
    with being(ALICE):
        assert trust.why_refused(home).startswith(f"{home} belongs to user {BOB}")


def test_nothing_is_said_of_a_folder_that_is_not_there(home: Path) -> None:
    assert trust.why_refused(home / "later") == ""


# --- the way to a folder


def below(home: Path, uid: int, mode: int, gid: int | None = None) -> Path:
    """A folder of Alice's in one of another user's, or with another mode."""
    above = home / "above"
    above.mkdir()
    (above / "mine").mkdir()
    give(above / "mine", ALICE, 0o700)
    give(above, uid, mode)
    os.chown(above, uid, uid if gid is None else gid)
    above.chmod(mode)
    return above / "mine"


@pytest.mark.parametrize(
    ("uid", "mode", "gid"),
    [
        (0, 0o1777, 0),  # /dev/shm, /tmp
        (0, 0o755, 0),
        (ALICE, 0o775, ALICE),  # made with a umask of 002, in a group of one's own
        (ALICE, 0o1775, BOB),
        (0, 0o2775, ALICE),  # a volume of a pod, whose fsGroup is the process's group
        (0, 0o1777, ALICE),  # and one that has a sticky bit
    ],
)
def test_a_place_where_nobody_can_replace_ones_folder_is_fine(
    home: Path, uid: int, mode: int, gid: int
) -> None:
    place = below(home, uid, mode, gid)
    with being(ALICE):
        assert trust.private_folder(place) == place


@pytest.mark.parametrize(
    ("uid", "mode", "gid", "problem"),
    [
        (
            0,
            0o777,
            0,
            r"can be written by everyone \(mode 0777\) and has no sticky bit: have user 0 chmod \+t",
        ),
        (0, 0o2775, BOB, rf"can be written by group {BOB} \(mode 2775\) and has no sticky bit"),
        (
            ALICE,
            0o777,
            ALICE,
            r"can be written by everyone \(mode 0777\) and has no sticky bit: chmod \+t",
        ),
        (ALICE, 0o775, BOB, rf"can be written by group {BOB} \(mode 0775\) and has no sticky bit"),
        (BOB, 0o755, BOB, rf"belongs to user {BOB}: choose another folder"),
    ],
)
def test_a_place_where_others_could_replace_ones_folder_is_refused(
    home: Path, uid: int, mode: int, gid: int, problem: str
) -> None:
    place = below(home, uid, mode, gid)
    assert re.search(f"{place.parent}, which leads to {place}, {problem}", refused(place))


def test_a_folder_in_a_volume_that_all_may_write_to_can_be_replaced_but_for_its_sticky_bit(
    home: Path,
) -> None:
    """Why an emptyDir of Kubernetes, 0777 and root's, is refused until it has one."""
    place = below(home, 0, 0o777)
    with being(BOB):
        place.rename(place.with_name("taken"))
        place.mkdir()
    assert refused(place).startswith(f"{place.parent}, which leads to {place}, ")
    place.rmdir()
    place.with_name("taken").rename(place)
    place.parent.chmod(0o1777)
    with being(BOB), pytest.raises(PermissionError):
        place.rename(place.with_name("taken"))
    with being(ALICE):
        assert trust.private_folder(place) == place


def test_a_link_of_ones_own_on_the_way_is_followed(home: Path) -> None:
    (home / "real").mkdir()
    give(home / "real", ALICE, 0o700)
    (home / "link").symlink_to("real")
    give(home / "link", ALICE, 0)
    with being(ALICE):
        assert trust.private_folder(home / "link" / "mine").exists()


def test_another_users_link_on_the_way_is_refused(home: Path) -> None:
    give(home, 0, 0o1777)
    (home / "link").symlink_to("real")
    give(home / "link", BOB, 0)
    (home / "real").mkdir()
    give(home / "real", ALICE, 0o700)
    (home / "real" / "mine").mkdir()
    give(home / "real" / "mine", ALICE, 0o700)
    assert f"{home}/link, which leads to" in refused(home / "link" / "mine")


def test_what_a_link_leads_through_is_looked_at_too(home: Path) -> None:
    place = below(home, BOB, 0o755)
    (home / "link").symlink_to(place.parent)
    give(home / "link", ALICE, 0)
    assert f"{place.parent}, which leads to" in refused(home / "link" / "mine")


def test_links_in_a_circle_are_an_error(home: Path) -> None:
    (home / "link").symlink_to("link")
    with pytest.raises(OSError, match="Too many levels"):
        trust.check_way(home / "link" / "mine")


# --- sockets


def test_a_socket_of_ones_own_is_fine(home: Path) -> None:
    path = listening(home / "agent.sock")
    with being(ALICE):
        trust.check_socket(path)


def test_a_socket_of_root_is_fine(home: Path) -> None:
    path = listening(give(home, 0, 0o755) / "agent.sock", 0)
    with being(ALICE):
        trust.check_socket(path)


def test_a_socket_that_is_not_there_is_told_as_such(home: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trust.check_socket(home / "agent.sock")


def socket_refused(path: Path) -> str:
    with being(ALICE), pytest.raises(PermissionError) as caught:
        trust.check_socket(path)
    return str(caught.value.strerror)


def test_a_socket_of_another_user_is_refused(home: Path) -> None:
    path = listening(home / "agent.sock", BOB)
    assert socket_refused(path).startswith(f"{path} belongs to user {BOB}")


def test_a_socket_of_a_user_who_is_named_is_fine(home: Path) -> None:
    path = listening(give(home, BOB, 0o755) / "agent.sock", BOB)
    with being(ALICE):
        trust.check_socket(path, [BOB])


def test_a_socket_that_another_user_could_replace_is_refused(home: Path) -> None:
    path = listening(give(home, BOB, 0o755) / "agent.sock")
    assert f"{home}, in which the socket lies, belongs to user {BOB}" in socket_refused(path)


def test_a_socket_that_everyone_could_replace_is_refused(home: Path) -> None:
    path = listening(give(home, ALICE, 0o777) / "agent.sock")
    assert "in which the socket lies, can be written by everyone" in socket_refused(path)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_socket_is_refused(home: Path, kind: str) -> None:
    path = home / "agent.sock"
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(listening(home / "other.sock"))
    assert socket_refused(path) == f"{path} is not a socket: name the agent's"
