"""Other users, for tests of what they can do: real ones, so these tests need root."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ALICE, BOB = 60_001, 60_002
_PLAIN = ("setpriv",)


@contextlib.contextmanager
def being(uid: int, *groups: int) -> Iterator[None]:
    """This process is the user and the group `uid`, and in `groups`, meanwhile; skips the test where it may
    not."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def command_as(uid: int, *groups: int) -> tuple[str, ...]:
    """What to put before a command that the user `uid` shall run, in the group `uid` and in `groups`; skips
    the test where that cannot be."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv to run a process as another user")
    return (*_reading(), "--reuid", str(uid), "--regid", str(uid), *_groups(groups))


def command_as_one_who_may_not_look(uid: int) -> tuple[str, ...]:
    """As command_as; skips the test where the user would have to be given the right to read all files."""
    if _reading() != _PLAIN:
        pytest.skip(f"another user cannot run {sys.executable} without the right to read all files")
    return command_as(uid)


def give(path: Path, uid: int, mode: int) -> Path:
    """Makes `path` the user's, with this mode; skips the test where that may not be."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, uid, uid, follow_symlinks=False)
    if not path.is_symlink():
        path.chmod(mode)
    return path


def _groups(groups: tuple[int, ...]) -> tuple[str, ...]:
    return ("--groups", ",".join(map(str, groups))) if groups else ("--clear-groups",)


@functools.cache
def _reading() -> tuple[str, ...]:
    """setpriv, with the right to read all files where other users could not even start this Python."""
    wanted = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    for capability in ((), wanted):
        command = (*_PLAIN, *capability)
        program = (
            "import subprocess, sys, grpc; subprocess.run([sys.executable, '-c', ''], check=True)"
        )
        done = subprocess.run(
            [*command, "--reuid", "60001", "--clear-groups", sys.executable, "-c", program],
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return command
    pytest.skip(f"another user cannot run {sys.executable}")
