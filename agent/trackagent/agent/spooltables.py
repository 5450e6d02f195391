"""The spool's tables: their rows as they are written and read, inside the writing thread's transactions.

SQLite itself notices damage to its structure only, so each row carries a checksum in the column `crc`, and
all tables but `batches` are kept twice, the copy by triggers: what is small and cannot be had again is not
lost with one page.

    spool      origin: the spool's name in batch ids; first_number: what comes next has this number at least;
               lost: batches of damaged files that concern no run that is known; renamed: numbers up to this
               one were given under another name, or went another way
    producers  info: ProducerInfo as JSON; ended_ns NULL while it has not ended
    lanes      committed: offset up to which the lane is received; last: number of its last batch, 0 for none
    schemas    keys joined by newlines
    batches    previous: the lane's batch before, 0 for none; content: CRC-32 of bytes; ordinal and total:
               batches and bytes up to this one, so that what waits is a difference and never counted
    arrived    ranges of other agents' spools (origin) that came; neighbouring ones are one
    sinks      origin: the first part of the ids of what it gets; everything up to batch `cursor` is
               delivered; planned: end of the range under way
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from zlib import crc32

from trackagent.agent.producers import from_fields, to_fields
from trackagent.agent.store.contract import ProducerInfo

VERSION = 3
# Without the table `arrived`.
OLDER_VERSION = 2
# The lane of what the agent itself has to say about a producer; a journal's lanes are below 64.
AGENT_LANE = 255
# The lane of what another agent forwarded: each batch is a Part (hub.proto) of the spool whose name the
# producer's id is.
FORWARDED_LANE = 254
# Ranges of one origin that are known apart. Between them dead letters may be missing, and come yet.
MAX_RANGES = 4_096

COLUMNS = {
    "spool": "id INTEGER PRIMARY KEY, origin TEXT NOT NULL, first_number INTEGER NOT NULL,"
    " lost INTEGER NOT NULL, renamed INTEGER NOT NULL",
    "producers": "number INTEGER PRIMARY KEY, producer_id BLOB NOT NULL, info TEXT NOT NULL,"
    " ended_ns INTEGER",
    "lanes": "producer INTEGER, lane INTEGER, committed INTEGER NOT NULL, last INTEGER NOT NULL",
    "schemas": "producer INTEGER, schema_id INTEGER, keys TEXT NOT NULL",
    "arrived": "origin TEXT, first INTEGER NOT NULL, last INTEGER NOT NULL",
    "sinks": "name TEXT, origin TEXT NOT NULL, cursor INTEGER NOT NULL, planned INTEGER,"
    " rejected INTEGER NOT NULL",
}
_KEYS = {
    "spool": ("id",),
    "producers": ("number",),
    "lanes": ("producer", "lane"),
    "schemas": ("producer", "schema_id"),
    "arrived": ("origin", "first"),
    "sinks": ("name",),
}
_BATCHES = """
CREATE TABLE batches (
    number INTEGER PRIMARY KEY, producer INTEGER NOT NULL, lane INTEGER NOT NULL,
    first_offset INTEGER NOT NULL, size INTEGER NOT NULL, previous INTEGER NOT NULL, content INTEGER NOT NULL,
    ordinal INTEGER NOT NULL, total INTEGER NOT NULL, crc INTEGER NOT NULL, bytes BLOB NOT NULL
);
"""

# Of producers and of lanes each; then all are forgotten.
_REMEMBERED = 10_000

Value = int | float | str | bytes | None
_K = TypeVar("_K")
_V = TypeVar("_V")


class SpoolDamaged(sqlite3.DatabaseError):
    """What is read is not what was written."""


@dataclass(frozen=True, slots=True)
class SinkState:
    """A row of `sinks` without its name; rejected: how many ranges it has rejected."""

    origin: str
    cursor: int
    planned: int | None = None
    rejected: int = 0


def checksum(table: str, *fields: Value) -> int:
    """Of a row of `table` with these columns, text and its UTF-8 alike."""
    row: tuple[Value, ...] = (table, *fields)
    if str in map(type, fields):
        row = (table, *(field.encode() if isinstance(field, str) else field for field in fields))
    return crc32(repr(row).encode())


def schema() -> str:
    """The statements that make the tables, as one script without its transaction."""
    return "\n".join(
        [
            _BATCHES,
            *(_kept_twice(table) for table in COLUMNS),
            "CREATE UNIQUE INDEX producer_ids ON producers (producer_id);",
            f"PRAGMA user_version = {VERSION};",
        ]
    )


def upgrade() -> str:
    """The statements that make the tables of OLDER_VERSION current ones."""
    return f"{_kept_twice('arrived')}PRAGMA user_version = {VERSION};"


def _kept_twice(table: str) -> str:
    """A table, its copy, and what keeps the copy the same."""
    columns, keys, names = COLUMNS[table], _KEYS[table], [*names_of(table), "crc"]
    key = ""
    if "PRIMARY KEY" not in columns:
        key = f", PRIMARY KEY ({', '.join(keys)})"
    form = f"({columns}, crc INTEGER NOT NULL{key}){' WITHOUT ROWID' if key else ''}"
    fresh = ", ".join(f"NEW.{name}" for name in names)
    changed = ", ".join(f"{name} = NEW.{name}" for name in names)
    this = " AND ".join(f"{name} = OLD.{name}" for name in keys)
    return f"""
CREATE TABLE {table} {form};
CREATE TABLE {table}_copy {form};
CREATE TRIGGER {table}_insert AFTER INSERT ON {table} BEGIN
    INSERT INTO {table}_copy VALUES ({fresh});
END;
CREATE TRIGGER {table}_update AFTER UPDATE ON {table} BEGIN
    UPDATE {table}_copy SET {changed} WHERE {this};
END;
CREATE TRIGGER {table}_delete AFTER DELETE ON {table} BEGIN
    DELETE FROM {table}_copy WHERE {this};
END;
"""


def names_of(table: str) -> list[str]:
    """The columns of a table that is kept twice, without `crc`."""
    return [column.split()[0] for column in COLUMNS[table].split(", ")]


def check_batch(row: tuple[Any, ...]) -> None:
    """SpoolDamaged unless a row of `batches` is as it was written."""
    *fields, crc, data = row
    if (
        checksum("batches", *fields) != crc
        or not isinstance(data, bytes)
        or crc32(data) != fields[6]
    ):
        raise SpoolDamaged(f"batch {fields[0]} has another checksum")


@dataclass(slots=True)
class _Counts:
    """Batches and bytes up to the last one, and the bytes before the first one that is there."""

    ordinal: int
    total: int
    before: int


class Tables:
    """The tables in the database of `connection`, which nobody else writes. To be used by one thread, inside
    its transactions. What every batch needs to know of them is remembered; `forget` must be called after a
    rollback."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._execute = connection.execute
        connection.create_function("checksum", -1, checksum, deterministic=True)
        self._numbers: dict[bytes, int] = {}
        self._lanes: dict[tuple[int, int], tuple[int, int]] = {}
        self._next: int | None = None
        self._counts: _Counts | None = None

    def forget(self) -> None:
        """What is remembered may not be so any more."""
        self._numbers.clear()
        self._lanes.clear()
        self._next = self._counts = None

    # --- the spool itself

    def origin(self) -> str:
        return str(self._execute("SELECT origin FROM spool").fetchone()[0])

    def lost(self) -> int:
        return int(self._execute("SELECT lost FROM spool").fetchone()[0])

    def renamed(self) -> int:
        return int(self._execute("SELECT renamed FROM spool").fetchone()[0])

    def set_identity(self, origin: str, first_number: int, lost: int = 0, renamed: int = 0) -> None:
        row = (1, origin, first_number, lost, renamed)
        self._execute("DELETE FROM spool")
        self._execute(
            "INSERT INTO spool VALUES (?, ?, ?, ?, ?, ?)", (*row, checksum("spool", *row))
        )
        self._next = None

    # --- producers, lanes and schemas

    def number(self, producer_id: bytes) -> int | None:
        known = self._numbers.get(producer_id)
        if known is not None:
            return known
        row = self._execute(
            "SELECT number FROM producers WHERE producer_id = ?", (producer_id,)
        ).fetchone()
        if row is None:
            return None
        _remember(self._numbers, producer_id, int(row[0]))
        return int(row[0])

    def info(self, number: int) -> ProducerInfo:
        row = self._execute("SELECT info FROM producers WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise SpoolDamaged(f"producer {number} is not there")
        return from_fields(json.loads(row[0]))

    def add_producer(self, info: ProducerInfo) -> int:
        """The number that it gets. Batches of a producer that was lost with a damaged page may still be
        there: no other gets its number."""
        (last,) = self._execute(
            "SELECT MAX((SELECT COALESCE(MAX(number), 0) FROM producers),"
            " (SELECT COALESCE(MAX(producer), 0) FROM lanes))"
        ).fetchone()
        self.put_producer(int(last) + 1, info.producer_id, json.dumps(to_fields(info)), None)
        return int(last) + 1

    def put_producer(
        self, number: int, producer_id: bytes, info: str, ended_ns: int | None
    ) -> None:
        row = (number, producer_id, info, ended_ns)
        self._execute(
            "INSERT INTO producers VALUES (?, ?, ?, ?, ?)", (*row, checksum("producers", *row))
        )

    def end_producer(self, producer_id: bytes, time_ns: int) -> bool:
        """False when it has ended before."""
        ended = self._execute(
            "UPDATE producers SET ended_ns = ?1,"
            " crc = checksum('producers', number, producer_id, info, ?1)"
            " WHERE producer_id = ?2 AND ended_ns IS NULL",
            (time_ns, producer_id),
        )
        return ended.rowcount > 0

    def put_end_off(self, number: int, time_ns: int, *, before_ns: int) -> None:
        """A producer that had ended before that has ended now."""
        self._execute(
            "UPDATE producers SET ended_ns = ?1,"
            " crc = checksum('producers', number, producer_id, info, ?1)"
            " WHERE number = ?2 AND ended_ns < ?3",
            (time_ns, number, before_ns),
        )

    def has_ended(self, number: int) -> bool:
        found = self._execute(
            "SELECT 1 FROM producers WHERE number = ? AND ended_ns IS NOT NULL", (number,)
        )
        return found.fetchone() is not None

    def infos(self) -> list[ProducerInfo]:
        """Of all producers that are remembered, those that have ended too."""
        return [
            from_fields(json.loads(row[0])) for row in self._execute("SELECT info FROM producers")
        ]

    def not_ended(self) -> list[tuple[int, int]]:
        """(number, bytes committed of its own lanes) of each producer that has not ended."""
        return self._execute(
            "SELECT number, (SELECT COALESCE(SUM(committed), 0) FROM lanes WHERE producer = number"
            " AND lane <> ?) FROM producers WHERE ended_ns IS NULL ORDER BY number",
            (AGENT_LANE,),
        ).fetchall()

    def long_ended(self, before_ns: int) -> list[tuple[int, bytes]]:
        """(number, producer_id) of producers that ended before that, and have no batches any more."""
        return self._execute(
            "SELECT number, producer_id FROM producers"
            " WHERE ended_ns < ? AND number NOT IN"
            " (SELECT producer FROM lanes WHERE last >= (SELECT MIN(number) FROM batches))",
            (before_ns,),
        ).fetchall()

    def forget_producer(self, number: int) -> None:
        for table, column in (
            ("lanes", "producer"),
            ("schemas", "producer"),
            ("producers", "number"),
        ):
            self._execute(f"DELETE FROM {table} WHERE {column} = ?", (number,))
        self._numbers.clear()
        self._lanes.clear()

    def lanes(self, producer: int) -> dict[int, int]:
        """By lane, up to where it is committed."""
        rows = self._execute("SELECT lane, committed FROM lanes WHERE producer = ?", (producer,))
        return dict(rows.fetchall())

    def lane(self, producer: int, lane: int) -> tuple[int, int]:
        """Up to where it is committed, and its last batch."""
        state = self._lanes.get((producer, lane))
        if state is None:
            row = self._execute(
                "SELECT committed, last FROM lanes WHERE producer = ? AND lane = ?",
                (producer, lane),
            ).fetchone()
            state = row or (0, 0)
            _remember(self._lanes, (producer, lane), state)
        return state

    def set_lane(self, producer: int, lane: int, committed: int, last: int) -> None:
        row = (producer, lane, committed, last)
        self._execute(
            "INSERT INTO lanes VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET committed = excluded.committed, last = excluded.last, crc = excluded.crc",
            (*row, checksum("lanes", *row)),
        )
        _remember(self._lanes, (producer, lane), (committed, last))

    def last_delivered(self, after: int, cursor: int) -> list[tuple[int, int]]:
        """Producer and last batch up to the cursor of each lane, where that one comes after a number."""
        return self._execute(
            "SELECT producer, delivered FROM (SELECT producer, CASE WHEN last <= ?2 THEN last ELSE"
            " (SELECT previous FROM batches AS b WHERE b.producer = l.producer AND b.lane = l.lane"
            " AND b.number > ?2 ORDER BY b.number LIMIT 1) END AS delivered FROM lanes AS l"
            " WHERE last > ?1) WHERE delivered > ?1 ORDER BY producer",
            (after, cursor),
        ).fetchall()

    def logged_after(self, number: int) -> list[int]:
        """The producers of batches after a number."""
        rows = self._execute(
            "SELECT DISTINCT producer FROM lanes WHERE last > ? ORDER BY producer", (number,)
        )
        return [row[0] for row in rows]

    def keys(self, producer: int, schema_id: int) -> str | None:
        row = self._execute(
            "SELECT keys FROM schemas WHERE producer = ? AND schema_id = ?", (producer, schema_id)
        ).fetchone()
        return str(row[0]) if row else None

    def schemas(self, producer: int) -> dict[int, str]:
        """By schema id, its keys."""
        rows = self._execute("SELECT schema_id, keys FROM schemas WHERE producer = ?", (producer,))
        return dict(rows.fetchall())

    def add_schema(self, producer: int, schema_id: int, keys: str) -> None:
        """The first keys of a schema id stay."""
        row = (producer, schema_id, keys)
        self._execute(
            "INSERT OR IGNORE INTO schemas VALUES (?, ?, ?, ?)", (*row, checksum("schemas", *row))
        )

    # --- batches

    def append(self, producer: int, lane: int, data: bytes) -> None:
        """A batch with what comes next in a lane."""
        committed, previous = self.lane(producer, lane)
        number = self.next_number()
        self.put_batch((number, producer, lane, committed, len(data), previous), data)
        self.set_lane(producer, lane, committed + len(data), number)

    def put_batch(self, head: tuple[int, int, int, int, int, int], data: bytes) -> None:
        """A batch behind all others. head: number, producer, lane, first_offset, size, previous."""
        counts = self._counted()
        row = (*head, crc32(data), counts.ordinal + 1, counts.total + len(data))
        self._execute(
            "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, checksum("batches", *row), data),
        )
        counts.ordinal += 1
        counts.total += len(data)
        if self._next is not None:
            self._next = max(self._next, head[0] + 1)

    def batches(self, after: int) -> Iterator[tuple[int, int, int, int, bytes]]:
        """(number, producer, lane, first_offset, bytes) of each batch after `after`, in order. SpoolDamaged
        at the first that is not as it was written."""
        seen: set[int] = set()
        start = after
        for row in self._execute(
            "SELECT * FROM batches WHERE number > ? ORDER BY number", (after,)
        ):
            check_batch(row)
            number, previous = row[0], row[5]
            if number <= after or (previous > start and previous not in seen):
                raise SpoolDamaged(f"batches before {number} are not there")
            seen.add(number)
            after = number
            yield (*row[:4], row[-1])

    def delete_delivered(self) -> None:
        """What all sinks are done with."""
        self._execute("DELETE FROM batches WHERE number <= (SELECT MIN(cursor) FROM sinks)")
        self._counts = None

    def next_number(self) -> int:
        """Of the next batch: greater than any there was."""
        if self._next is None:
            (self._next,) = self._execute(
                "SELECT MAX((SELECT first_number FROM spool),"
                " (SELECT COALESCE(MAX(number), 0) + 1 FROM batches),"
                " (SELECT COALESCE(MAX(MAX(cursor, COALESCE(planned, 0))), 0) + 1 FROM sinks))"
            ).fetchone()
        assert self._next is not None
        return self._next

    def ends(self) -> tuple[int, int]:
        """The numbers of the oldest and the newest batch; where there is none, of the next one twice."""
        first, last = self._execute("SELECT MIN(number), MAX(number) FROM batches").fetchone()
        return (first, last) if first is not None else (self.next_number(),) * 2

    def lacks_last_batches(self) -> bool:
        """Whether a batch that some sink has yet to get, and that is the last one of a lane, is gone."""
        found = self._execute(
            "SELECT 1 FROM lanes WHERE last > (SELECT MIN(cursor) FROM sinks)"
            " AND last NOT IN (SELECT number FROM batches)"
        )
        return found.fetchone() is not None

    def waiting(self, after: int) -> tuple[int, int]:
        """Batches after `after`, and their bytes."""
        row = self._execute(
            "SELECT ordinal, total, size FROM batches WHERE number > ? ORDER BY number LIMIT 1",
            (after,),
        ).fetchone()
        if row is None:
            return 0, 0
        counts = self._counted()
        return counts.ordinal - row[0] + 1, counts.total - row[1] + row[2]

    def held(self) -> int:
        """The bytes of all batches."""
        counts = self._counted()
        return counts.total - counts.before

    def _counted(self) -> _Counts:
        if self._counts is None:
            last = self._execute(
                "SELECT ordinal, total FROM batches ORDER BY number DESC LIMIT 1"
            ).fetchone()
            first = self._execute(
                "SELECT total - size FROM batches ORDER BY number LIMIT 1"
            ).fetchone()
            self._counts = _Counts(*last, *first) if last else _Counts(0, 0, 0)
        return self._counts

    # --- what other agents forward

    def arrived(self, origin: str) -> list[tuple[int, int]]:
        """The ranges of an origin that came, ascending."""
        return self._execute(
            "SELECT first, last FROM arrived WHERE origin = ? ORDER BY first", (origin,)
        ).fetchall()

    def arrived_before(self, origin: str, number: int) -> tuple[int, int] | None:
        """Of the ranges that came, the last one that begins before a number."""
        found: tuple[int, int] | None = self._execute(
            "SELECT first, last FROM arrived WHERE origin = ? AND first < ?"
            " ORDER BY first DESC LIMIT 1",
            (origin, number),
        ).fetchone()
        return found

    def is_crowded(self, origin: str) -> bool:
        """Whether MAX_RANGES of an origin lie apart."""
        (count,) = self._execute(
            "SELECT COUNT(*) FROM arrived WHERE origin = ?", (origin,)
        ).fetchone()
        return int(count) >= MAX_RANGES

    def add_arrived(self, origin: str, first: int, last: int) -> None:
        """What it touches becomes one with it; nothing else counts as having come."""
        while (near := self.arrived_before(origin, last + 2)) is not None and near[1] >= first - 1:
            self._execute("DELETE FROM arrived WHERE origin = ? AND first = ?", (origin, near[0]))
            first, last = min(first, near[0]), max(last, near[1])
        row = (origin, first, last)
        self._execute("INSERT INTO arrived VALUES (?, ?, ?, ?)", (*row, checksum("arrived", *row)))

    def forget_arrived(self, origin: str) -> bool:
        """Whether anything was known."""
        return self._execute("DELETE FROM arrived WHERE origin = ?", (origin,)).rowcount > 0

    # --- sinks

    def sinks(self) -> dict[str, SinkState]:
        rows = self._execute(
            "SELECT name, origin, cursor, planned, rejected FROM sinks ORDER BY name"
        )
        return {name: SinkState(*state) for name, *state in rows.fetchall()}

    def sink(self, name: str) -> SinkState | None:
        row = self._execute(
            "SELECT origin, cursor, planned, rejected FROM sinks WHERE name = ?", (name,)
        ).fetchone()
        return SinkState(*row) if row else None

    def put_sink(self, name: str, state: SinkState) -> None:
        row = (name, state.origin, state.cursor, state.planned, state.rejected)
        self._execute(
            "INSERT OR REPLACE INTO sinks VALUES (?, ?, ?, ?, ?, ?)",
            (*row, checksum("sinks", *row)),
        )
        self._next = None

    def remove_sink(self, name: str) -> None:
        self._execute("DELETE FROM sinks WHERE name = ?", (name,))
        self._next = None

    def plan(self, name: str, last: int) -> None:
        """The sink's range ends at batch `last`."""
        self._execute(
            "UPDATE sinks SET planned = ?1,"
            " crc = checksum('sinks', name, origin, cursor, ?1, rejected) WHERE name = ?2",
            (last, name),
        )
        self._next = None

    def move_cursor(self, name: str, last: int, *, rejected: bool) -> bool:
        """False when it is there, or has been."""
        moved = self._execute(
            "UPDATE sinks SET cursor = ?1, planned = NULL, rejected = rejected + ?2,"
            " crc = checksum('sinks', name, origin, ?1, NULL, rejected + ?2)"
            " WHERE name = ?3 AND cursor < ?1",
            (last, rejected, name),
        )
        self._next = None
        return moved.rowcount > 0


def _remember(known: dict[_K, _V], key: _K, value: _V) -> None:
    if len(known) >= _REMEMBERED:
        known.clear()
    known[key] = value
