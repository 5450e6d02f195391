"""Which run tokens are good here: who knows one may deliver to its run. Rank 0 makes a token for each of its
starts and tells it to its own agent first, so this agent knows whom to believe when other nodes come.

An SQLite file of its own beside the spool, with the SHA-256 of each token and not the token. A token is
committed before its producer's first byte is taken. Of a run the newest MAX_TOKENS are good. A lost file
costs delay: rank 0 says its token again when it connects.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from pathlib import Path

from trackagent.agent.smallfile import opened

MAX_TOKENS = 16
# Runs whose tokens are kept; beyond it those go whose last token came first.
MAX_RUNS = 100_000
RUN_ID = re.compile(r"[0-9a-f]{32}")
_KEPT = 10_000
_NOBODY = b"\0" * 32
_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    number INTEGER PRIMARY KEY, run_id TEXT NOT NULL, digest BLOB NOT NULL, UNIQUE (run_id, digest)
);
"""


class TokenTable:
    """The tokens in the file `path`, which is made if it is missing; a damaged one is set aside in
    `quarantine`. Any thread may call; calls wait for the disk.

    sqlite3.Error when the file cannot be read or written: then nothing has changed."""

    def __init__(self, path: Path, quarantine: Path) -> None:
        self._lock = threading.Lock()
        # Of runs that were asked for lately, what is in the file. Changed with the lock, and read without.
        self._digests: dict[str, list[bytes]] = {}
        self._database = opened(path, quarantine, _SCHEMA)

    def note(self, run_id: str, token: str) -> None:
        """The token is good for the run from now on, as the newest. ValueError for what is no run id."""
        if not RUN_ID.fullmatch(run_id):
            raise ValueError(f"{run_id!r:.80} is no run id")
        digest = _digest(token)
        with self._lock:
            if self._of(run_id)[:1] == [digest]:
                return
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.execute(
                    "DELETE FROM tokens WHERE run_id = ? AND digest = ?", (run_id, digest)
                )
                self._database.execute(
                    "INSERT INTO tokens (run_id, digest) VALUES (?, ?)", (run_id, digest)
                )
                self._database.execute(
                    "DELETE FROM tokens WHERE run_id = ?1 AND number NOT IN (SELECT number FROM tokens "
                    "WHERE run_id = ?1 ORDER BY number DESC LIMIT ?2)",
                    (run_id, MAX_TOKENS),
                )
                self._database.execute(
                    "DELETE FROM tokens WHERE number <= (SELECT max(number) FROM tokens) - ?",
                    (MAX_RUNS * MAX_TOKENS,),
                )
            self._digests.pop(run_id, None)

    def is_good(self, run_id: str, token: str) -> bool:
        """Whether the token is one of the run's. It takes as long whatever is compared."""
        digest = _digest(token)
        known = self._digests.get(run_id)
        if known is None:
            with self._lock:
                known = self._of(run_id) if RUN_ID.fullmatch(run_id) else []
        found = False
        for at in range(MAX_TOKENS):
            found |= hmac.compare_digest(known[at] if at < len(known) else _NOBODY, digest)
        return found

    def is_quick(self, run_id: str) -> bool:
        """Whether `is_good` would not look into the file for this run now, so that an event loop may ask."""
        return run_id in self._digests

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _of(self, run_id: str) -> list[bytes]:
        """The digests of a run's tokens, the newest first."""
        found = self._digests.get(run_id)
        if found is None:
            rows = self._database.execute(
                "SELECT digest FROM tokens WHERE run_id = ? ORDER BY number DESC", (run_id,)
            )
            found = [bytes(row[0]) for row in rows]
            if len(self._digests) > _KEPT:
                self._digests.clear()
            self._digests[run_id] = found
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
