"""The tables of the embedded store and how an older file becomes a current one.

`PRAGMA user_version` is the version of a file, 0 when it is empty (in `application_id` it stands again, with
MARK); version n comes from n-1 by MIGRATIONS[n-1]. Rows are few: what grows with the number of points are
`chunks` and `columns` only, and what lists show (`runs`, `streams`) is kept current by the writer, never
counted.

experiments  one a name
runs         one a run, all that RunSummary shows. listed: 0 where nobody has logged, such as the run of what
             is sampled on a node
sources      one a source of a run; keys: all keys it logged, joined by newlines, without what was sampled
producers    one a producer; end_status NULL while it has not ended. attempt: the run's count, made of
             (job_time_ns, said_attempt) by runs.py. sampled: '' where it logs, else its source. reduced:
             over what an agent reduces, else ''. in_groups: the rank's groups as JSON, '' for none
keysets      one a tuple of keys that were logged together, by digest; keys joined by newlines
streams      one a (producer, keyset, reduced): what these logged, in order of arrival; reduced: 1 where the
             values stand in reductions too. first_step and last_step are
             least and greatest, last_values the float64 values at (last_step, last_time_ns). fresh: chunks
             since the last look of the compaction; due: 1 look again, 2 the producer has ended, merge all
chunks       points [start, start + n) of a stream; data: a block with all columns (chunks.py), NULL when
             they lie in `columns`. increasing: steps rise strictly; first_step and last_step: the least and
             the greatest, NULL where they are not known. level: see compaction.py, -1 when damaged
columns      id = chunk * 16384 + position; position 0 the steps, 1 the times, 2 + i the i-th key
losses       one a (producer, reason); counted: largest count from the beginning, more: additions to it
gaps         one a (producer, reason, first_time_ns): log calls refused in a row
applied      ranges of spool sequence numbers that were written; origin "" where some of them were lost with
             a damaged file
copy_of_*    indexes with all of a table that cannot be computed from other rows, see TWICE
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trackagent.agent.store.contract import StoreError

if TYPE_CHECKING:
    from sqlite_utils import Database

COLUMNS_PER_CHUNK = 16_384
MARK = 0x746B_0000  # with the version: PRAGMA application_id from version 5 on

TABLES = (
    "experiments",
    "runs",
    "sources",
    "producers",
    "keysets",
    "streams",
    "chunks",
    "columns",
    "params",
    "tags",
    "events",
    "losses",
    "gaps",
    "applied",
)
LARGE = ("chunks", "columns")
PARTIAL_INDEX = "idx_streams_due"
CHUNKS_INDEX = "idx_chunks_stream_start"
# What cannot be computed from other rows stands in an index as well: on other pages, so that one that is
# damaged costs nothing, and so that SQLite's own check finds a value that was changed. A column that is not
# asked for comes first: these indexes are not meant for questions.
TWICE = {
    "producers": (
        "pid",
        "node",
        "start_time_ns",
        "local_rank",
        "world_size",
        "rank",
        "forked",
        "run_name",
        "experiment",
        "job_time_ns",
        "said_attempt",
        "attempt",
        "end_status",
        "end_time_ns",
        "end_error",
        "logged",
        "sampled",
        "reduced",
        "in_groups",
        "producer_id",
        "run",
        "source",
    ),
    "keysets": ("keys",),
    "params": ("time_ns", "value", "run", "key"),
    "tags": ("time_ns", "value", "run", "key"),
    "events": ("time_ns", "level", "step", "message", "data", "producer", "run"),
    "losses": ("reason", "producer", "counted", "more"),
    "gaps": (
        "last_time_ns",
        "reason",
        "producer",
        "first_time_ns",
        "first_step",
        "last_step",
        "records",
    ),
    "applied": ("last", "first", "origin"),
}


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Brings the open database to the current version, in one transaction; does nothing where it is.

    Raises StoreError for a database of a newer version.
    """
    if version_of(connection, path) == len(MIGRATIONS):
        return
    from sqlite_utils import Database  # takes 0.3 s to import and is needed here only

    connection.execute("BEGIN IMMEDIATE")
    try:
        database = Database(connection, execute_plugins=False)
        # Looked at again under the lock: another process may have been quicker.
        for step in MIGRATIONS[version_of(connection, path) :]:
            step(database)
        # Twice, so that damage to one is not taken for another version.
        connection.execute(f"PRAGMA application_id = {MARK + len(MIGRATIONS)}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def shape_of(connection: sqlite3.Connection) -> str:
    """A digest of the columns of all tables and indexes."""
    rows = connection.execute(
        "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
        " UNION ALL SELECT m.name, c.name FROM sqlite_master m, pragma_index_info(m.name) c"
        " WHERE m.type = 'index'"
    ).fetchall()
    names = "\n".join(f"{table} {column}" for table, column in sorted(rows))
    return hashlib.blake2b(names.encode(), digest_size=8).hexdigest()


def indexes_of(names: Iterable[str], table: str) -> list[tuple[str, bool]]:
    """Those of `names` that are indexes of a table, and whether they are its copy."""
    copy = f"copy_of_{table}"
    of = (f"idx_{table}_", f"sqlite_autoindex_{table}_")
    return [(name, name == copy) for name in names if name == copy or name.startswith(of)]


def version_of(connection: sqlite3.Connection, path: Path) -> int:
    """The version of the open database. Raises StoreError when it is newer than this program."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StoreError(
            f"cannot open the store {path}: it has version {version} and this trackagent knows "
            f"versions up to {len(MIGRATIONS)}; use the trackagent that wrote it or a newer one"
        )
    return version


def _version_1(database: Database) -> None:
    create = database.create_table
    create("experiments", {"id": int, "name": str}, pk="id", not_null=["name"])
    database.table("experiments").create_index(["name"], unique=True)

    counts = {
        "ranks": int,
        "series": int,
        "points": int,
        "records_stored": int,
        "lost_records": int,
    }
    create(
        "runs",
        {
            "id": int,
            "run_id": str,
            "name": str,
            "experiment": int,
            "status": str,
            "attempt": int,
            "world_size": int,
            "start_time_ns": int,
            "end_time_ns": int,
            "error": str,
            "records_logged": int,
            **counts,
        },
        pk="id",
        not_null=["run_id", "name", "experiment", "status", "error", *counts],
        defaults={"status": "running", "error": "", **dict.fromkeys(counts, 0)},
        foreign_keys=[("experiment", "experiments", "id")],
    )
    runs = database.table("runs")
    runs.create_index(["run_id"], unique=True)
    runs.create_index(["name"])
    newest = ["start_time_ns", "run_id"]
    for filtered in ([], ["experiment"], ["status"], ["experiment", "status"]):
        runs.create_index([*filtered, *newest])

    create(
        "sources",
        {"id": int, "run": int, "source": str, "keys": str},
        pk="id",
        foreign_keys=[("run", "runs", "id")],
    )
    database.table("sources").create_index(["run", "source"], unique=True)

    create(
        "producers",
        {
            "id": int,
            "producer_id": bytes,
            "run": int,
            "source": int,
            "attempt": int,
            "rank": int,
            "local_rank": int,
            "world_size": int,
            "node": str,
            "pid": int,
            "start_time_ns": int,
            "experiment": int,
            "run_name": str,
            "forked": int,
            "records": int,
            "end_status": str,
            "end_time_ns": int,
            "end_error": str,
            "logged": int,
        },
        pk="id",
        defaults={"records": 0},
        foreign_keys=[("run", "runs", "id"), ("source", "sources", "id")],
    )
    producers = database.table("producers")
    producers.create_index(["producer_id"], unique=True)
    producers.create_index(["run", "attempt"])
    producers.create_index(["source"])

    create("keysets", {"id": int, "digest": bytes, "keys": str}, pk="id")
    database.table("keysets").create_index(["digest"], unique=True)

    create(
        "streams",
        {
            "id": int,
            "producer": int,
            "keyset": int,
            "points": int,
            "first_step": int,
            "last_step": int,
            "last_time_ns": int,
            "last_values": bytes,
            "fresh": int,
            "due": int,
        },
        pk="id",
        defaults={"points": 0, "fresh": 0, "due": 0},
        foreign_keys=[("producer", "producers", "id"), ("keyset", "keysets", "id")],
    )
    database.table("streams").create_index(["producer", "keyset"], unique=True)
    database.execute("CREATE INDEX idx_streams_due ON streams (id) WHERE due > 0")

    create(
        "chunks",
        {
            "id": int,
            "stream": int,
            "start": int,
            "n": int,
            "level": int,
            "increasing": int,
            "data": bytes,
        },
        pk="id",
        foreign_keys=[("stream", "streams", "id")],
    )
    database.table("chunks").create_index(["stream", "start"], unique=True)
    create("columns", {"id": int, "data": bytes}, pk="id")

    setting = {"run": int, "key": str, "value": str, "time_ns": int}
    for table in ("params", "tags"):
        create(table, setting, pk=("run", "key"), foreign_keys=[("run", "runs", "id")])
    create(
        "events",
        {
            "id": int,
            "run": int,
            "producer": int,
            "time_ns": int,
            "level": str,
            "step": int,
            "message": str,
            "data": str,
        },
        pk="id",
        foreign_keys=[("run", "runs", "id"), ("producer", "producers", "id")],
    )
    database.table("events").create_index(["run", "id"])
    create(
        "losses",
        {"producer": int, "reason": str, "records": int},
        pk=("producer", "reason"),
        foreign_keys=[("producer", "producers", "id")],
    )
    create("applied", {"origin": str, "first": int, "last": int}, pk=("origin", "first"))


def _version_2(database: Database) -> None:
    losses = database.table("losses")
    losses.transform(rename={"records": "counted"})
    losses.add_column("more", int, not_null_default=0)


def _version_3(database: Database) -> None:
    figures = ("first_time_ns", "last_time_ns", "first_step", "last_step", "records")
    database.create_table(
        "gaps",
        {"producer": int, "reason": str, **dict.fromkeys(figures, int)},
        pk=("producer", "reason", "first_time_ns"),
        foreign_keys=[("producer", "producers", "id")],
    )


def _version_4(database: Database) -> None:
    # attempt, as a job said it until now, is the run's own count over all jobs that continued it.
    producers = database.table("producers")
    producers.add_column("job_time_ns", int, not_null_default=0)
    producers.add_column("said_attempt", int, not_null_default=0)
    database.execute("UPDATE producers SET said_attempt = attempt")


def _version_5(database: Database) -> None:
    for table in TWICE:
        if table != "producers":  # which gets another column
            _copy(database, table)


def _version_6(database: Database) -> None:
    database.table("producers").add_column("sampled", str, not_null_default="")
    database.table("runs").add_column("listed", int, not_null_default=1)
    for bound in ("first_step", "last_step"):
        database.table("chunks").add_column(bound, int)


def _version_7(database: Database) -> None:
    for column in ("reduced", "in_groups"):
        database.table("producers").add_column(column, str, not_null_default="")
    database.execute("DROP INDEX IF EXISTS copy_of_producers")
    _copy(database, "producers")
    database.table("streams").add_column("reduced", int, not_null_default=0)
    database.execute("DROP INDEX idx_streams_producer_keyset")
    unique = ["producer", "keyset", "reduced"]
    database.table("streams").create_index(unique, unique=True)


def _copy(database: Database, table: str) -> None:
    database.execute(f"CREATE INDEX copy_of_{table} ON {table} ({', '.join(TWICE[table])})")


MIGRATIONS: tuple[Callable[[Database], None], ...] = (
    _version_1,
    _version_2,
    _version_3,
    _version_4,
    _version_5,
    _version_6,
    _version_7,
)
VERSION = len(MIGRATIONS)
# What `shape_of` says of a store of this version.
SHAPE = "dceed60bf717312f"
