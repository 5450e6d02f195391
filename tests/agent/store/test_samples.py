"""How the embedded store keeps samples: files of before, what is read of a node's, and damage to them."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from tests.agent.store.batches import (
    OTHER_RUN,
    RUN,
    as_before_reductions,
    batch,
    end,
    param,
    points,
    producer,
    query,
    steps_of,
)
from trackagent.agent.store import open_reader, open_writer, schema
from trackagent.agent.store.contract import Floats, RunSummary, node_run_id

SECOND_NS = 1_000_000_000
PAGE = 4096
NODE = producer(run=node_run_id("node-a"), sampled="node node-a")
HOURS, HOUR_S = 40, 3600
# The producers' copy in an index, of version 5.
COPY_5 = (
    "pid, node, start_time_ns, local_rank, world_size, rank, forked, run_name, experiment, job_time_ns,"
    " said_attempt, attempt, end_status, end_time_ns, end_error, logged, producer_id, run, source"
)


# --- files of version 5


@pytest.fixture
def old(path: Path) -> Path:
    """A store of version 5, with a run that has ended and one that goes on."""
    done, live = producer(0), producer(0, run=OTHER_RUN, start_time_ns=5000)
    with contextlib.closing(open_writer(path)) as writer:
        said = [points(done, range(2000)), points(live, range(9))]
        records = {done.producer_id: 2000, live.producer_id: 9}
        more = {"params": [param(done, "lr", "1")], "metric_records": records}
        writer.write(batch(1, done, live, points=said, **more))
        writer.write(batch(2, ends=[end(done, logged=2000)]))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        as_before_reductions(connection)
        for table, column in (
            ("producers", "sampled"),
            ("runs", "listed"),
            ("chunks", "first_step"),
            ("chunks", "last_step"),
        ):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.execute(f"CREATE INDEX copy_of_producers ON producers ({COPY_5})")
        connection.execute(f"PRAGMA application_id = {schema.MARK + 5}")
        connection.execute("PRAGMA user_version = 5")
        assert schema.shape_of(connection) == "c0f0132c237e254f"  # as it was
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def runs(path: Path) -> list[RunSummary]:
    with contextlib.closing(open_reader(path)) as reader:
        return reader.runs()


def test_a_store_of_before_keeps_all_that_it_has(old: Path) -> None:
    open_writer(old).close()
    assert [(run.run_id, run.status, run.points) for run in runs(old)] == [
        (OTHER_RUN, "running", 9),
        (RUN, "finished", 2000),
    ]
    assert steps_of(old) == [*range(2000)]


def test_a_store_of_before_takes_samples(old: Path) -> None:
    with contextlib.closing(open_writer(old)) as writer:
        writer.write(batch(3, NODE, points=[points(NODE, range(3))]))
    with contextlib.closing(open_reader(old)) as reader:
        assert [info.source for info in reader.samples_list(OTHER_RUN)] == ["node node-a"]
        assert len(reader.runs()) == 2


@pytest.mark.parametrize("damaged", ["runs", "producers", "copy_of_producers"])
def test_of_a_damaged_store_of_before_nothing_is_lost_with_a_page(old: Path, damaged: str) -> None:
    kept = runs_of_version_5(old)
    ((page,),) = query(old, f"SELECT rootpage FROM sqlite_master WHERE name = '{damaged}'")
    file = bytearray(old.read_bytes())
    file[(page - 1) * PAGE : page * PAGE] = bytes(PAGE)
    old.write_bytes(file)
    open_writer(old).close()
    assert len(list((old.parent / "quarantine").glob("*-store.db"))) == 1
    assert [(run.run_id, run.status, run.points, run.records_stored) for run in runs(old)] == kept


def runs_of_version_5(path: Path) -> list[tuple[str, str, int, int]]:
    rows: list[tuple[str, str, int, int]] = query(
        path, "SELECT run_id, status, points, records_stored FROM runs ORDER BY start_time_ns DESC"
    )
    return rows


# --- what is read of a node that has sampled for long


@pytest.fixture(scope="module")
def hours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node that has sampled for hours, and a run of the twentieth, which has ended."""
    path = tmp_path_factory.mktemp("hours") / "store.db"
    rank = producer(start_time_ns=20 * HOUR_S * SECOND_NS)
    with contextlib.closing(open_writer(path)) as writer:
        writer.write(batch(1, rank, ends=[end(rank, time_ns=(21 * HOUR_S - 1) * SECOND_NS)]))
        for hour in range(HOURS):
            seconds = range(hour * HOUR_S, (hour + 1) * HOUR_S)
            said = [points(NODE, seconds, keys=("cpu", "memory"), value=noise(HOUR_S, hour))]
            writer.write(batch(2 + hour, NODE, points=said))
        while writer.compact(60):
            pass
    return path


@pytest.fixture
def sampled(hours: Path, path: Path) -> Path:
    """The same in a file that may be spoiled."""
    path.parent.mkdir(mode=0o700)
    shutil.copy(hours, path)
    return path


def noise(n: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=n)


def spoil(path: Path, condition: str) -> None:
    """Changes a byte in every column of the chunks of which this is true."""
    query(
        path,
        "UPDATE columns SET data = CAST(data || x'00' AS BLOB) WHERE id / 16384 IN"
        f" (SELECT id FROM chunks WHERE {condition})",
    )


def test_what_lies_outside_a_run_s_time_is_not_read(sampled: Path) -> None:
    outside = f"last_step < {20 * HOUR_S} OR first_step >= {21 * HOUR_S}"
    assert query(sampled, f"SELECT count(*) > 0 FROM chunks WHERE {outside}") == [(1,)]
    spoil(sampled, outside)
    with contextlib.closing(open_reader(sampled)) as reader:
        series = reader.series(RUN, "cpu", "node node-a")
        infos = reader.samples_list(RUN)
        assert reader.damage(RUN) == []
    assert series.steps.tolist() == [*range(HOUR_S)]
    assert series.values.tolist() == noise(HOUR_S, 20).tolist()
    assert [info.points for info in infos] == [HOUR_S, HOUR_S]
    assert infos[0].last_value == noise(HOUR_S, 20)[-1]


def test_samples_whose_bounds_are_not_known_are_read(sampled: Path) -> None:
    query(sampled, "UPDATE chunks SET first_step = NULL, last_step = NULL")
    with contextlib.closing(open_reader(sampled)) as reader:
        infos = reader.samples_list(RUN)
        assert reader.series(RUN, "cpu", "node node-a").steps.tolist() == [*range(HOUR_S)]
    assert [(info.points, info.last_step) for info in infos] == [(HOUR_S, HOUR_S - 1)] * 2


def test_damaged_samples_are_left_out_and_told_in_the_runs_that_saw_them(sampled: Path) -> None:
    later = producer(run=OTHER_RUN, start_time_ns=39 * HOUR_S * SECOND_NS)
    spoil(sampled, f"first_step <= {20 * HOUR_S} AND last_step >= {20 * HOUR_S}")
    with contextlib.closing(open_writer(sampled)) as writer:
        writer.write(batch(100, later))
        while writer.compact(60):
            pass
    with contextlib.closing(open_reader(sampled)) as reader:
        (told,) = reader.events(RUN)
        (named,) = reader.damage(RUN)
        assert reader.events(OTHER_RUN) + reader.damage(OTHER_RUN) == []
        assert len(reader.series(RUN, "cpu", "node node-a").steps) < HOUR_S
    assert (told.level, told.source) == ("error", "node node-a")
    assert "were set aside, unreadable" in told.message
    assert "cpu, memory of node node-a" in named


def test_samples_that_nobody_saw_are_missed_under_the_node_s_own_id(sampled: Path) -> None:
    spoil(sampled, "first_step = 0")
    with contextlib.closing(open_writer(sampled)) as writer:
        while writer.compact(60):
            pass
    with contextlib.closing(open_reader(sampled)) as reader:
        assert reader.events(RUN) == []
        (told,) = reader.events(NODE.run_id)
    assert "were set aside, unreadable" in told.message


def test_samples_lost_with_a_damaged_file_are_told_in_the_runs_of_the_node(sampled: Path) -> None:
    query(sampled, "DELETE FROM columns WHERE id = (SELECT min(id) FROM columns)")
    ((page,),) = query(sampled, "SELECT rootpage FROM sqlite_master WHERE name = 'params'")
    query(sampled, "PRAGMA wal_checkpoint(TRUNCATE)")
    file = bytearray(sampled.read_bytes())
    file[(page - 1) * PAGE : page * PAGE] = b"\xa5" * PAGE
    sampled.write_bytes(file)
    open_writer(sampled).close()
    with contextlib.closing(open_reader(sampled)) as reader:
        (told,) = reader.events(RUN)
        assert len(reader.runs()) == 1
    assert "points of cpu, memory of node node-a" in told.message
