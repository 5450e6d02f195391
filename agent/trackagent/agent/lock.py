"""The lock files of an agent: one agent for each folder, and a word for others about who it is.

The flock is what counts; the text in the file is a courtesy, and on a full disk it waits for room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from trackagent.agent.errors import AgentError

PATIENCE_S = 0.5
ROOM = "free some space on that disk"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class OwnFile:
    """The file that is at `path` now, by its inode. OSError when there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = _inode(path.lstat())

    def is_there(self) -> bool:
        """Whether the path still leads to it."""
        try:
            return _inode(self.path.lstat()) == self._inode
        except FileNotFoundError:
            return False
        except OSError:
            return True  # nobody can tell, so nothing is known to have changed


class Lock(OwnFile):
    """A lock file that this process holds. about: what it says, as JSON."""

    def __init__(self, path: Path, descriptor: int, about: Mapping[str, object]) -> None:
        super().__init__(path)
        self._descriptor = descriptor
        self._about = json.dumps(about).encode()
        self._said = False

    def say(self) -> None:
        """Writes who holds it, unless that stands there already or there is no room: call it again then.
        OSError for anything else."""
        if self._said:
            return
        try:
            # In this order the page of an earlier text is used again, not lost to others.
            written = os.pwrite(self._descriptor, self._about, 0)
            self._said = written == len(self._about)
        except OSError as error:
            if not is_full(error):
                raise
        os.ftruncate(self._descriptor, len(self._about) if self._said else 0)


@contextlib.contextmanager
def held(path: Path, about: Mapping[str, object]) -> Iterator[Lock]:
    """Holds the lock file, with `about` in it for others to read. AgentError, with what to do, when that
    cannot be done; it names the process that holds it."""
    descriptor = -1
    try:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600)
            if not _locked(descriptor):
                raise AgentError(_whose(path, os.pread(descriptor, 4096, 0)))
            lock = Lock(path, descriptor, about)
            lock.say()
        except OSError as error:
            what = f"{ROOM}, or " if is_full(error) else ""
            raise AgentError(
                f"cannot write {path}: {error.strerror}; {what}give another folder with --dir or --state"
            ) from error
        yield lock
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no room."""
    return error.errno in _NO_ROOM


def _whose(path: Path, said: bytes) -> str:
    try:
        pid = json.loads(said).get("pid")
    except (ValueError, AttributeError):
        return f"another process holds {path}"
    return (
        f"an agent already uses {path.parent} (pid {pid}): use it, or `trackagent stop` it, "
        "or give this one other folders with --dir and --state"
    )


def _locked(descriptor: int) -> bool:
    """Takes the lock; False when it stays another's. Commands that ask whether an agent runs hold it for a
    moment, so one failure means nothing."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
