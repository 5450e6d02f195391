"""Imports on threads of this package, kept apart from forks.

A module that one thread is importing while another forks stays half imported in the child, and whoever
imports it there fails: a data loader's worker too, which has nothing to do with this package. So a fork waits
for the import under way, for at most PATIENCE_S.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 5.0

# Re-entrant: what is imported may fork.
_lock = threading.RLock()
_impatient: set[int] = set()  # threads that fork without it


@contextmanager
def whole() -> Iterator[None]:
    """What is imported meanwhile is there in whole, or not at all, in every process that is forked."""
    with _lock:
        yield


def _before_fork() -> None:
    if not _lock.acquire(timeout=PATIENCE_S):
        _impatient.add(threading.get_ident())


def _after_fork() -> None:
    if threading.get_ident() in _impatient:
        _impatient.discard(threading.get_ident())
    else:
        _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _after_fork()
    _lock = threading.RLock()  # of an import that took too long, the thread is not here


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)
