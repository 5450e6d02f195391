"""Short ways to say what a batch holds, and to ask what a file holds."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from trackagent.agent.store import open_reader
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    EventData,
    Gap,
    Loss,
    Points,
    ProducerEnd,
    ProducerInfo,
    Setting,
)

RUN = "ab" * 16
OTHER_RUN = "cd" * 16


def producer(rank: int = 0, *, attempt: int = 1, run: str = RUN, **changes: Any) -> ProducerInfo:
    """A producer whose id follows from what it is."""
    forked = changes.get("forked", False)
    fields: dict[str, Any] = {
        "producer_id": f"{run[:4]}{run[-4:]}{attempt:04}{rank:04}{forked:04}".encode(),
        "run_id": run,
        "attempt": attempt,
        "rank": rank,
        "local_rank": rank,
        "world_size": 2,
        "node": "node-a",
        "pid": 4711,
        "start_time_ns": 1_000 * attempt + rank,
        "experiment": "gpt",
        "run_name": "",
        "forked": False,
    }
    return ProducerInfo(**(fields | changes))


def batch(number: int, *producers: ProducerInfo, origin: str = "spool", **said: Any) -> Batch:
    """Batch [number, number] of a spool."""
    return Batch(BatchId(origin, number, number), producers, **said)


def points(
    by: ProducerInfo,
    steps: Any,
    *,
    times: Any = None,
    keys: tuple[str, ...] = ("loss",),
    **values: Any,
) -> Points:
    """values: `value=[...]` for the first key, default step + position of the key / 10."""
    of_steps = np.asarray(list(steps), dtype=np.int64)
    of_times = of_steps * 10 if times is None else np.asarray(list(times), dtype=np.int64)
    matrix = np.stack([of_steps + at / 10 for at in range(len(keys))])
    if "value" in values:
        matrix[0] = values["value"]
    return Points(by.producer_id, keys, of_steps, of_times, matrix)


def as_before_reductions(connection: sqlite3.Connection) -> None:
    """Makes a store that holds none what it was before version 7, but for its number and the copy of
    producers."""
    connection.execute("DROP INDEX IF EXISTS copy_of_producers")
    connection.execute("DROP INDEX idx_streams_producer_keyset_reduced")
    for table, column in (
        ("producers", "reduced"),
        ("producers", "in_groups"),
        ("streams", "reduced"),
    ):
        connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    connection.execute(
        "CREATE UNIQUE INDEX idx_streams_producer_keyset ON streams (producer, keyset)"
    )


def param(by: ProducerInfo, key: str, value: str, time_ns: int = 1) -> Setting:
    return Setting(by.producer_id, key, value, time_ns)


def event(by: ProducerInfo, message: str, **changes: Any) -> EventData:
    fields: dict[str, Any] = {"time_ns": 5, "level": "info"} | changes
    return EventData(by.producer_id, message=message, **fields)


def end(
    by: ProducerInfo,
    status: str = "finished",
    *,
    time_ns: int = 9_000,
    error: str = "",
    logged: int = 0,
) -> ProducerEnd:
    return ProducerEnd(by.producer_id, time_ns, status, error, logged)


def loss(by: ProducerInfo, reason: str, records: int, *, more: bool = False) -> Loss:
    return Loss(by.producer_id, reason, records, more)


def gap(
    by: ProducerInfo,
    first_step: int,
    last_step: int,
    *,
    reason: str = "full",
    records: int = 10,
    time_ns: int = 7,
) -> Gap:
    """One that lasted for 100 ns."""
    times = (time_ns, time_ns + 100)
    return Gap(by.producer_id, reason, first_step, last_step, *times, records)


def query(path: Path, sql: str) -> list[Any]:
    """The rows that the statement gives, or what it changes."""
    connection = sqlite3.connect(path)
    with connection:
        rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def steps_of(path: Path, key: str = "loss") -> list[int]:
    """Those that a reader gives of a series of rank 0."""
    reader = open_reader(path)
    steps: list[int] = reader.series(RUN, key, "rank 0").steps.tolist()
    reader.close()
    return steps
