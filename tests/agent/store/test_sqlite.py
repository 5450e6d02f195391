"""The embedded store where only it can fail: faults, death, other processes, damaged and foreign files."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.agent.store.batches import (
    RUN,
    batch,
    end,
    event,
    loss,
    param,
    points,
    producer,
    query,
    steps_of,
)
from trackagent.agent.store import open_reader, open_writer, schema
from trackagent.agent.store.chunks import CHUNK_POINTS, CHUNK_VALUES, capacity
from trackagent.agent.store.contract import Batch, BatchId, Rejected, StoreError
from trackagent.agent.store.database import connect
from trackagent.agent.store.reader import SqliteReader
from trackagent.agent.store.sqlite import NEXT_DUE, SqliteWriter

R0, R1 = producer(0), producer(1)


def full(number: int) -> Batch:
    """A batch with something of each kind."""
    at = number * 5
    return batch(
        number,
        R0,
        producer(number),
        params=[param(R0, f"p{number}", "1")],
        tags=[param(R0, "t", str(number), number)],
        events=[event(R0, f"event {number}")],
        points=[
            points(R0, range(at, at + 5), keys=("a", "b")),
            points(R0, [number], keys=(f"k{number}",)),
        ],
        losses=[loss(R0, "full", number)],
        metric_records={R0.producer_id: 6},
        ends=[end(producer(number))],
    )


def contents(path: Path) -> dict[str, list[Any]]:
    """Every row of every table."""
    connection = sqlite3.connect(path)
    tables = [
        row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables}
    connection.close()
    return rows


# --- faults ----------------------------------------------------------------------------------------


class Faults:
    """An opener whose connections fail at the `at`-th statement from now, and at the statement `sql`."""

    def __init__(self, error: Callable[[], Exception] | None = None) -> None:
        self.at = -1
        self.sql = ""
        self.error = error or (lambda: sqlite3.OperationalError("disk I/O error"))

    def count(self, sql: str) -> None:
        self.at -= 1
        if self.at == 0 or sql == self.sql:
            raise self.error()

    def open(self, uri: str) -> sqlite3.Connection:
        faults = self

        class Failing(sqlite3.Connection):
            def execute(self, *args: Any) -> sqlite3.Cursor:
                faults.count(args[0])
                return super().execute(*args)

            def executemany(self, *args: Any) -> sqlite3.Cursor:
                faults.count(args[0])
                return super().executemany(*args)

        return sqlite3.connect(uri, uri=True, isolation_level=None, factory=Failing)


def test_a_write_that_fails_at_any_statement_leaves_nothing_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    whole = SqliteWriter(tmp_path / "whole.db")
    for number in (1, 2):
        whole.write(full(number))
    whole.close()
    expected = contents(tmp_path / "whole.db")

    path = tmp_path / "store.db"
    faults = Faults()
    writer = SqliteWriter(path, opener=faults.open)
    writer.write(full(1))
    before = contents(path)
    failed = 0
    for at in range(1, 1000):
        faults.at = at
        try:
            writer.write(full(2))
            break
        except StoreError:
            failed += 1
            faults.at = -1
            assert contents(path) == before
    writer.close()
    assert failed > 20
    assert contents(path) == expected


def test_a_write_after_a_failed_roll_back_opens_the_file_anew(path: Path) -> None:
    faults = Faults()
    writer = SqliteWriter(path, opener=faults.open)
    writer.write(batch(1, R0, points=[points(R0, [1])]))

    def fails_from_here_on() -> Exception:
        faults.at = 1
        return sqlite3.OperationalError("disk I/O error")

    faults.error, faults.at = fails_from_here_on, 5
    with pytest.raises(StoreError, match="disk I/O error"):
        writer.write(batch(2, R0, points=[points(R0, [2])]))
    faults.at = -1
    writer.write(batch(2, R0, points=[points(R0, [2])]))
    writer.close()
    assert steps_of(path) == [1, 2]


def test_a_merge_that_fails_at_any_statement_loses_nothing(path: Path) -> None:
    faults = Faults()
    writer = SqliteWriter(path, opener=faults.open)
    for number in range(40):
        writer.write(batch(number, R0, points=[points(R0, [number])]))
    for at in range(1, 1000):
        faults.at = at
        try:
            writer.compact(60)
            break
        except StoreError:
            faults.at = -1
            assert steps_of(path) == list(range(40))
    writer.close()
    assert steps_of(path) == list(range(40))
    assert len(query(path, "SELECT * FROM chunks")) < 16


def test_commits_are_synced_also_after_a_merge_that_could_not_say_so(path: Path) -> None:
    faults, opened = Faults(), list[sqlite3.Connection]()

    def opener(uri: str) -> sqlite3.Connection:
        opened.append(faults.open(uri))
        return opened[-1]

    writer = SqliteWriter(path, opener=opener)
    writer.write(batch(1, R0, points=[points(R0, [1])], ends=[end(R0)]))
    faults.sql = "PRAGMA synchronous = FULL"
    with pytest.raises(StoreError, match="disk I/O error"):
        writer.compact(60)
    faults.sql = ""
    writer.write(batch(2, R0, points=[points(R0, [2])]))
    synchronous = opened[-1].execute("PRAGMA synchronous").fetchone()
    writer.close()
    assert (synchronous, steps_of(path)) == ((2,), [1, 2])


def test_an_opening_that_fails_at_any_statement_can_be_repeated(tmp_path: Path) -> None:
    for at in (*range(1, 14), *range(14, 1000, 7)):
        path = tmp_path / str(at) / "store.db"
        faults = Faults()
        faults.at = at
        try:
            SqliteWriter(path, opener=faults.open).close()
            break
        except StoreError:
            writer = SqliteWriter(path)
            writer.write(batch(1, R0))
            writer.close()
    assert at > 20


def test_a_full_disk_is_named_with_the_path_and_what_to_do(path: Path) -> None:
    faults = Faults(lambda: sqlite3.OperationalError("database or disk is full"))
    writer = SqliteWriter(path, opener=faults.open)
    faults.at = 4
    with pytest.raises(
        StoreError, match=f"cannot write a batch in {path}: .*full; free some space"
    ):
        writer.write(full(1))
    writer.close()


DIES = """
import os, sqlite3, sys
from pathlib import Path
from tests.agent.store.test_sqlite import Faults, full
from trackagent.agent.store.sqlite import SqliteWriter
faults = Faults(lambda: os._exit(9))
writer = SqliteWriter(Path(sys.argv[1]), opener=faults.open)
writer.write(full(1))
faults.at = int(sys.argv[2])
writer.write(full(2))
os._exit(0)
"""


@pytest.mark.parametrize("at", [12, 30])
def test_a_process_that_dies_while_it_writes_leaves_whole_batches(path: Path, at: int) -> None:
    here = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", DIES, str(path), str(at)], check=False, cwd=here)
    assert done.returncode == 9
    reader = open_reader(path)
    seen = (reader.params(RUN), reader.series(RUN, "a", "rank 0").steps.tolist())
    reader.close()
    assert seen == ({"p1": "1"}, [5, 6, 7, 8, 9])


# --- the file --------------------------------------------------------------------------------------


def test_file_and_folder_are_private(path: Path, writer: SqliteWriter) -> None:
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path.parent, path)]
    assert modes == [0o700, 0o600]


def test_commits_are_synced(path: Path) -> None:
    opened: list[sqlite3.Connection] = []

    def opener(uri: str) -> sqlite3.Connection:
        opened.append(connect(uri))
        return opened[-1]

    writer = SqliteWriter(path, opener=opener)
    for number in range(20):
        writer.write(batch(number, R0, points=[points(R0, [number])]))
    writer.compact(60)
    pragmas = [
        opened[0].execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("synchronous", "journal_mode")
    ]
    writer.close()
    assert pragmas == [2, "wal"]


def test_an_older_database_is_brought_up_to_date_with_what_it_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        SqliteWriter(path).close()
    query(path, "INSERT INTO losses (producer, reason, records) VALUES (1, 'full', 7)")
    writer = SqliteWriter(path)
    writer.write(batch(1, R0, losses=[loss(R0, "full", 2, more=True)]))
    writer.close()
    reader = open_reader(path)
    found = reader.losses(RUN)
    reader.close()
    assert found == {"full": 9}


def as_of_version(path: Path, version: int) -> None:
    query(path, f"PRAGMA application_id = {schema.MARK + version}")
    query(path, f"PRAGMA user_version = {version}")


def test_a_newer_database_is_refused(path: Path, writer: SqliteWriter) -> None:
    as_of_version(path, schema.VERSION + 1)
    with pytest.raises(StoreError, match="use the trackagent that wrote it or a newer one"):
        open_writer(path)


def test_a_reader_refuses_a_newer_database(path: Path, writer: SqliteWriter) -> None:
    as_of_version(path, schema.VERSION + 1)
    with pytest.raises(StoreError, match="use the trackagent that wrote it or a newer one"):
        open_reader(path)


def test_a_newer_database_is_left_as_it_is(path: Path, writer: SqliteWriter) -> None:
    as_of_version(path, schema.VERSION + 1)
    with pytest.raises(StoreError):
        open_writer(path)
    assert query(path, "PRAGMA user_version") == [(schema.VERSION + 1,)]


def test_a_reader_says_that_nothing_has_been_stored_yet(path: Path) -> None:
    with pytest.raises(StoreError, match=f"nothing has been stored yet in {path}"):
        open_reader(path)


def test_a_reader_of_an_empty_file_says_that_nothing_has_been_stored_yet(tmp_path: Path) -> None:
    (tmp_path / "store.db").touch()
    with pytest.raises(StoreError, match="nothing has been stored yet"):
        open_reader(tmp_path / "store.db")


def test_a_file_that_is_no_database_is_set_aside(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    writer = open_writer(path)
    writer.write(batch(1, R0))
    writer.close()
    (aside,) = (path.parent / "quarantine").glob("*-store.db")
    assert aside.read_bytes() == b"no database" * 1000


def test_a_closed_writer_says_so(path: Path) -> None:
    writer = open_writer(path)
    writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.write(full(1))


def test_a_closed_reader_says_so(path: Path, writer: SqliteWriter) -> None:
    reader = open_reader(path)
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.runs()


# --- batches ---------------------------------------------------------------------------------------


def test_neighbouring_batches_are_remembered_as_one_range(path: Path, writer: SqliteWriter) -> None:
    for number in (5, 1, 3, 2, 4, 9):
        writer.write(batch(number, R0))
    assert query(path, "SELECT first, last FROM applied") == [(1, 5), (9, 9)]


@pytest.mark.parametrize(("first", "last"), [(0, 1), (5, 6), (0, 9)])
def test_a_batch_that_overlaps_another_is_rejected(
    writer: SqliteWriter, first: int, last: int
) -> None:
    for number in range(1, 6):
        writer.write(batch(number, R0))
    with pytest.raises(Rejected, match="overlaps 1 to 5"):
        writer.write(Batch(BatchId("spool", first, last)))


@pytest.mark.parametrize(
    "bad",
    [
        {"params": [param(R0, "\ud800", "")]},
        {"metric_records": {R0.producer_id: 2**70}},
        {"events": [event(R0, "", data={"a": object()})]},
        {"points": [points(R0, [1, 2], keys=("a", "a"))]},
        {"points": [points(R0, [1, 2], keys=("a\nb",))]},
        {"points": [points(R0, [1], keys=tuple(map(str, range(20_000))))]},
    ],
)
def test_what_sqlite_cannot_hold_is_rejected(writer: SqliteWriter, bad: dict[str, Any]) -> None:
    with pytest.raises(Rejected):
        writer.write(batch(1, R0, **bad))


def test_two_writers_of_one_file_do_not_disturb_each_other(
    path: Path, writer: SqliteWriter
) -> None:
    other = SqliteWriter(path)
    for number in range(10):
        (writer, other)[number % 2].write(batch(number, R0, points=[points(R0, [number])]))
    other.close()
    assert steps_of(path) == list(range(10))


# --- chunks ----------------------------------------------------------------------------------------


def test_a_large_batch_is_cut_into_full_chunks(path: Path, writer: SqliteWriter) -> None:
    writer.write(batch(1, R0, points=[points(R0, range(150_000))]))
    sizes = query(path, "SELECT n FROM chunks ORDER BY start")
    assert sizes == [(CHUNK_POINTS,), (CHUNK_POINTS,), (150_000 - 2 * CHUNK_POINTS,)]


def test_a_large_batch_comes_back_whole(writer: SqliteWriter, reader: SqliteReader) -> None:
    values = np.random.default_rng(1).normal(size=150_000)
    writer.write(batch(1, R0, points=[points(R0, range(150_000), value=values)]))
    assert reader.series(RUN, "loss", "rank 0").values.tobytes() == values.tobytes()


def test_a_batch_of_many_keys_is_cut_into_blocks_of_bounded_size(
    path: Path, writer: SqliteWriter
) -> None:
    keys = tuple(f"k{i}" for i in range(1000))
    writer.write(batch(1, R0, points=[points(R0, range(100), keys=keys)]))
    assert query(path, "SELECT start, n FROM chunks ORDER BY start") == [(0, 65), (65, 35)]


@pytest.mark.parametrize("keys", [1, 16, 17, 1000, 4096])
def test_a_full_chunk_has_a_bounded_number_of_points_and_values(keys: int) -> None:
    assert capacity(keys) <= CHUNK_POINTS
    assert capacity(keys) * keys <= CHUNK_VALUES


def test_merging_leaves_few_rows(path: Path, writer: SqliteWriter) -> None:
    for number in range(100):
        writer.write(batch(number, R0, points=[points(R0, [number], keys=("a", "b"))]))
        writer.compact(60)
    assert len(query(path, "SELECT id FROM chunks")) < 25


def test_an_ended_producer_is_one_chunk(path: Path, writer: SqliteWriter) -> None:
    for number in range(50):
        writer.write(batch(number, R0, points=[points(R0, [number], keys=("a", "b"))]))
    writer.write(batch(50, ends=[end(R0)]))
    writer.compact(60)
    assert query(path, "SELECT start, n FROM chunks") == [(0, 50)]


def test_merged_points_come_back(path: Path, writer: SqliteWriter) -> None:
    for number in range(50):
        writer.write(batch(number, R0, points=[points(R0, [number] * 40, times=range(40))]))
    writer.write(batch(50, ends=[end(R0)]))
    writer.compact(60)
    assert steps_of(path) == [step for step in range(50) for _ in range(40)]


def test_compaction_keeps_to_its_deadline(path: Path) -> None:
    ticks = iter(range(100))
    writer = SqliteWriter(path, clock=lambda: next(ticks))
    ranks = [producer(rank) for rank in range(8)]
    writer.write(
        batch(1, *ranks, points=[points(info, [1]) for info in ranks], ends=map(end, ranks))
    )
    assert writer.compact(3) is True
    writer.close()
    assert len(query(path, "SELECT id FROM streams WHERE due > 0")) > 0


def test_the_next_stream_to_merge_is_found_without_a_scan(path: Path, writer: SqliteWriter) -> None:
    plan = query(path, f"EXPLAIN QUERY PLAN {NEXT_DUE}")
    assert "idx_streams_due" in plan[0][-1]


def test_free_pages_go_back_to_the_file_system(path: Path, writer: SqliteWriter) -> None:
    noise = np.random.default_rng(1).integers(0, 2**64, 400_000, dtype=np.uint64).view(np.float64)
    keys = tuple(f"k{i}" for i in range(10))
    for number in range(8):
        writer.write(
            batch(number, R0, points=[points(R0, range(50_000), keys=keys, value=noise[:50_000])])
        )
    before = query(path, "PRAGMA page_count")[0][0]
    query(path, "DELETE FROM columns")
    while writer.compact(60):
        pass
    assert query(path, "PRAGMA page_count")[0][0] < max(4096, before // 2)


# --- readers ---------------------------------------------------------------------------------------


def test_a_reader_sees_what_was_written_since_it_was_opened(
    writer: SqliteWriter, reader: SqliteReader
) -> None:
    writer.write(batch(1, R0, points=[points(R0, [1])]))
    assert reader.run("latest").points == 1


def test_a_reader_works_when_no_agent_runs(path: Path) -> None:
    writer = open_writer(path)
    writer.write(batch(1, R0, points=[points(R0, [1])]))
    writer.close()
    assert not path.with_name("store.db-wal").exists()
    assert steps_of(path) == [1]


def test_a_reader_works_in_a_folder_that_it_cannot_write() -> None:
    folder = Path(tempfile.mkdtemp())
    path = folder / "store.db"
    try:
        writer = open_writer(path)
        writer.write(batch(1, R0, points=[points(R0, [1])]))
        writer.close()
        path.chmod(0o444)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            assert not os.access(folder, os.W_OK, effective_ids=True)
            assert steps_of(path) == [1]
        finally:
            os.seteuid(user)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_an_export_goes_on_over_merges_and_new_points(
    writer: SqliteWriter, reader: SqliteReader
) -> None:
    for number in range(20):
        writer.write(batch(number, R0, points=[points(R0, [number])]))
    exported = reader.export(RUN)
    seen = [next(exported).steps]
    writer.write(batch(20, R0, points=[points(R0, [20])]))
    writer.compact(60)
    seen += [block.steps for block in exported]
    assert np.concatenate(seen).tolist() == list(range(20))


def test_an_export_left_half_way_holds_no_transaction(path: Path, writer: SqliteWriter) -> None:
    reader = SqliteReader(path)
    for number in range(3):
        writer.write(batch(number, R0, points=[points(R0, [number])]))
    exported = reader.export(RUN)
    next(exported)
    busy, *_ = query(path, "PRAGMA wal_checkpoint(TRUNCATE)")[0]
    reader.close()
    assert busy == 0


def test_readers_in_many_threads_see_whole_batches(
    writer: SqliteWriter, reader: SqliteReader
) -> None:
    writer.write(batch(0, R0, points=[points(R0, range(10), keys=("a", "b"))]))
    done, torn = threading.Event(), list[int]()

    def read() -> None:
        while not done.is_set():
            n = len(reader.series(RUN, "b", "rank 0").steps)
            if n % 10 or reader.run(RUN).points % 20:
                torn.append(n)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 40):
        at = number * 10
        writer.write(batch(number, R0, points=[points(R0, range(at, at + 10), keys=("a", "b"))]))
        writer.compact(60)
    done.set()
    for thread in threads:
        thread.join()
    assert torn == []
