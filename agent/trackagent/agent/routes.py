"""Where the runs go that other agents take: of each hub its last address, of each run its token.

An SQLite file of its own beside the spool, for the agent's user alone, written before a producer's first byte
is taken: an agent that is started again knows as much. A hub is known by its pin; its address may change. A
lost file costs delay: ranks that connect say it again, and what is spooled waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

from trackagent.agent.smallfile import opened
from trackagent.client.hub import Hub

# Runs whose tokens are kept; beyond it those go that were heard of first.
MAX_RUNS = 100_000
# Hubs that are kept; beyond it those go of which nobody has spoken for longest.
MAX_HUBS = 10_000
# How many speak for calls that concern no run.
NEWEST_RUNS = 16
_SCHEMA = """
CREATE TABLE IF NOT EXISTS hubs (pin TEXT PRIMARY KEY, address TEXT NOT NULL, heard_ns INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY, run_id TEXT NOT NULL, pin TEXT NOT NULL, token TEXT NOT NULL,
    UNIQUE (run_id, pin)
);
"""


class Routes:
    """The routes in the file `path`, which is made if it is missing; a damaged one is set aside in
    `quarantine`. Any thread may call; calls wait for the disk.

    sqlite3.Error when the file cannot be read or written: then nothing has changed."""

    def __init__(self, path: Path, quarantine: Path, *, max_hubs: int = MAX_HUBS) -> None:
        self._max_hubs = max_hubs
        self._lock = threading.Lock()
        # What was noted last of each run: its ranks all say the same.
        self._noted: dict[str, Hub] = {}
        self._database = opened(path, quarantine, _SCHEMA)

    def note(self, run_id: str, hub: Hub) -> None:
        """The run goes to this hub, which is at this address now."""
        with self._lock:
            if self._noted.get(run_id) == hub:
                return
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.execute(
                    "INSERT INTO hubs VALUES (?, ?, ?) ON CONFLICT DO UPDATE"
                    " SET address = excluded.address, heard_ns = excluded.heard_ns",
                    (hub.pin, hub.address, time.time_ns()),
                )
                gone = self._database.execute(
                    "DELETE FROM hubs WHERE pin IN"
                    " (SELECT pin FROM hubs WHERE pin != ? ORDER BY heard_ns DESC LIMIT -1 OFFSET ?)",
                    (hub.pin, self._max_hubs - 1),
                ).rowcount
                self._database.execute(
                    "DELETE FROM runs WHERE run_id = ? AND pin = ?", (run_id, hub.pin)
                )
                self._database.execute(
                    "INSERT INTO runs (run_id, pin, token) VALUES (?, ?, ?)",
                    (run_id, hub.pin, hub.token),
                )
                self._database.execute(
                    "DELETE FROM runs WHERE number <= (SELECT max(number) FROM runs) - ?",
                    (MAX_RUNS,),
                )
            if gone or len(self._noted) >= MAX_RUNS:
                self._noted.clear()
            self._noted[run_id] = hub

    def address(self, pin: str) -> str | None:
        """Where the hub was last said to be, None when nobody has said."""
        with self._lock:
            row = self._database.execute(
                "SELECT address FROM hubs WHERE pin = ?", (pin,)
            ).fetchone()
        return None if row is None else str(row[0])

    def tokens(self, pin: str, run_ids: Iterable[str]) -> dict[str, str]:
        """By run, its token at this hub; runs without one are left out."""
        found: dict[str, str] = {}
        with self._lock:
            for run_id in run_ids:
                row = self._database.execute(
                    "SELECT token FROM runs WHERE run_id = ? AND pin = ?", (run_id, pin)
                ).fetchone()
                if row is not None:
                    found[run_id] = row[0]
        return found

    def newest(self, pin: str) -> dict[str, str]:
        """The newest runs that go to this hub, and their tokens: for calls that concern none of them. Some,
        since the hub may not know one yet, or any more."""
        with self._lock:
            rows = self._database.execute(
                "SELECT run_id, token FROM runs WHERE pin = ? ORDER BY number DESC LIMIT ?",
                (pin, NEWEST_RUNS),
            ).fetchall()
        return dict(rows)

    def pins(self) -> list[str]:
        """The hubs that were heard of."""
        with self._lock:
            return [row[0] for row in self._database.execute("SELECT pin FROM hubs ORDER BY pin")]

    def close(self) -> None:
        with self._lock:
            self._database.close()
