"""Which process is meant by a number: pids are reused, and differ between PID namespaces."""

from __future__ import annotations

import os
from pathlib import Path


def holds(pid: int, path: Path, proc: Path = Path("/proc")) -> bool:
    """Whether the process `pid` of this PID namespace has the file `path` open; PermissionError when it is
    another user's."""
    try:
        wanted = os.stat(path)
        descriptors = list((proc / str(pid) / "fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False
    for descriptor in descriptors:
        try:
            found = descriptor.stat()
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def holder(pid: int, lock: Path, proc: Path = Path("/proc")) -> int | None:
    """The process that holds the file `lock` open, by its number in this PID namespace: `pid`, as it calls
    itself, or where that is a number of another namespace, the one of which the kernel says that it has
    locked the file. None when it cannot be found here, or is another user's."""
    if _surely_holds(pid, lock, proc):
        return pid
    try:
        inode = os.stat(lock).st_ino
        lines = (proc / "locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        # `1: FLOCK ADVISORY WRITE 4711 00:1a:815 0 EOF`
        fields = line.split()
        if len(fields) < 6 or fields[1] != "FLOCK" or not fields[4].isdecimal():
            continue
        # Another file system may have a file of the same number.
        if fields[5].rpartition(":")[2] == str(inode) and _surely_holds(int(fields[4]), lock, proc):
            return int(fields[4])
    return None


def _surely_holds(pid: int, path: Path, proc: Path) -> bool:
    try:
        return holds(pid, path, proc)
    except PermissionError:
        return False
