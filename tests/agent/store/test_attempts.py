"""Attempts of one run: how they are counted over jobs, and that the last one's points win, whatever the
order of arrival and of merging."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from pathlib import Path

import pytest

from tests.agent.store.batches import RUN, as_before_reductions, batch, end, event, points, producer
from trackagent.agent.store import open_reader, open_writer, schema
from trackagent.agent.store.contract import Batch, ProducerInfo, Reader
from trackagent.agent.store.runs import attempt_numbers


def of_job(job: int, attempt: int, rank: int = 0, *, known: bool = True) -> ProducerInfo:
    """A rank of the job that began at `job`; its id says all of it."""
    return producer(
        rank,
        attempt=attempt,
        job_time_ns=job if known else 0,
        producer_id=f"job {job:3} {attempt:3} {rank:3}".encode().ljust(16, b"."),
        start_time_ns=1000 * job + attempt,
    )


FIRST, SECOND, THIRD = of_job(1, 1), of_job(1, 2), of_job(2, 1)
BATCHES = [
    batch(1, FIRST, points=[points(FIRST, range(6), value=[1] * 6)], ends=[end(FIRST, "killed")]),
    batch(
        2,
        SECOND,
        points=[points(SECOND, range(2, 8), value=[2] * 6)],
        ends=[end(SECOND, "failed", error="boom")],
    ),
    batch(3, THIRD, points=[points(THIRD, range(4, 7), value=[3] * 3)], events=[event(THIRD, "x")]),
]


def stored(path: Path, batches: list[Batch], *, merge: bool = False) -> Reader:
    with contextlib.closing(open_writer(path)) as writer:
        for one in batches:
            writer.write(one)
            if merge:
                assert writer.compact(60) is False
    return open_reader(path)


@pytest.mark.parametrize("merge", [False, True], ids=["as it came", "merged"])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_the_last_attempt_wins_in_any_order_of_arrival(
    tmp_path: Path, order: tuple[int, ...], merge: bool
) -> None:
    path = tmp_path / "store.db"
    with contextlib.closing(stored(path, [BATCHES[at] for at in order], merge=merge)) as reader:
        series = reader.series(RUN, "loss", "rank 0")
        assert series.steps.tolist() == list(range(8))
        assert series.values.tolist() == [1, 1, 2, 2, 3, 3, 3, 2]
        assert reader.buckets(RUN, "loss", "rank 0", 8).mean.tolist() == series.values.tolist()
        [info] = reader.series_list(RUN)
        assert (info.last_step, info.last_value) == (7, 2.0)
        run = reader.run(RUN)
        assert (run.status, run.attempt, run.error) == ("running", 3, "")


@pytest.mark.parametrize("merge", [False, True], ids=["as it came", "merged"])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_earlier_attempts_stay_readable(
    tmp_path: Path, order: tuple[int, ...], merge: bool
) -> None:
    path = tmp_path / "store.db"
    with contextlib.closing(stored(path, [BATCHES[at] for at in order], merge=merge)) as reader:
        found = {
            block.attempt: (block.steps.tolist(), block.values[0].tolist())
            for block in reader.export(RUN)
        }
    assert found == {
        1: (list(range(6)), [1] * 6),
        2: (list(range(2, 8)), [2] * 6),
        3: ([4, 5, 6], [3] * 3),
    }


def test_the_final_status_is_the_last_attempts(tmp_path: Path) -> None:
    last = batch(4, THIRD, ends=[end(THIRD, "finished")])
    with contextlib.closing(stored(tmp_path / "store.db", [last, *BATCHES])) as reader:
        assert reader.run(RUN).status == "finished"


def test_all_ranks_of_an_attempt_are_of_it(tmp_path: Path) -> None:
    ranks = [of_job(job, 1, rank) for job in (1, 2) for rank in (0, 1)]
    said = [end(info, "failed" if info.job_time_ns == 1 else "finished") for info in ranks]
    with contextlib.closing(stored(tmp_path / "store.db", [batch(1, *ranks, ends=said)])) as reader:
        run = reader.run(RUN)
    assert (run.status, run.attempt, run.ranks) == ("finished", 2, 2)


ADDED_SINCE_VERSION_3 = [
    ("producers", "job_time_ns"),
    ("producers", "said_attempt"),
    ("producers", "sampled"),
    ("runs", "listed"),
    ("chunks", "first_step"),
    ("chunks", "last_step"),
]


def test_a_store_of_before_keeps_its_attempts(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    stored(path, [batch(1, producer(0), producer(0, attempt=2))]).close()
    with contextlib.closing(sqlite3.connect(path)) as old:
        as_before_reductions(old)
        for table in schema.TWICE.keys() - {"producers"}:
            old.execute(f"DROP INDEX copy_of_{table}")
        for table, column in ADDED_SINCE_VERSION_3:
            old.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        old.execute("PRAGMA application_id = 0")
        old.execute("PRAGMA user_version = 3")
        old.commit()
    third = producer(0, attempt=1, job_time_ns=2_000_000_000_000_000_000, producer_id=b"3" * 16)
    with contextlib.closing(stored(path, [batch(2, third)])) as reader:
        assert reader.run(RUN).attempt == 3


@pytest.mark.parametrize(
    ("said", "numbers"),  # job, attempt, when it started
    [
        ([(5, 1, 5), (5, 2, 8), (9, 1, 9), (9, 2, 10)], [1, 2, 3, 4]),
        ([(5, 1, 5), (9, 7, 9), (11, 1, 11)], [1, 7, 8]),
        ([(5, 3, 5)], [3]),
        # Nobody knows of jobs: what they say counts.
        ([(0, 1, 5), (0, 2, 6)], [1, 2]),
        # Who does not know its job is of the last one that has counted as far.
        ([(5, 1, 5), (9, 1, 9), (0, 1, 6)], [1, 2, 2]),
        ([(5, 1, 5), (5, 2, 6), (9, 1, 9), (0, 2, 6)], [1, 2, 3, 2]),
        # Where none has, it was a job of its own, and began when it did.
        ([(5, 1, 5), (0, 4, 3)], [5, 4]),
        ([(5, 1, 5), (0, 2, 6)], [1, 2]),
        ([(0, 1, 5), (6, 2, 6), (0, 3, 7)], [1, 2, 3]),
    ],
)
def test_attempts_are_counted_over_jobs(
    said: list[tuple[int, int, int]], numbers: list[int]
) -> None:
    pairs = [(job, attempt) for job, attempt, _ in said]
    for order in itertools.permutations(said):
        assert attempt_numbers(order) == dict(zip(pairs, numbers, strict=True))


def test_a_later_process_of_the_same_attempt_does_not_move_it() -> None:
    said = [(5, 1, 5), (0, 2, 6), (7, 3, 7), (0, 2, 9)]
    assert attempt_numbers(said) == {(5, 1): 1, (0, 2): 2, (7, 3): 3}
