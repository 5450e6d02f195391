"""A small SQLite file beside the spool, written before the first byte of the producers that it speaks of.

For the agent's user alone, and every commit is on the disk. Damage costs what the file said, never the start.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from trackagent.agent.quarantine import set_aside_database


def opened(path: Path, quarantine: Path, schema: str) -> sqlite3.Connection:
    """The file, which is made if it is missing, with what `schema` creates; a damaged one is set aside in
    `quarantine`, and begun anew. Any thread may use the connection, one at a time.

    sqlite3.Error when it cannot be read or written, OSError when it cannot be made or set aside."""
    try:
        return _opened(path, schema)
    except sqlite3.DatabaseError as error:
        # Its subclasses say other things than damage: a full disk, a failing one.
        if type(error) is not sqlite3.DatabaseError:
            raise
        set_aside_database(path, quarantine, str(error))
        return _opened(path, schema)


def _opened(path: Path, schema: str) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(schema)
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    except BaseException:
        database.close()
        raise
    return database
