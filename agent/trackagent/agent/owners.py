"""Which user a run belongs to, where an agent serves a group: the one who opened it first, for ever.

An SQLite file of its own beside the spool, written before a producer's first byte is taken. A run that is
stored and that nobody is known to have opened belongs to the user who runs the agent: it is from a time
without a group, or the file was lost. So a loss may refuse a run's owner, and never lets anybody else in.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from trackagent.agent.errors import AgentError
from trackagent.agent.smallfile import opened

_KEPT = 100_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run_id TEXT PRIMARY KEY, uid INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS producers (producer_id BLOB PRIMARY KEY, uid INTEGER NOT NULL) WITHOUT ROWID;
"""


class NotYours(AgentError):
    """The run or the producer is another user's."""


class Owners:
    """The owners in the file `path`, which is made if it is missing; a damaged one is set aside in
    `quarantine`. is_stored: whether a run, by its id, is in the store. Any thread may call; calls wait for
    the disk.

    sqlite3.Error when the file cannot be read or written: then nothing has changed."""

    def __init__(self, path: Path, quarantine: Path, is_stored: Callable[[str], bool]) -> None:
        self._is_stored = is_stored
        self._lock = threading.Lock()
        # What is in the file, for those who ask again.
        self._producers: dict[bytes, int] = {}
        self._granted: set[tuple[str, bytes, int]] = set()
        self._database = opened(path, quarantine, _SCHEMA)

    def claim(self, run_id: str, producer_id: bytes, uid: int) -> None:
        """The user opens a producer of a run; NotYours when one of them is another user's. Claims that were
        granted before take no time."""
        if (run_id, producer_id, uid) in self._granted:
            return
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            owner = self._owner_of_run(run_id, uid)
            if owner != uid:
                raise NotYours(f"the run {run_id} is another user's: begin one of your own")
            known = self._owner_of(producer_id)
            if known not in (None, uid):
                raise NotYours("this producer is another user's")
            if known is None:
                self._database.execute("INSERT INTO producers VALUES (?, ?)", (producer_id, uid))
                self._database.execute("INSERT OR IGNORE INTO runs VALUES (?, ?)", (run_id, uid))
        self._remember(producer_id, uid)
        if len(self._granted) > _KEPT:
            self._granted.clear()
        self._granted.add((run_id, producer_id, uid))

    def claim_unknown(self, producers: Iterable[tuple[str, bytes]]) -> None:
        """Runs and producers of whom nobody is known to have opened them are the agent's user's."""
        uid = os.geteuid()
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            for run_id, producer_id in producers:
                self._database.execute("INSERT OR IGNORE INTO runs VALUES (?, ?)", (run_id, uid))
                self._database.execute(
                    "INSERT OR IGNORE INTO producers VALUES (?, ?)", (producer_id, uid)
                )

    def is_of(self, producer_id: bytes, uid: int) -> bool:
        """Whether the user has opened this producer."""
        owner = self._producers.get(producer_id)
        if owner is None:
            with self._lock:
                owner = self._owner_of(producer_id)
            if owner is not None:
                self._remember(producer_id, owner)
        return owner == uid

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _owner_of_run(self, run_id: str, uid: int) -> int:
        row = self._database.execute("SELECT uid FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if row is not None:
            return int(row[0])
        return os.geteuid() if self._is_stored(run_id) else uid

    def _owner_of(self, producer_id: bytes) -> int | None:
        row = self._database.execute(
            "SELECT uid FROM producers WHERE producer_id = ?", (producer_id,)
        ).fetchone()
        return None if row is None else int(row[0])

    def _remember(self, producer_id: bytes, uid: int) -> None:
        if len(self._producers) > _KEPT:
            self._producers.clear()
        self._producers[producer_id] = uid
