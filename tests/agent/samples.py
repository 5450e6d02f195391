"""Producers, records and journals as the tests of the agent's core make them."""

from __future__ import annotations

import sqlite3
import struct
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.fakes import Folders
from trackagent.agent.store.contract import ProducerInfo
from trackagent.client import record
from trackagent.client.journal import Journal
from trackagent.client.record import Kind

RUN_ID = "0123456789abcdef" * 2
TIME_NS = 1_700_000_000_000_000_000
SEGMENT_BYTES = 64 * 1024
LOSS_KEYS = ("loss", "lr")


def producer(rank: int = 0, **changes: Any) -> ProducerInfo:
    """A rank of a world of 64; its id is its rank, sixteen times."""
    fields: dict[str, Any] = {
        "producer_id": bytes([rank]) * 16,
        "run_id": RUN_ID,
        "attempt": 1,
        "rank": rank,
        "local_rank": rank,
        "world_size": 64,
        "node": "host-a",
        "pid": 4711,
        "start_time_ns": TIME_NS,
        "experiment": "gpt",
        "run_name": "",
        "forked": False,
    }
    return ProducerInfo(**(fields | changes))


def schema(schema_id: int, *keys: str) -> bytes:
    """One SCHEMA record."""
    return record.encode_schema(schema_id, keys, time_ns=TIME_NS)


def metrics(schema_id: int, step: int, *values: float) -> bytes:
    """One METRICS record; its time is TIME_NS plus its step."""
    return metrics_of_bits(schema_id, step, *(struct.pack("<d", value) for value in values))


def metrics_of_bits(schema_id: int, step: int, *values: bytes) -> bytes:
    """One METRICS record whose values are these 8 bytes each."""
    return record.encode(
        Kind.METRICS,
        b"".join(values),
        step=step,
        time_ns=TIME_NS + step,
        schema_id=schema_id,
        count=len(values),
    )


def said(kind: Kind, data: Mapping[str, Any], step: int = record.NO_STEP) -> bytes:
    """One record of a JSON kind."""
    return record.encode_json(kind, data, step=step, time_ns=TIME_NS)


def payload(kind: int, content: bytes, **head: int) -> bytes:
    """One record with a good checksum and any payload."""
    return record.encode(kind, content, **{"step": 0, "time_ns": TIME_NS, **head})  # type: ignore[arg-type]


def losses(steps: range) -> bytes:
    """A schema, and the loss (equal to the step) and the learning rate at each of `steps`."""
    return schema(0, *LOSS_KEYS) + b"".join(metrics(0, step, float(step), 0.5) for step in steps)


def journal(
    folders: Folders,
    info: ProducerInfo | None = None,
    *,
    memory_bytes: int = 1 << 30,
    segment_bytes: int = SEGMENT_BYTES,
) -> Journal:
    """An open journal in `folders`, its owner this process: `close()` makes an orphan of it."""
    info = info or producer()
    return Journal(
        {**asdict(info), "producer_id": info.producer_id.hex()},
        directory=folders.directory,
        state_directory=folders.state,
        segment_bytes=segment_bytes,
        memory_bytes=memory_bytes,
        journal_bytes=1 << 30,
    )


def log_losses(target: Journal, steps: range) -> None:
    """Logs the loss, equal to the step, at each of `steps` as one thread does: all in one lane."""
    lane = target.take()
    for step in steps:
        target.write_metrics(lane, {"loss": float(step)}, step=step, time_ns=TIME_NS + step)
    target.give(lane)


class Connection(sqlite3.Connection):
    """A connection that fails, or holds back, the statements that begin with a word.

    The class is its own seam: `connect=connections` of the fixture of that name.
    """

    failing: str | None = None
    error: Exception = sqlite3.OperationalError("database or disk is full")
    held_back: str | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.statements: list[str] = []
        self.reached = threading.Event()
        self.released = threading.Event()

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self.statements.append(sql)
        if self.held_back is not None and sql.startswith(self.held_back):
            self.reached.set()
            assert self.released.wait(30)
        if self.failing is not None and sql.startswith(self.failing):
            raise type(self.error)(*self.error.args)
        return super().execute(sql, *arguments)


class Connections:
    """What opens connections for a Spool, and the last one it opened. full: none can be opened, as when
    there is no room for the file."""

    def __init__(self) -> None:
        self.last: Connection
        self.full = False

    def __call__(self, path: Path, **keywords: Any) -> sqlite3.Connection:
        if self.full:
            raise OSError("No space left on device")
        self.last = sqlite3.connect(path, factory=Connection, **keywords)
        return self.last
