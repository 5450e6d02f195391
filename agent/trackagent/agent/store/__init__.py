"""Where runs and their series are kept for good: the contract and its implementations."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from trackagent.agent.store.contract import Reader, StoreError, Writer

__all__ = ["StoreError", "open_reader", "open_writer"]


def open_writer(path: Path, *, repair: bool = True) -> Writer:
    """The embedded store in the file `path` for writing; file and folder are made where missing.

    repair: a damaged file is replaced by what can be read of it; False beside an agent that may have it open.
    Raises StoreError when it cannot be opened, was written by a newer trackagent, or is damaged and stays.
    """
    from trackagent.agent.store.sqlite import SqliteWriter

    return SqliteWriter(path, repair=repair)


def open_reader(path: Path, *, timeout_s: float = 30.0) -> Reader:
    """The embedded store in the file `path` for reading, while an agent writes to it or without one.

    timeout_s: how long to wait for a process that keeps all others out. Raises StoreError when nothing has
    been stored there yet.
    """
    from trackagent.agent.store import database
    from trackagent.agent.store.reader import SqliteReader

    return SqliteReader(path, opener=partial(database.connect, timeout_s=timeout_s))
