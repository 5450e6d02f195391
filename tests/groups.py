"""Control groups of a test's own, where this system lets them be made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import wait_until


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A memory group below this process's own, with so much room; skips the test where there can be none."""
    group, limit = below_own("memory")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"this system lets no control group be made: {error}")
    try:
        (group / limit).write_text(str(limit_bytes))
        yield group
    except OSError as error:
        pytest.skip(f"this system lets no memory be limited: {error}")
    finally:
        wait_until(lambda: removed(group), "the control group is removed")


def below_own(controller: str) -> tuple[Path, str]:
    """A new group's folder, and the name of the file with its limit."""
    base, name = Path("/sys/fs/cgroup"), f"tka-{os.getpid()}"
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        if controller in controllers.split(","):
            return base / controller / path.lstrip("/") / name, "memory.limit_in_bytes"
    return base / groups[-1][2].lstrip("/") / name, "memory.max"


def removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True
