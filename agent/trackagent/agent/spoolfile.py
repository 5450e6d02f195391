"""The spool's database file: how it is made, opened and checked, and what becomes of a damaged one.

Opening looks at what is small, however large the backlog is; batches are checked when they are read.

A damaged file goes to `quarantine/` with its log and the reason, and a new one begins with what can be read
of it (salvage.py). The new one is whole before the old one moves, so a crash in between changes nothing:
<name>.salvaging is being written, <name>.salvaged is to take the place of the damaged one.

SQLite takes a log that is missing or empty for one that was done with. So <name>.logged lies beside the
file from the first commit, before anybody is told of it, until the file is closed or the process exits; a
process that is killed leaves it. Where it lies, the log has a head, or it is damaged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import weakref
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from trackagent.agent import notices
from trackagent.agent.errors import AgentError
from trackagent.agent.pagelog import PAGE_BYTES
from trackagent.agent.pages import Pages
from trackagent.agent.quarantine import set_aside_database, sync
from trackagent.agent.salvage import Hole, Salvaged, batch_bytes, salvaged
from trackagent.agent.spooltables import (
    AGENT_LANE,
    COLUMNS,
    OLDER_VERSION,
    VERSION,
    SpoolDamaged,
    Tables,
    checksum,
    names_of,
    schema,
    upgrade,
)

logger = logging.getLogger(__name__)

_SHOWN_HOLES = 20


class SpoolError(AgentError):
    """The spool cannot take or give what was asked; the message says why."""


def is_damage(error: BaseException) -> bool:
    """Whether an error says that the file is damaged. Other errors of SQLite say other things: a full
    disk, a failing one, a lock."""
    if isinstance(error, sqlite3.OperationalError):
        # Of a table whose definition is damaged, and of text that is none any more.
        return str(error).startswith(("no such ", "Could not decode", "unsupported file format"))
    # What SQLite says of a damaged file may quote it, and then cannot be decoded.
    return isinstance(error, (sqlite3.DatabaseError, sqlite3.InterfaceError, UnicodeDecodeError))


class SpoolFile:
    """The file at `path`. `connect`: a seam for faults."""

    def __init__(self, path: Path, connect: Callable[..., sqlite3.Connection]) -> None:
        self._path = path
        self._connect = connect
        self._quarantine = path.parent / "quarantine"
        self._begun = path.with_name(f"{path.name}.salvaging")
        self._ready = path.with_name(f"{path.name}.salvaged")
        self._log = path.with_name(f"{path.name}-wal")
        self._mark = path.with_name(f"{path.name}.logged")
        self._mark_failed = False
        # Not None: the mark is there. Whoever exits without `close` closes the file all the same.
        self._unmarking: Callable[[], object] | None = None

    def open(self) -> sqlite3.Connection:
        """A connection to the file, which is made if it is missing, and replaced if it is damaged. SpoolError
        when neither can be done."""
        try:
            if self._ready.exists():
                self._finish_replacing("damaged; the agent ended while it was replaced")
            problem, lost = self._problem()
            if problem is None:
                try:
                    connection = self._opened()
                    if self._mark.exists():
                        self._unmark_at_exit()
                    return connection
                except (sqlite3.Error, UnicodeDecodeError) as error:
                    if not is_damage(error):
                        raise
                    problem = str(error)
            return self.replace(problem, lost=lost)
        except (sqlite3.Error, OSError) as error:
            raise SpoolError(f"cannot open the spool {self._path}: {error}") from error

    def close(self, connection: sqlite3.Connection) -> None:
        """Closes what `open` or `replace` gave; SQLite brings the log into the file and deletes it then."""
        if self._unmarking is not None:
            self._unmarking()
            self._unmarking = None
        connection.close()

    def note_commit(self) -> None:
        """Something is committed. To be called before anybody is told of it."""
        if self._unmarking is not None:
            return
        try:
            if not self._log.stat().st_size:
                return
            self._mark.touch(mode=0o600)
            sync(self._mark)
            sync(self._path.parent)
            self._unmark_at_exit()
        except OSError as error:
            # The commit stands. What this guards against is a second fault; the next commit tries again.
            if not self._mark_failed:
                logger.warning("cannot make %s: %s; trying again", self._mark, error)
            self._mark_failed = True

    def _unmark_at_exit(self) -> None:
        self._unmarking = weakref.finalize(self, _unmark, self._mark, os.getpid())

    def replace(self, reason: str, *, lost: int = 0) -> sqlite3.Connection:
        """A connection to a new file that has what can be read of the damaged one, which nobody has open.
        lost: batches of which nothing can be read, and that nobody knows of."""
        with contextlib.closing(Pages(self._path)) as pages:
            found = salvaged(pages)
            found.lost += lost
            self._begun.unlink(missing_ok=True)
            self._fill(found, pages, reason)
        os.replace(self._begun, self._ready)
        what = "; all that its log held is lost" if lost else ""
        self._finish_replacing(f"{reason}{what}; {_summary(found)}")
        return self._opened()

    def _problem(self) -> tuple[str | None, int]:
        """What is wrong with the file that SQLite would not notice, or not in time; None also where there has
        been none. And 1 where a whole log is lost: nobody knows how many batches it had."""
        marked = self._mark.exists()
        if not self._path.exists() and not self._log.exists():
            return ("it is gone, and its log", 1) if marked else (None, 0)
        with contextlib.closing(Pages(self._path)) as pages:
            if pages.is_database and pages.version not in (0, OLDER_VERSION, VERSION):
                if salvaged(pages).origin is None:
                    raise SpoolError(
                        f"the spool {self._path} has version {pages.version}, this program knows {VERSION}: "
                        "start the trackagent that wrote it"
                    )
                return f"it says that it has version {pages.version}", 0
            log_problem, lost = pages.log_problem, 0
            if marked and not pages.log_begins and pages.views == 1:
                lost = 1
                log_problem = log_problem or (
                    f"its log {self._log.name} is gone or empty, though the agent did not end"
                )
            return pages.head_problem() or log_problem or pages.freelist_problem(), lost

    def _opened(self) -> sqlite3.Connection:
        self._path.touch(mode=0o600)
        connection = self._connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(connection, Tables(connection))
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection, tables: Tables) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            if connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                raise SpoolDamaged("it has no version")
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"BEGIN;{schema()}{_named(uuid4().hex)}COMMIT;")
            # So that the file is one without its log, too.
            connection.execute("PRAGMA wal_checkpoint")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            if version == OLDER_VERSION:
                connection.executescript(f"BEGIN;{upgrade()}COMMIT;")
            _check(connection, tables)
        connection.execute("PRAGMA synchronous = FULL")

    # --- replacing a damaged file

    def _fill(self, found: Salvaged, pages: Pages, reason: str) -> None:
        """Writes the new file, durable when this returns."""
        self._begun.touch(mode=0o600)
        connection = self._connect(self._begun, isolation_level=None, check_same_thread=False)
        with contextlib.closing(connection):
            tables = Tables(connection)
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(schema())
            connection.execute("BEGIN")
            tables.set_identity(
                found.origin or uuid4().hex, found.first_number, found.lost, found.renamed
            )
            for number, producer in found.producers.items():
                tables.put_producer(number, *producer)
            for lane, state in found.lanes.items():
                tables.set_lane(*lane, *state)
            for schema_id, keys in found.schemas.items():
                tables.add_schema(*schema_id, keys)
            for range_ in found.arrived:
                tables.add_arrived(*range_)
            for name, sink in found.sinks.items():
                tables.put_sink(name, sink)
            for head in found.batches:
                data, _ = batch_bytes(pages, head)
                row = (head.number, head.producer, head.lane, head.first_offset, len(data))
                tables.put_batch((*row, head.previous), data)
            for hole in found.holes:
                why = f"the spool was damaged: {reason}"
                notice = notices.lost_bytes(hole.lane, hole.start, hole.end, why)
                tables.append(hole.producer, AGENT_LANE, notice)
            connection.execute("COMMIT")
        sync(self._begun)

    def _finish_replacing(self, reason: str) -> None:
        """Puts the new file in the place of the damaged one, which is set aside with its log."""
        _unmark(self._mark, os.getpid())
        set_aside_database(self._path, self._quarantine, reason)
        os.replace(self._ready, self._path)
        sync(self._path.parent)


def _unmark(mark: Path, pid: int) -> None:
    """The log is done with. First, so that a death in between looks like damage to nobody."""
    if os.getpid() == pid and mark.exists():
        mark.unlink()
        sync(mark.parent)


def _named(origin: str) -> str:
    return f"INSERT INTO spool VALUES (1, '{origin}', 1, 0, 0, {checksum('spool', 1, origin, 1, 0, 0)});"


def _check(connection: sqlite3.Connection, tables: Tables) -> None:
    """SpoolDamaged, or what SQLite raises, unless everything small is as it was written."""
    for table in COLUMNS:
        found = [_checked_rows(connection, table, name) for name in (table, f"{table}_copy")]
        if found[0] != found[1]:
            raise SpoolDamaged(f"{table} has {found[0]} rows, its copy {found[1]}")
    if connection.execute("SELECT COUNT(*) FROM spool").fetchone()[0] != 1:
        raise SpoolDamaged("it has no name")
    if tables.lacks_last_batches():
        raise SpoolDamaged("the last batches of a lane are not there")
    first, last = tables.ends()
    for after in {first - 1, last - 1}:
        next(tables.batches(after), None)


def _checked_rows(connection: sqlite3.Connection, table: str, name: str) -> int:
    """How many rows `name`, which is the table or its copy, has."""
    (problem,) = connection.execute(f"PRAGMA integrity_check({name})").fetchone()
    if problem != "ok":
        raise SpoolDamaged(f"{name}: {problem}")
    count = 0
    for *fields, crc in connection.execute(f"SELECT {', '.join(names_of(table))}, crc FROM {name}"):
        count += 1
        if checksum(table, *fields) != crc:
            raise SpoolDamaged(f"{name}: a row has another checksum")
    return count


def _summary(found: Salvaged) -> str:
    missing = [_described(hole) for hole in found.holes[:_SHOWN_HOLES]]
    if len(found.holes) > _SHOWN_HOLES:
        missing.append(f"{len(found.holes) - _SHOWN_HOLES} more")
    if found.ownerless[0]:
        missing.append("{} batches ({} bytes) of unknown producers".format(*found.ownerless))
    return (
        f"{len(found.batches)} batches and {len(found.producers)} producers are brought over, "
        f"known to be missing: {', '.join(missing) or 'nothing'}"
    )


def _described(hole: Hole) -> str:
    return f"of producer {hole.producer} {notices.described_bytes(hole.lane, hole.start, hole.end)}"
