"""Connections to the store's file: how it is opened for writing and reading, and what its errors mean.

The file is private (0600 in a 0700 folder). One writer and any number of readers, each in any process, work
at the same time (WAL).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from trackagent.agent.pages import Pages
from trackagent.agent.quarantine import set_aside_database, sync
from trackagent.agent.store import schema
from trackagent.agent.store.contract import StoreError
from trackagent.agent.store.salvage import salvage

# The pipeline tries again what is kept: a longer wait would only hold up an agent that is to stop.
BUSY_TIMEOUT_S = 2.0
WAL_PAGES = 4_000  # 16 MiB: fewer checkpoints, each of which costs an fsync of the whole file
WAL_BYTES_KEPT = 64 << 20
# Up to this size all of a file is looked at when it is opened for writing.
CHECKED_BYTES = 256 << 20

_REASON_CHARACTERS = 300
_MEND = "restart the agent, which keeps what can be read of it"

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
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot {operation} in {path}: {error}; {_next_step(error)}") from error


def open_for_writing(
    path: Path,
    opener: Opener = connect,
    *,
    damage: str = "",
    thorough: bool = False,
    repair: bool = True,
) -> sqlite3.Connection:
    """The database at `path`, created or migrated where needed; commits are durable when they return.

    A damaged one goes to the folder `quarantine` beside it, with the reason, and a new one takes its place
    with what can be read (salvage.py). damage: what has been found wrong with it already. thorough: looks for
    damage everywhere, however long that takes; else in a file of more than CHECKED_BYTES where there are no
    points. repair: False where an agent may have the file open, whose writes would go to the moved one:
    a damaged file stays as it is, StoreError.
    """
    with translated("open the store", path):
        _make_folder(path.parent)
        if repair:
            _finish_replacing(path, "its replacement was interrupted")
        elif _salvaged(path).exists():
            raise _left_alone(path, "it is being replaced")
        problem = damage or _problem(path)
        if problem and not repair:  # what an agent is just writing may look so
            problem = _problem(path)
        if not problem:
            try:
                return _opened(path, opener, thorough=thorough)
            except (sqlite3.DatabaseError, UnicodeDecodeError, _Damaged) as error:
                if not says_damaged(error):
                    raise
                problem = str(error)
        if not repair:
            raise _left_alone(path, problem)
        _replace(path, problem)
        try:
            return _opened(path, opener, thorough=False)
        except _Damaged as error:  # what was read of it makes no store
            set_aside_database(path, path.parent / "quarantine", str(error))
            return _opened(path, opener, thorough=False)


def _left_alone(path: Path, problem: str) -> StoreError:
    return StoreError(f"the store {path} is damaged ({problem}); {_MEND}")


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
    # Before it is opened: SQLite would wait for the writer of a FIFO.
    if not stat.S_ISREG(mode := path.stat().st_mode):
        what = _OTHERS.get(stat.S_IFMT(mode), "a device")
        raise StoreError(
            f"there is {what} in the place of the store {path}: move it away, or name another folder "
            "(--state, TRACKAGENT_STATE)"
        )
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


_OTHERS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite syncs the folder for its files; that the folder itself stays is for us to see to.
    sync(folder.parent)


def _opened(path: Path, opener: Opener, *, thorough: bool) -> sqlite3.Connection:
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
        connection.execute("PRAGMA cache_size = -8192")
        fresh = not connection.execute("PRAGMA user_version").fetchone()[0]
        _check_version(connection)
        schema.migrate(connection, path)
        if not fresh:
            everything = thorough or path.stat().st_size <= CHECKED_BYTES
            _check(connection, everything=everything)
    except BaseException:
        connection.close()
        raise
    return connection


# --- damage


class _Damaged(Exception):
    """What was found wrong with a file."""


def says_damaged(error: BaseException | None) -> bool:
    """Whether this tells of a damaged file."""
    told = ("malformed", "not a database", "unsupported file format", "decode to UTF-8")
    # What SQLite says of a damaged file may quote it.
    kinds = (_Damaged, UnicodeDecodeError)
    return isinstance(error, kinds) or any(words in str(error) for words in told)


def _problem(path: Path) -> str:
    """What is wrong with the file or its log that SQLite would not notice, or not in time; "" for nothing."""
    log = path.with_name(f"{path.name}-wal")
    if not path.exists() or path.stat().st_size == 0:
        return "it is gone, its log is not" if log.exists() and log.stat().st_size else ""
    with contextlib.closing(Pages(path)) as pages:
        head = pages.page(1)
        if head[:16] != b"SQLite format 3\0" or pages.page(1, 0)[:16] != head[:16]:
            return "file is not a database"
        if head[16:24] != _FORMAT:
            return "its header is damaged"
        return pages.log_problem or pages.freelist_problem() or ""


# Bytes 16 to 23 of the header, the same in every store: pages of 4096 bytes, written and read with a log,
# nothing reserved in them, and the fractions of a payload that SQLite prescribes.
_FORMAT = b"\x10\0\2\2\0\x40\x20\x20"


def _check_version(connection: sqlite3.Connection) -> None:
    """_Damaged where a file says that it has another version than its tables have."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    beside = connection.execute("PRAGMA application_id").fetchone()[0] - schema.MARK
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if (version == 0 and names) or (version != beside and schema.VERSION in (version, beside)):
        raise _Damaged(f"it says that it has version {version}, and {beside}")
    if version == schema.VERSION and schema.shape_of(connection) != schema.SHAPE:
        raise _Damaged("its tables are not those of its version")
    if names:
        (encoding,) = connection.execute("PRAGMA encoding").fetchone()
        (vacuum,) = connection.execute("PRAGMA auto_vacuum").fetchone()
        if encoding != "UTF-8" or vacuum != 2:
            raise _Damaged("its header is damaged")


def _check(connection: sqlite3.Connection, *, everything: bool) -> None:
    """_Damaged unless trees and indexes are as they should be: all, or those of tables without points."""
    tables = [""] if everything else [f"({t})" for t in schema.TABLES if t not in schema.LARGE]
    for table in tables:
        (found,) = connection.execute(f"PRAGMA integrity_check{table}").fetchone()
        if found != "ok":
            raise _Damaged(" ".join(str(found).split()))
    if connection.execute(_TORN_STREAMS).fetchone():
        raise _Damaged("a stream has other keys than values")


_TORN_STREAMS = (
    "SELECT 1 FROM streams s JOIN keysets k ON k.id = s.keyset WHERE typeof(s.last_values) <> 'blob' OR"
    " length(s.last_values) <> 8 * (1 + length(k.keys) - length(replace(k.keys, char(10), ''))) LIMIT 1"
)


def _replace(path: Path, reason: str) -> None:
    """Makes a new file of what can be read of a damaged one, durable before that is moved."""
    begun = path.with_name(f"{path.name}.begun")
    begun.unlink(missing_ok=True)
    path.touch(mode=0o600)
    reason = reason[:_REASON_CHARACTERS]
    try:
        _fill(path, begun, reason)
    except (ArithmeticError, LookupError, TypeError, ValueError, sqlite3.IntegrityError) as error:
        # Said beside the file: a defect of ours must not look like a file that holds nothing.
        _log.exception("nothing can be read of the damaged store %s", path)
        reason = f"{reason}; nothing could be read: {error!r}"
        begun.unlink(missing_ok=True)
    if begun.exists():
        sync(begun)
        begun.rename(_salvaged(path))
        _finish_replacing(path, reason)
    else:
        set_aside_database(path, path.parent / "quarantine", reason)


def _fill(path: Path, begun: Path, reason: str) -> None:
    os.close(os.open(begun, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with contextlib.closing(connect(_uri(begun, "rw"))) as connection:
        for setting in ("page_size = 4096", "auto_vacuum = INCREMENTAL"):
            connection.execute(f"PRAGMA {setting}")
        for setting in ("journal_mode = OFF", "synchronous = OFF"):  # it counts when it is whole
            connection.execute(f"PRAGMA {setting}")
        schema.migrate(connection, begun)
        connection.execute("BEGIN")
        report = salvage(path, connection, reason)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")
    lines = [line for lines in report.runs.values() for line in lines] or report.others
    _log.error(
        "the store %s is damaged (%s); what can be read is kept; missing: %s",
        path,
        reason,
        "; ".join(lines[:20]) or "nothing that is known of",
    )


def _finish_replacing(path: Path, reason: str) -> None:
    """Puts a new file that is whole in the place of the damaged one."""
    ready = _salvaged(path)
    if ready.exists():
        set_aside_database(path, path.parent / "quarantine", reason)
        ready.rename(path)
        sync(path.parent)


def _salvaged(path: Path) -> Path:
    """The new file, whole, that is to take the place of the damaged one."""
    return path.with_name(f"{path.name}.salvaged")


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


def _next_step(error: Exception) -> str:
    text = str(error)
    if "full" in text or "No space" in text:
        return "free some space on that disk"
    if "locked" in text:
        return "another process has been writing for long; try again"
    if says_damaged(error):
        return f"the file is damaged: {_MEND}"
    return "check that the folder exists and belongs to you"
