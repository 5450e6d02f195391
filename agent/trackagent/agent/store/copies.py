"""All that the embedded store has of a run, as batches for another store.

Places in a stream and numbers of events never change, so their ranges are the ids: who copies a run again, as
it goes on, sends what is new. What has no place (params, ends, counts) goes under a digest of itself, and is
such that it may be said twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from trackagent.agent.store import chunks
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

# Values that go together.
VALUES_TOGETHER = 256 * 1024
EVENTS_TOGETHER = 1000

Connected = Callable[[str], AbstractContextManager[sqlite3.Connection]]
Known = Callable[[str], int]

_PRODUCERS = (
    "SELECT p.id, p.producer_id, r.run_id, p.said_attempt, p.rank, p.local_rank, p.world_size, p.node, p.pid,"
    " p.start_time_ns, e.name, p.run_name, p.forked, p.job_time_ns, p.sampled, p.in_groups, p.reduced,"
    " p.records, p.end_status, p.end_time_ns, p.end_error, p.logged FROM producers p"
    " JOIN runs r ON r.id = p.run JOIN experiments e ON e.id = p.experiment WHERE p.run = ? ORDER BY p.id"
)


def copies(connected: Connected, run: int, known: Known) -> Iterator[Batch]:
    """Of the run in this row. known: up to where the other store has an origin, 0 for nothing."""
    for batch in _copies(connected, run, known):
        yield dataclasses.replace(
            batch, history=frozenset(one.producer_id for one in batch.producers)
        )


def _copies(connected: Connected, run: int, known: Known) -> Iterator[Batch]:
    with connected("copy a run") as connection:
        rows = connection.execute(_PRODUCERS, (run,)).fetchall()
        infos = {row[0]: _info(row) for row in rows}
        about = _about(connection, run, infos, rows)
        streams = connection.execute(
            "SELECT t.id, t.producer, k.keys, t.points, t.reduced FROM streams t"
            " JOIN keysets k ON k.id = t.keyset JOIN producers p ON p.id = t.producer WHERE p.run = ?"
            " ORDER BY t.id",
            (run,),
        ).fetchall()
    yield about
    for row in rows:
        info, records = infos[row[0]], row[17]
        origin = _origin("records", info.producer_id)
        if (before := known(origin)) < records:
            counted = {info.producer_id: records - before}
            yield Batch(BatchId(origin, before + 1, records), [info], metric_records=counted)
    yield from _events(connected, run, infos, known)
    for stream, producer, joined, points, reduced in streams:
        yield from _points(connected, stream, infos[producer], joined, points, bool(reduced), known)


def _about(
    connection: sqlite3.Connection,
    run: int,
    infos: dict[int, ProducerInfo],
    rows: list[tuple[Any, ...]],
) -> Batch:
    # Whoever of them: a setting is the run's.
    first = next(iter(infos.values())).producer_id if infos else b""
    settings = [
        [
            Setting(first, *row)
            for row in connection.execute(
                f"SELECT key, value, time_ns FROM {table} WHERE run = ? ORDER BY key", (run,)
            )
        ]
        for table in ("params", "tags")
    ]
    losses = connection.execute(
        "SELECT l.producer, l.reason, l.counted + l.more FROM losses l JOIN producers p ON p.id = l.producer"
        " WHERE p.run = ? ORDER BY l.producer, l.reason",
        (run,),
    ).fetchall()
    gaps = connection.execute(
        "SELECT g.producer, g.reason, g.first_step, g.last_step, g.first_time_ns, g.last_time_ns, g.records"
        " FROM gaps g JOIN producers p ON p.id = g.producer WHERE p.run = ?"
        " ORDER BY g.producer, g.first_time_ns, g.reason",
        (run,),
    ).fetchall()
    batch = Batch(
        BatchId("", 1, 1),
        list(infos.values()),
        params=settings[0],
        tags=settings[1],
        ends=[
            ProducerEnd(infos[row[0]].producer_id, row[19], row[18], row[20] or "", row[21])
            for row in rows
            if row[18] is not None
        ],
        losses=[Loss(infos[producer].producer_id, *rest) for producer, *rest in losses],
        gaps=[Gap(infos[producer].producer_id, *rest) for producer, *rest in gaps],
    )
    digest = repr([getattr(batch, name) for name in batch.__slots__]).encode()
    return dataclasses.replace(batch, id=BatchId(_origin("about", digest), 1, 1))


def _events(
    connected: Connected, run: int, infos: dict[int, ProducerInfo], known: Known
) -> Iterator[Batch]:
    by_run = next(iter(infos.values())).run_id if infos else ""
    origin = _origin("events", by_run.encode())
    after = known(origin)
    while True:
        with connected("copy events") as connection:
            rows = connection.execute(
                "SELECT id, producer, time_ns, level, message, step, data FROM events"
                " WHERE run = ? AND id > ? ORDER BY id LIMIT ?",
                (run, after, EVENTS_TOGETHER),
            ).fetchall()
        # One of another run's producers concerns this run too, and is told by one of its own.
        other = next(iter(infos.values()), None)
        if not rows or other is None:
            return
        events = [
            EventData(
                infos.get(producer, other).producer_id,
                time_ns,
                level,
                message,
                step,
                json.loads(data),
            )
            for _, producer, time_ns, level, message, step, data in rows
        ]
        yield Batch(BatchId(origin, after + 1, rows[-1][0]), list(infos.values()), events=events)
        after = rows[-1][0]


def _points(
    connected: Connected,
    stream: int,
    info: ProducerInfo,
    joined: str,
    points: int,
    reduced: bool,
    known: Known,
) -> Iterator[Batch]:
    keys = tuple(joined.split("\n"))
    origin = _origin("points", info.producer_id, joined.encode(), bytes([reduced]))
    at = known(origin)
    most = max(1, VALUES_TOGETHER // len(keys))
    while at < points:
        with connected("copy points") as connection:
            found = chunks.chunks_of(connection, stream, len(keys), first=at, limit=1)
            if not found or found[0].start >= points:
                return
            there, rows = chunks.read_intact(connection, found[0])
        chunk = found[0]
        begin, end = max(at, chunk.start), min(points, chunk.start + chunk.n)
        for first in range(begin, end, most):
            last = min(end, first + most)
            part = rows[:, first - chunk.start : last - chunk.start]
            id_ = BatchId(origin, at + 1, last)
            at = last
            said = []
            if there:
                values = np.ascontiguousarray(part[chunks.FIRST_KEY :]).view(np.float64)
                some = tuple(keys[key] for key in there)
                steps, times = part[chunks.STEPS].copy(), part[chunks.TIMES].copy()
                said = [Points(info.producer_id, some, steps, times, values, reduced)]
            yield Batch(id_, [info], points=said)


def _info(row: tuple[Any, ...]) -> ProducerInfo:
    (
        _,
        id_,
        run,
        attempt,
        rank,
        local,
        world,
        node,
        pid,
        start_ns,
        experiment,
        name,
        forked,
        job_ns,
    ) = row[:14]
    sampled, groups, reduced = row[14:17]
    return ProducerInfo(
        producer_id=id_,
        run_id=run,
        attempt=attempt,
        rank=rank,
        local_rank=local,
        world_size=world,
        node=node,
        pid=pid,
        start_time_ns=start_ns,
        experiment=experiment,
        run_name=name,
        forked=bool(forked),
        job_time_ns=job_ns,
        # The store says so of what reduces as well.
        sampled="" if reduced else sampled,
        groups=tuple(sorted(json.loads(groups).items())) if groups else (),
        reduced=reduced,
    )


def _origin(*parts: str | bytes) -> str:
    """32 hexadecimal digits that follow from the parts."""
    digest = hashlib.blake2b(b"trackagent copy", digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
