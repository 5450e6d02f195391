"""Whom the file system lets in: nobody but the user (and root) may be able to put another folder, file or
socket in the place of one that is used here, or to write into it.

A place is safe when it is the user's own and no other may write there, and when the same holds for every
folder and link on the way to it, as far as others could replace what it leads to: `/dev/shm` is fine, since
its sticky bit keeps others from renaming what is ours. A place that is safe stays so: only the user and root
can change that.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# Linux follows as many links in one path (path_resolution(7)).
_MAX_LINKS = 40
_ROOT = 0


def private_folder(path: Path) -> Path:
    """Makes `path` with its parents, for this user alone, and returns it.

    PermissionError, which says what to do, when it or the way to it is not safe.
    """
    if not os.path.lexists(path):
        # With a wide umask, mkdir's own `parents` would be open to others.
        for missing in (*_missing(path), path):
            missing.mkdir(mode=0o700, exist_ok=True)
    check_way(path)
    check_folder(path)
    return path


def why_refused(path: Path) -> str:
    """Why `private_folder` would refuse what is at `path`, or "" where it would not."""
    try:
        check_way(path)
        check_folder(path)
    except PermissionError as error:
        return str(error.strerror) if error.errno == errno.EPERM else ""
    except OSError:
        pass
    return ""


def check_folder(path: Path) -> None:
    """PermissionError when `path` is a link, no folder, another user's, or open to others' writing."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise _refused(f"{path} is a link: name the folder that it leads to")
    if not stat.S_ISDIR(status.st_mode):
        raise _refused(f"{path} is not a folder: choose another")
    _check_owner(path, status, [os.geteuid()])
    if status.st_mode & WRITABLE_BY_OTHERS:
        raise _refused(f"{path} {_writable(status)}: chmod go-w {path}, or choose another folder")


def check_file(path: Path) -> None:
    """PermissionError when `path` is a link, no file, or another user's; what is not there is fine."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise _refused(f"{path} is a link or no file: remove it, or choose another folder")
    _check_owner(path, status, [os.geteuid()])


def check_way(path: Path, owners: Collection[int] = ()) -> None:
    """PermissionError when another user, none of `owners`, could replace a folder or link that leads to
    `path`.

    Folders of the user and of root are trusted, as far as others may not write there or the sticky bit is
    set. For root, so are other users' folders: who runs as root in a user's folder has chosen it. A group
    that is the owner's own, or this process's, is taken for the owner.
    """
    me = os.geteuid()
    for place in _way(path):
        status = place.lstat()
        known = status.st_uid in (me, _ROOT, *owners) or me == _ROOT
        if not known and not is_unmapped(status.st_uid):
            raise _refused(
                f"{place}, which leads to {path}, belongs to user {status.st_uid}: choose another folder"
            )
        if _replaceable(status):
            raise _refused(
                f"{place}, which leads to {path}, {_writable(status)} and has no sticky bit: "
                f"{_who_may(status.st_uid)}chmod +t {place}, or choose another folder"
            )


def check_socket(path: Path, owners: Collection[int] = ()) -> None:
    """PermissionError when somebody else than this user, root or one of `owners` may be listening at
    `path`; FileNotFoundError when nothing is there."""
    trusted = {os.geteuid(), _ROOT, *owners}
    status = path.lstat()
    if not stat.S_ISSOCK(status.st_mode):
        raise _refused(f"{path} is not a socket: name the agent's")
    _check_owner(path, status, trusted)
    _check_around(path.parent, "the socket", trusted, owners)


def read_trusted(path: Path, owners: Collection[int], max_bytes: int) -> bytes:
    """What is in the file at `path`. PermissionError when somebody else than this user, root or one of
    `owners` may have written it, or when it has more than `max_bytes`; OSError when it cannot be read."""
    trusted = {os.geteuid(), _ROOT, *owners}
    # Whoever put a pipe there lets nobody wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(f"{path} is no file: have it removed")
        _check_owner(path, status, trusted)
        if status.st_mode & WRITABLE_BY_OTHERS:
            raise _refused(f"{path} {_writable(status)}: chmod go-w {path}")
        _check_around(path.parent, "the file", trusted, owners)
        data = os.pread(descriptor, max_bytes + 1, 0)
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise _refused(f"{path} has more than {max_bytes} bytes: have it removed")
    return data


def _check_around(
    folder: Path, what: str, trusted: Collection[int], owners: Collection[int]
) -> None:
    around = os.stat(folder)
    if around.st_uid not in trusted and not is_unmapped(around.st_uid):
        raise _refused(
            f"{folder}, in which {what} lies, belongs to user {around.st_uid}, who could put another "
            "in its place: name an agent that you trust"
        )
    if _replaceable(around):
        raise _refused(f"{folder}, in which {what} lies, {_writable(around)}: name another")
    check_way(folder, owners)


def _replaceable(folder: os.stat_result) -> bool:
    """Whether others than the owner of the folder could rename or remove what lies there."""
    own_groups = (0, os.getegid(), folder.st_uid)
    by_group = folder.st_mode & stat.S_IWGRP and folder.st_gid not in own_groups
    shared = by_group or folder.st_mode & stat.S_IWOTH
    return bool(shared and stat.S_ISDIR(folder.st_mode) and not folder.st_mode & stat.S_ISVTX)


def _check_owner(path: Path, status: os.stat_result, owners: Collection[int]) -> None:
    if status.st_uid not in owners:
        raise _refused(
            f"{path} belongs to user {status.st_uid}, this is user {os.geteuid()}: have it removed, or "
            "choose another"
        )


def _who_may(owner: int) -> str:
    """Whom to ask for a change of what belongs to `owner`."""
    return "" if os.geteuid() in (owner, _ROOT) else f"have user {owner} "


def _missing(path: Path) -> list[Path]:
    """The folders above `path` that do not exist, the topmost first."""
    found = []
    for above in path.parents:
        if os.path.lexists(above):
            break
        found.append(above)
    return found[::-1]


def _way(path: Path) -> Iterator[Path]:
    """Every folder and link that leads to `path`, itself not among them; links are followed."""
    at, rest, links = Path("/"), list(path.absolute().parts[1:-1]), 0
    yield at
    while rest:
        part = rest.pop(0)
        if part == "..":
            at = at.parent
            continue
        step = at / part
        yield step
        if not step.is_symlink():
            at = step
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(step))
        rest = [*target.parts[target.is_absolute() :], *rest]
        at = Path("/") if target.is_absolute() else at


def is_unmapped(uid: int) -> bool:
    """Whether `uid` stands for a user outside of this user namespace: there, root's folders look so."""
    try:
        if uid != int(Path("/proc/sys/kernel/overflowuid").read_text()):
            return False
        ranges = Path("/proc/self/uid_map").read_text().split()
    except (OSError, ValueError):
        return False
    return ranges != ["0", "0", "4294967295"]


def _writable(status: os.stat_result) -> str:
    everyone = status.st_mode & stat.S_IWOTH
    who = "everyone" if everyone else f"group {status.st_gid}"
    return f"can be written by {who} (mode {stat.S_IMODE(status.st_mode):04o})"


def _refused(problem: str) -> PermissionError:
    return PermissionError(errno.EPERM, problem)
