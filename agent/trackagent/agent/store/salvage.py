"""What can be read of a damaged store: its rows as they lie on the pages of the file, brought into a new one.

A row is found on its page, whatever became of the pages that lead there: the pointer map says whose page it
is. What gives points their meaning stands in the file twice, in a table and in an index with the same columns
(schema.py), so that one bad page seldom costs any of it; figures that follow from others are computed anew.
Points have checksums (chunks.py): they are right or missing. Other rows have none: where table and index say
different things, the table's word is taken and the run told.

Nothing becomes double: places in a stream are taken once, and the batches known as written are brought along.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from trackagent.agent.pages import Cell
from trackagent.agent.store import chunks, runs, schema, views
from trackagent.agent.store.columns import HEAD
from trackagent.agent.store.contract import EventData, scope_of
from trackagent.agent.store.recount import recount
from trackagent.agent.store.remains import Remains, Row
from trackagent.agent.store.schema import COLUMNS_PER_CHUNK

_SHOWN = 10
_MANY_RUNS = 1000

_Rows = dict[str, dict[int, Row]]


@dataclass(slots=True)
class Report:
    """What is missing: by run (its row), and what cannot be said to be of any."""

    runs: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    others: list[str] = field(default_factory=list)


def salvage(path: Path, connection: sqlite3.Connection, reason: str) -> Report:
    """Fills the empty current store behind `connection`, in a transaction of the caller's, with what can be
    read in the damaged file `path` and its log. Events in the runs say what is missing."""
    report = Report()
    with contextlib.closing(Remains(path)) as store:
        found, rebuilt = _small_rows(store, report)
        _complete(found, rebuilt, report)
        _insert_small(connection, found)
        _insert_chunks(connection, store)
        # Of a damaged log, points of a batch may be here whose number is not.
        if store.log_problem or (store.lost("applied") and store.lost("copy_of_applied")):
            runs.forget_applied(connection)
        if store.log_problem is not None:
            report.others.append(
                f"what was written last may be missing in part: {store.log_problem}"
            )
    recount(connection, rebuilt, report.runs, report.others)
    _tell(connection, report, reason)
    return report


# --- what is small


def _small_rows(store: Remains, report: Report) -> tuple[_Rows, set[tuple[str, int]]]:
    """The rows of all tables but the large ones, by table and number, and which of them their tables do not
    have any more: these have what the indexes say."""
    found: _Rows = {table: {} for table in schema.TABLES if table not in schema.LARGE}
    rebuilt: set[tuple[str, int]] = set()
    for table, rows in found.items():
        for number, cell in store.rows(table):
            row = store.row(table, number, cell)
            if row is not None and _is_sound(table, row) and not store.is_short(table, row):
                rows[number] = row
        entries: dict[int, list[Row]] = defaultdict(list)  # the copy's first
        indexes = schema.indexes_of(store.names, table)
        for index, _ in sorted(indexes, key=lambda one: not one[1]):
            for entry in store.entries(index):
                number = entry.pop("id")
                if isinstance(number, int):
                    entries[number].append(entry)
        for number, said in entries.items():
            if number in rows and _votes(report, table, number, rows[number], said):
                continue
            rebuilt.add((table, number))
            rows[number] = {name: value for entry in said[::-1] for name, value in entry.items()}
        whole = [index for index, _ in indexes if index != schema.PARTIAL_INDEX]
        if len(whole) > 1 and not any(store.bad_pages[index] for index in whole):
            for number in rows.keys() - entries.keys():
                del rows[number]  # every row has its entries: this one is of another table
        if store.lost(table) and store.lost(f"copy_of_{table}"):
            report.others.append(f"{table} that stood on bad pages may be missing")
    return found, rebuilt


def _votes(report: Report, table: str, number: int, row: Row, said: list[Row]) -> bool:
    """Whether a row is believed where indexes say something else: not against two of them. Where one stands
    against one, the run is told."""
    against = [
        entry
        for entry in said
        if any(row.get(name, value) != value for name, value in entry.items())
    ]
    if not against:
        return True
    if table == "keysets":  # the digest tells
        return bool(_digest(row["keys"]) == row["digest"])
    if len(against) > 1:
        return False
    (entry,) = against
    differing = [name for name, value in entry.items() if row.get(name, value) != value]
    if table == "applied":
        # Rather too much than too little: what is missing can be told of, what is there twice cannot.
        row["first"], row["last"] = (
            min(row["first"], entry["first"]),
            max(row["last"], entry["last"]),
        )
        return True
    if any(name in other for other in said if other is not entry for name in differing):
        return True  # another index agrees with the row
    what = ", ".join(f"{name} {row[name]!r:.80} or {entry[name]!r:.80}" for name in differing)
    key = f" {row['key']!r:.80}" if "key" in row else ""
    line = f"of {table}{key} it cannot be told which is right: {what}"
    run = number if table == "runs" else row.get("run")
    (report.runs[run] if isinstance(run, int) else report.others).append(line)
    return True


def _digest(keys: str) -> bytes:
    return hashlib.blake2b(keys.encode(), digest_size=16).digest()


# What a row must have to be one.
_TYPES: dict[str, dict[str, type]] = {
    "experiments": {"name": str},
    "runs": {"run_id": str},
    "sources": {"run": int, "source": str},
    "producers": {"producer_id": bytes, "run": int, "source": int, "attempt": int, "rank": int},
    "keysets": {"digest": bytes, "keys": str},
    "streams": {
        **dict.fromkeys(("producer", "keyset", "points", "first_step", "last_step"), int),
        "last_time_ns": int,
        "last_values": bytes,
    },
    "params": {"run": int, "key": str, "value": str, "time_ns": int},
    "tags": {"run": int, "key": str, "value": str, "time_ns": int},
    "events": {"run": int, "producer": int, "time_ns": int, "message": str, "data": str},
    "losses": {"producer": int, "reason": str},
    "gaps": {"producer": int, "reason": str, "first_time_ns": int, "records": int},
    "applied": {"origin": str, "first": int, "last": int},
}


def _is_sound(table: str, row: Row) -> bool:
    if not all(isinstance(row.get(name), kind) for name, kind in _TYPES[table].items()):
        return False
    return table != "keysets" or bool(_digest(row["keys"]) == row["digest"])


def _complete(found: _Rows, rebuilt: set[tuple[str, int]], report: Report) -> None:
    """Gives rows whose tables have lost them the rest of what they need, and those that others name."""
    for table, number in sorted(rebuilt):
        row = found[table][number]
        if table == "producers":
            source = found["sources"].get(row.get("source", 0), {}).get("source", "rank 0")
            rank = [int(part) for part in str(source).split() if part.isdecimal()][:1] or [0]
            known = {
                "rank": rank[0],
                "world_size": rank[0] + 1,
                "said_attempt": row.get("attempt", 1),
            }
            if not str(source).startswith("rank "):  # of a node, or over ranks: nobody logs there
                known["sampled"] = source
                known["reduced"] = scope_of(str(source))
            found[table][number] = {**_UNKNOWN_PRODUCER, **known, **row}
        elif table == "sources":
            row.setdefault("keys", "")
    for number, producer in found["producers"].items():
        run = found["runs"].setdefault(producer["run"], {})
        if "run_id" not in run:
            run["run_id"] = f"{producer['run']:032x}"
            report.runs[producer["run"]].append("the run's own id")
        if not all(name in run for name in ("name", "experiment")):
            run.update({"name": "", "experiment": producer["experiment"], **run})
            rebuilt.add(("runs", producer["run"]))
        named = {"run": producer["run"], "source": f"rank {producer['rank']}", "keys": ""}
        if producer["source"] not in found["sources"]:
            found["sources"][producer["source"]] = named
            rebuilt.add(("sources", producer["source"]))
        experiments = found["experiments"]
        experiments.setdefault(producer["experiment"], {"name": f"lost {producer['experiment']}"})
        if ("producers", number) in rebuilt:
            rebuilt.add(("runs", producer["run"]))
    for table in ("keysets", "params", "tags", "events", "losses", "gaps", "applied"):
        for number in [number for number, row in found[table].items() if not _is_sound(table, row)]:
            gone = found[table].pop(number)
            what = f"{table[:-1]} {gone['key']!r:.80}" if "key" in gone else f"a row of {table}"
            of = gone.get("run")
            (report.runs[of] if isinstance(of, int) else report.others).append(what)


_UNKNOWN_PRODUCER: Row = {
    "attempt": 1,
    "experiment": 1,
    "local_rank": 0,
    "pid": 0,
    "start_time_ns": 0,
    "forked": 0,
    "job_time_ns": 0,
    "node": "",
    "run_name": "",
    "records": 0,
    "sampled": "",
    "reduced": "",
    "in_groups": "",
}


def _insert_small(connection: sqlite3.Connection, found: _Rows) -> None:
    for table, rows in found.items():
        names = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
        for number, row in rows.items():
            if table == "losses" and "records" in row:  # as version 1 called it
                row.setdefault("counted", row["records"])
            values = {"rowid": number} | {name: row[name] for name in names if name in row}
            values.pop("id", None)
            # What a file has twice or in part against all rules is left out.
            connection.execute(
                f"INSERT OR IGNORE INTO {table} ({', '.join(values)})"
                f" VALUES ({', '.join('?' * len(values))})",
                (*values.values(),),
            )


# --- points


def _insert_chunks(connection: sqlite3.Connection, store: Remains) -> None:
    """The chunks of streams that are known. Where two have the same points (one is an older state), the
    larger is taken."""
    streams = {id_ for (id_,) in connection.execute("SELECT id FROM streams")}
    found: dict[int, tuple[int, int, int, int, int, Cell | None]] = {}
    for entry in store.entries(schema.CHUNKS_INDEX):
        id_, stream, start = entry["id"], entry["stream"], entry["start"]
        if isinstance(id_, int) and stream in streams and isinstance(start, int):
            found[id_] = (stream, start, 0, 0, 0, None)
    for number, cell in store.rows("chunks"):
        row = store.row("chunks", number, cell, head=True)
        fields = [row.get(name) for name in _PLACE] if row else [None]
        if all(isinstance(one, int) for one in fields) and fields[0] in streams:
            stream, start, n, level, increasing = fields
            if start >= 0 and n > 0:  # type: ignore[operator]
                found[number] = (stream, start, n, level, increasing, cell)  # type: ignore[assignment]
    ends: dict[int, int] = defaultdict(int)
    chosen: dict[int, tuple[int, int, int, int, int, Cell | None]] = {}
    for id_, chunk in sorted(found.items(), key=lambda item: (*item[1][:2], -item[1][2])):
        stream, start, n, level, increasing, place = chunk
        if start < ends[stream]:
            continue
        ends[stream] = start + n
        chosen[id_] = chunk
        if place is not None:
            whole = store.row("chunks", id_, place) or {}
            data = whole.get("data")
            connection.execute(
                "INSERT INTO chunks (id, stream, start, n, level, increasing, data)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (id_, stream, start, n, level, increasing, data),
            )
    for number, cell in store.rows("columns"):
        if number // COLUMNS_PER_CHUNK in chosen:
            row = store.row("columns", number, cell)
            if row is not None:
                connection.execute(
                    "INSERT OR IGNORE INTO columns (id, data) VALUES (?, ?)", (number, row["data"])
                )
    for id_, (stream, start, _, _, _, place) in chosen.items():
        if place is None:
            _insert_of_columns(connection, id_, stream, start)


_PLACE = ("stream", "start", "n", "level", "increasing")


def _insert_of_columns(connection: sqlite3.Connection, id_: int, stream: int, start: int) -> None:
    """A chunk of which the columns are left."""
    first = id_ * COLUMNS_PER_CHUNK
    row = connection.execute("SELECT data FROM columns WHERE id = ?", (first,)).fetchone()
    if row is None or not isinstance(row[0], bytes) or len(row[0]) < HEAD.size:
        return
    n = HEAD.unpack_from(row[0])[3]
    (keys,) = connection.execute(
        "SELECT k.keys FROM streams s JOIN keysets k ON k.id = s.keyset WHERE s.id = ?", (stream,)
    ).fetchone() or ("",)
    count = keys.count("\n") + 1
    level = chunks.FULL if n >= chunks.capacity(count) else 0
    chunk = chunks.Chunk(id_, start, n, level, False, count, None)
    with contextlib.suppress(chunks.ChunkDamaged):
        increasing = chunks.rises(chunks.read_ints(connection, chunk, chunks.STEPS))
        connection.execute(
            "INSERT INTO chunks (id, stream, start, n, level, increasing) VALUES (?, ?, ?, ?, ?, ?)",
            (id_, stream, start, n, level, increasing),
        )


def _tell(connection: sqlite3.Connection, report: Report, reason: str) -> None:
    """An event in each run that has lost something; what may be of any is told in all, or, where they are
    many, in those that go on."""
    if report.others:
        rows = connection.execute("SELECT id, status FROM runs WHERE listed").fetchall()
        for run, status in rows:
            if len(rows) <= _MANY_RUNS or status == "running":
                report.runs[run] += report.others
    for run, lines in report.runs.items():
        found = connection.execute("SELECT min(id) FROM producers WHERE run = ?", (run,)).fetchone()
        if found[0] is None:
            continue
        more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        message = f"the store was damaged ({reason}), and this is missing: {'; '.join(lines[:_SHOWN])}{more}"
        event = EventData(b"", time.time_ns(), "error", message)
        # What was sampled on a node is missing in the runs that were there.
        seen_by = views.seen_by(connection, run)
        for one in seen_by if len(seen_by) <= _MANY_RUNS else [run]:
            runs.add_event(connection, one, found[0], event)
