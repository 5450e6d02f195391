"""Where runs and their series are kept for good: the contract and its implementations."""

from __future__ import annotations

from pathlib import Path

from trackagent.agent.store.contract import Reader, Writer

__all__ = ["open_reader", "open_writer"]


def open_writer(path: Path) -> Writer:
    """The embedded store in the file `path` for writing; file and folder are made where missing.

    Raises StoreError when it cannot be opened or was written by a newer trackagent.
    """
    from trackagent.agent.store.sqlite import SqliteWriter

    return SqliteWriter(path)


def open_reader(path: Path) -> Reader:
    """The embedded store in the file `path` for reading, while an agent writes to it or without one.

    Raises StoreError when nothing has been stored there yet.
    """
    from trackagent.agent.store.reader import SqliteReader

    return SqliteReader(path)
