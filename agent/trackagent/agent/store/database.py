"""Connections to the store's file: how it is opened for writing and reading, and what its errors mean.

The file is private (0600 in a 0700 folder). One writer and any number of readers, each in any process, work
at the same time (WAL).
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from trackagent.agent.store import schema
from trackagent.agent.store.contract import StoreError

# The pipeline tries again what is kept: a longer wait would only hold up an agent that is to stop.
BUSY_TIMEOUT_S = 2.0
WAL_PAGES = 4_000  # 16 MiB: fewer checkpoints, each of which costs an fsync of the whole file
WAL_BYTES_KEPT = 64 << 20

_log = logging.getLogger(__name__)

Opener = Callable[[str], sqlite3.Connection]
"""Opens a `file:` URI in autocommit, usable from any thread; tests give one that fails on purpose."""


def connect(uri: str, *, timeout_s: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """The Opener used in earnest. timeout_s: how long to wait for another process's lock."""
    return sqlite3.connect(
        uri, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False
    )


@contextmanager
def translated(operation: str, path: Path) -> Iterator[None]:
    """Turns what SQLite and the file system raise into StoreError, except what is about the data itself."""
    try:
        yield
    except sqlite3.DataError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"cannot {operation} in {path}: {error}; {_next_step(error)}") from error


def open_for_writing(path: Path, opener: Opener = connect) -> sqlite3.Connection:
    """The database at `path`, created or migrated where needed; commits are durable when they return.

    A file that is no database is set aside under another name, so that it does not stop what comes.
    """
    with translated("open the store", path):
        _make_folder(path.parent)
        try:
            return _opened(path, opener)
        except sqlite3.DatabaseError as error:
            if not _says_damaged(error):
                raise
            aside = _set_aside(path)
            _log.error("the store %s is damaged (%s): set aside as %s", path, error, aside)
            return _opened(path, opener)


def open_for_reading(path: Path, opener: Opener = connect) -> tuple[sqlite3.Connection, bool]:
    """The database at `path` read-only, and whether the connection may be kept for later questions.

    In a folder that cannot be written, without a log beside the file, SQLite cannot share it with a writer;
    it is then read as it stands, and must be opened anew for each question to see what came since.
    """
    nothing = StoreError(
        f"nothing has been stored yet in {path}; start an agent and log something, or name another folder"
    )
    if not path.exists():
        raise nothing
    with translated("open the store", path):
        try:
            connection, lasting = _probed(opener, _uri(path, "ro")), True
        except sqlite3.OperationalError:
            if _writable(path.parent) or _has_log(path):
                raise
            connection, lasting = _probed(opener, _uri(path, "ro&immutable=1")), False
        try:
            version = schema.version_of(connection, path)
            if version == 0:
                raise nothing
            if version < schema.VERSION:
                raise StoreError(
                    f"cannot read the store {path}: it has version {version}, this trackagent reads version "
                    f"{schema.VERSION}; start the agent once, which brings it up to date"
                )
        except BaseException:
            connection.close()
            raise
        return connection, lasting


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite syncs the folder for its files; that the folder itself stays is for us to see to.
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opened(path: Path, opener: Opener) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = opener(_uri(path, "rw"))
    try:
        # Has an effect on an empty file only. INCREMENTAL: pages that merges free are used again first,
        # and compact() gives the excess back a little at a time; FULL would move pages at every commit,
        # NONE would keep the largest size ever reached.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
        connection.execute("PRAGMA cache_size = -16384")
        schema.migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _uri(path: Path, mode: str) -> str:
    return f"file:{quote(str(path.absolute()))}?mode={mode}"


def _probed(opener: Opener, uri: str) -> sqlite3.Connection:
    connection = opener(uri)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _has_log(path: Path) -> bool:
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    # The log belongs to the file and goes with it; replayed into a new one it would damage that too.
    for suffix in ("-wal", "-shm"):
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + suffix))
    path.rename(aside)
    return aside


def _says_damaged(error: Exception) -> bool:
    return "malformed" in str(error) or "not a database" in str(error)


def _next_step(error: Exception) -> str:
    text = str(error)
    if "full" in text or "No space" in text:
        return "free some space on that disk"
    if "locked" in text:
        return "another process has been writing for long; try again"
    if _says_damaged(error):
        return "the file is damaged: stop the agent and move it aside to start a new store"
    return "check that the folder exists and belongs to you"
