"""What batches say about runs, row by row: producers and how they end, params, tags, events, losses.

Everything here runs inside the writer's transaction and does not depend on the order in which batches arrive,
except where the contract says so.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable

from trackagent.agent.store.contract import (
    BatchId,
    EventData,
    Gap,
    Loss,
    ProducerEnd,
    ProducerInfo,
    Rejected,
    Setting,
)
from trackagent.agent.store.streams import Producer

_END_STATUSES = ("finished", "failed", "killed")
_SHOWN_CHARACTERS = 200
_MAX_GAPS = 1_000  # of one producer


def mark_applied(connection: sqlite3.Connection, id_: BatchId) -> bool:
    """Notes the batch as written; False when it was before. Neighbouring ranges become one row."""
    origin, first, last = id_.origin, id_.first, id_.last
    if first > last:
        raise Rejected(f"batch {id_} ends before it begins")
    before = connection.execute(
        "SELECT first, last FROM applied WHERE origin = ? AND first <= ? ORDER BY first DESC LIMIT 1",
        (origin, last),
    ).fetchone()
    if before is not None and before[1] >= first:
        if before[0] <= first and before[1] >= last:
            return False
        raise Rejected(f"batch {id_} overlaps {before[0]} to {before[1]}, which was written before")
    if before is not None and before[1] == first - 1:
        connection.execute(
            "DELETE FROM applied WHERE origin = ? AND first = ?", (origin, before[0])
        )
        first = before[0]
    after = connection.execute(
        "SELECT last FROM applied WHERE origin = ? AND first = ?", (origin, last + 1)
    ).fetchone()
    if after is not None:
        connection.execute("DELETE FROM applied WHERE origin = ? AND first = ?", (origin, last + 1))
        last = after[0]
    connection.execute(
        "INSERT INTO applied (origin, first, last) VALUES (?, ?, ?)", (origin, first, last)
    )
    return True


def note_included(connection: sqlite3.Connection, id_: BatchId) -> None:
    """Notes the range of another agent's spool as written, whatever was noted of it before. What touches it
    becomes one row with it; what is missing between ranges may come yet, however far back."""
    origin, first, last = id_.origin, id_.first, id_.last
    touching = " FROM applied WHERE origin = ? AND first <= ? AND last >= ?"
    place = (origin, last + 1, first - 1)
    low, high = connection.execute(f"SELECT min(first), max(last){touching}", place).fetchone()
    connection.execute(f"DELETE{touching}", place)
    if low is not None:
        first, last = min(first, low), max(last, high)
    connection.execute(
        "INSERT INTO applied (origin, first, last) VALUES (?, ?, ?)", (origin, first, last)
    )


def forget_applied(connection: sqlite3.Connection) -> None:
    """Notes that batches may have been written of which `applied` does not know any more."""
    connection.execute("INSERT OR IGNORE INTO applied (origin, first, last) VALUES ('', 0, 0)")


def forgot_applied(connection: sqlite3.Connection) -> bool:
    """Whether a batch that is not known may have been written all the same."""
    return bool(connection.execute("SELECT 1 FROM applied WHERE origin = ''").fetchone())


def applied_is_known(connection: sqlite3.Connection) -> None:
    """What comes from now on was not written before."""
    connection.execute("DELETE FROM applied WHERE origin = ''")


def add_producer(connection: sqlite3.Connection, info: ProducerInfo) -> int | None:
    """Adds a producer with its run and source; returns the run, None when it was there before.

    A run in which nobody logs is not listed; the first who does makes it what it is (`settle`). When all of
    a batch are there, the attempts of their runs are to be numbered.
    """
    known = connection.execute("SELECT 1 FROM producers WHERE producer_id = ?", (info.producer_id,))
    if known.fetchone():
        return None
    logs = not info.sampled and not info.reduced
    experiment = _id_of(connection, "experiments", name=info.experiment)
    run = _id_of(
        connection,
        "runs",
        also={
            "name": info.run_name if logs else "",
            "experiment": experiment,
            "start_time_ns": info.start_time_ns if logs else 0,
            "listed": logs,
        },
        run_id=info.run_id,
    )
    source = _id_of(connection, "sources", also={"keys": ""}, run=run, source=info.source)
    connection.execute(
        "INSERT INTO producers (producer_id, run, source, attempt, rank, local_rank, world_size,"
        " node, pid, start_time_ns, experiment, run_name, forked, job_time_ns, said_attempt, sampled,"
        " reduced, in_groups) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            info.producer_id,
            run,
            source,
            info.attempt,
            info.rank,
            info.local_rank,
            info.world_size,
            info.node,
            info.pid,
            info.start_time_ns,
            experiment,
            info.run_name,
            info.forked,
            info.job_time_ns,
            info.attempt,
            "" if logs else info.source,
            info.reduced,
            json.dumps(dict(info.groups), ensure_ascii=False) if info.groups else "",
        ),
    )
    return run


def number_attempts(connection: sqlite3.Connection, run: int) -> None:
    """Counts the run's attempts over the jobs that continued it, in order of when each job first began it;
    a job's own number stays where it can. Producers may come in any order. Samples of an attempt get its
    number, and have no say in it."""
    said = connection.execute(
        "SELECT job_time_ns, said_attempt, min(start_time_ns), attempt, sampled <> '' FROM producers"
        " WHERE run = ? GROUP BY job_time_ns, said_attempt, attempt, sampled <> ''",
        (run,),
    ).fetchall()
    numbers = attempt_numbers(
        (job, attempt, start_ns) for job, attempt, start_ns, _, sampled in said if not sampled
    )
    connection.executemany(
        "UPDATE producers SET attempt = ? WHERE run = ? AND job_time_ns = ? AND said_attempt = ?",
        [
            (numbers[job, attempt], run, job, attempt)
            for job, attempt, _, number, _ in said
            if numbers.get((job, attempt), number) != number
        ],
    )


def attempt_numbers(said: Iterable[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    """The run's number of each attempt that a job (by when it began) has counted. `said`: job, attempt, and
    when a process of it started. Who does not know its job (0) is of the last one that has counted as far;
    where none has, of one that began when the first such process did. Pure."""
    began: dict[tuple[int, int], int] = {}
    for job, attempt, start_ns in said:
        pair = job, attempt
        began[pair] = job or min(start_ns, began.get(pair, start_ns))
    counted = {attempt for job, attempt in began if job}
    numbers: dict[tuple[int, int], int] = {}
    last = 0
    for job, attempt in sorted(began, key=lambda pair: (began[pair], pair[1])):
        if job or attempt not in counted:
            last = numbers[job, attempt] = max(last + 1, attempt)
    for job, attempt in began.keys() - numbers.keys():
        numbers[job, attempt] = max(n for (_, one), n in numbers.items() if one == attempt)
    return numbers


def set_param(connection: sqlite3.Connection, producer: Producer, param: Setting) -> None:
    """Keeps the first value; a different one becomes a warning in the run."""
    done = connection.execute(
        "INSERT INTO params (run, key, value, time_ns) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (producer.run, param.key, param.value, param.time_ns),
    )
    if done.rowcount:
        return
    (stored,) = connection.execute(
        "SELECT value FROM params WHERE run = ? AND key = ?", (producer.run, param.key)
    ).fetchone()
    if stored == param.value:
        return
    kept, refused = _shown(stored), _shown(param.value)
    message = f"param {param.key!r} stays {kept!r}: {refused!r} from {producer.name} was not stored"
    data = {"key": param.key, "kept": kept, "refused": refused}
    event = EventData(param.producer_id, param.time_ns, "warning", message, data=data)
    add_event(connection, producer.run, producer.id, event)


def set_tag(connection: sqlite3.Connection, run: int, tag: Setting) -> None:
    """Keeps the later value."""
    # Of two with the same time the greater value stays, so that order of arrival does not matter.
    connection.execute(
        "INSERT INTO tags (run, key, value, time_ns) VALUES (?, ?, ?, ?) ON CONFLICT (run, key) DO UPDATE"
        " SET value = excluded.value, time_ns = excluded.time_ns"
        " WHERE (excluded.time_ns, excluded.value) > (time_ns, value)",
        (run, tag.key, tag.value, tag.time_ns),
    )


def end_producer(connection: sqlite3.Connection, producer: int, end: ProducerEnd) -> None:
    """Keeps the first end, except that "killed" gives way to what the producer itself says."""
    if end.status not in _END_STATUSES:
        raise Rejected(f"a producer cannot end as {end.status!r}")
    connection.execute(
        "UPDATE producers SET end_status = ?, end_time_ns = ?, end_error = ?, logged = ?"
        " WHERE id = ? AND (end_status IS NULL OR end_status = 'killed' AND ? <> 'killed')",
        (end.status, end.time_ns, end.error, end.logged, producer, end.status),
    )


def add_event(connection: sqlite3.Connection, run: int, producer: int, event: EventData) -> None:
    """Adds an event; Rejected when its data is not JSON."""
    try:
        data = json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise Rejected(f"the data of an event is not JSON: {error}") from error
    connection.execute(
        "INSERT INTO events (run, producer, time_ns, level, step, message, data)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (run, producer, event.time_ns, event.level, event.step, event.message, data),
    )


def add_loss(connection: sqlite3.Connection, producer: int, loss: Loss) -> int:
    """Counts a loss; returns by how many records it has grown.

    What the producer counted and what came in addition are kept apart, so that order does not matter.
    """
    row = connection.execute(
        "SELECT counted, more FROM losses WHERE producer = ? AND reason = ?",
        (producer, loss.reason),
    ).fetchone()
    counted, more = row or (0, 0)
    grown = loss.records if loss.more else max(0, loss.records - counted)
    if grown:
        connection.execute(
            "INSERT OR REPLACE INTO losses (producer, reason, counted, more) VALUES (?, ?, ?, ?)",
            (
                producer,
                loss.reason,
                counted if loss.more else counted + grown,
                more + grown if loss.more else more,
            ),
        )
    return grown


def add_gap(connection: sqlite3.Connection, producer: int, gap: Gap) -> None:
    """Adds a gap or lets it grow; of too many, the oldest two become one."""
    connection.execute(
        "INSERT INTO gaps (producer, reason, first_time_ns, last_time_ns, first_step, last_step, records)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (producer, reason, first_time_ns) DO UPDATE SET"
        " last_time_ns = max(last_time_ns, excluded.last_time_ns),"
        " first_step = min(first_step, excluded.first_step),"
        " last_step = max(last_step, excluded.last_step), records = max(records, excluded.records)",
        (
            producer,
            gap.reason,
            gap.first_time_ns,
            gap.last_time_ns,
            gap.first_step,
            gap.last_step,
            gap.records,
        ),
    )
    (count,) = connection.execute(
        "SELECT count(*) FROM gaps WHERE producer = ?", (producer,)
    ).fetchone()
    if count <= _MAX_GAPS:
        return
    oldest = connection.execute(
        "SELECT rowid, last_time_ns, first_step, last_step, records FROM gaps WHERE producer = ?"
        " ORDER BY first_time_ns, reason LIMIT 2",
        (producer,),
    ).fetchall()
    (first, *_), (second, *_) = oldest
    _, last_times, first_steps, last_steps, records = zip(*oldest, strict=True)
    connection.execute("DELETE FROM gaps WHERE rowid = ?", (second,))
    connection.execute(
        "UPDATE gaps SET last_time_ns = ?, first_step = ?, last_step = ?, records = ? WHERE rowid = ?",
        (max(last_times), min(first_steps), max(last_steps), sum(records), first),
    )


def settle(connection: sqlite3.Connection, run: int) -> None:
    """Derives what RunSummary says about attempts, ranks and how they ended from the run's producers, those
    that sample left out, and whether it is listed.

    Name and experiment are those that the lowest rank of the last attempt gave.
    """
    connection.execute(
        "UPDATE runs SET listed = EXISTS (SELECT 1 FROM producers WHERE run = :run AND sampled = '')"
        " WHERE id = :run AND EXISTS (SELECT 1 FROM producers WHERE run = :run)",
        {"run": run},
    )
    connection.execute(
        """
        WITH every AS (SELECT * FROM producers WHERE run = :run AND sampled = ''),
          latest AS (SELECT * FROM every WHERE attempt = (SELECT max(attempt) FROM every)),
          leading AS (SELECT * FROM latest ORDER BY forked, rank, start_time_ns, producer_id LIMIT 1),
          ranks AS (SELECT * FROM latest WHERE NOT forked),
          outcome AS (SELECT CASE
            WHEN count(*) = 0 OR count(*) > count(end_status) THEN 'running'
            WHEN sum(end_status = 'failed') > 0 THEN 'failed'
            WHEN sum(end_status = 'killed') > 0 THEN 'killed'
            ELSE 'finished' END AS status FROM ranks)
        UPDATE runs SET
          status = (SELECT status FROM outcome),
          attempt = (SELECT attempt FROM leading),
          name = (SELECT CASE run_name WHEN '' THEN substr(runs.run_id, 1, 8) ELSE run_name END FROM leading),
          experiment = (SELECT experiment FROM leading),
          world_size = (SELECT max(world_size) FROM latest),
          ranks = (SELECT count(DISTINCT rank) FROM ranks),
          start_time_ns = (SELECT min(start_time_ns) FROM every),
          end_time_ns = (SELECT CASE status WHEN 'running' THEN NULL
            ELSE (SELECT max(end_time_ns) FROM ranks) END FROM outcome),
          error = coalesce((SELECT end_error FROM ranks
            WHERE end_status = (SELECT status FROM outcome) AND end_error <> ''
            ORDER BY end_time_ns, rank, producer_id LIMIT 1), ''),
          records_logged = (SELECT CASE WHEN sum(NOT forked) > 0 AND sum(NOT forked AND NOT said) = 0
            THEN sum(CASE WHEN said THEN logged ELSE records END) END
            FROM (SELECT *, coalesce(logged, -1) >= 0 AS said FROM every))
        WHERE id = :run AND EXISTS (SELECT 1 FROM every)
        """,
        {"run": run},
    )


def _id_of(
    connection: sqlite3.Connection,
    table: str,
    *,
    also: dict[str, str | int] | None = None,
    **unique: str | int,
) -> int:
    """The id of the row with these unique columns, inserted (with `also`) where there is none."""
    where = " AND ".join(f"{column} = ?" for column in unique)
    row = connection.execute(
        f"SELECT id FROM {table} WHERE {where}", (*unique.values(),)
    ).fetchone()
    if row:
        return int(row[0])
    values = {**unique, **(also or {})}
    marks = ", ".join("?" * len(values))
    cursor = connection.execute(
        f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", (*values.values(),)
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
