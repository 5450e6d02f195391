"""Whether a number means the process that is meant: pids are reused, and differ between PID namespaces."""

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
