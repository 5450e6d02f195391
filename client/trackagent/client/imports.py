"""Imports on threads of this package, kept apart from forks.

A module that one thread is importing while another forks stays half imported in the child, and whoever
imports it there fails: a data loader's worker too, which has nothing to do with this package. So a fork waits
for the import under way, for at most PATIENCE_S, or until a signal handler raises.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 5.0

# Re-entrant: what is imported may fork.
_lock = threading.RLock()


class _Forks(threading.local):
    """Those that this thread has under way, a signal handler's last: whether each has the lock."""

    def __init__(self) -> None:
        self.have_lock: list[bool] = []


_forks = _Forks()


@contextmanager
def whole() -> Iterator[None]:
    """What is imported meanwhile is there in whole, or not at all, in every process that is forked."""
    with _lock:
        yield


def _before_fork() -> None:
    have_lock = _forks.have_lock
    earlier = len(have_lock)
    try:
        # One call without a line of Python in it: a signal handler that raises does so before the lock is
        # taken or after that has been noted, never between. What it raises, Python only prints.
        have_lock.extend(map(_lock.acquire, (True,), (PATIENCE_S,)))
    finally:
        if len(have_lock) == earlier:
            have_lock.append(False)


def _after_fork() -> None:
    if _forks.have_lock and _forks.have_lock.pop():
        _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that has the other one may not be here
    _forks.have_lock.clear()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)
