"""The spool is durable when it says so: group commit, faults, and kill -9."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from tests.agent.samples import Connections, producer
from tests.agent.spools import DATA, ID, OpenSpool, delivery, spooled
from tests.fakes import DEADLINE_S, Folders
from trackagent.agent.spool import (
    OutOfOrder,
    Spool,
)

# --- group commit and faults


def held_back(spool: Spool, connections: Connections) -> list[Future[int]]:
    """Fifty appends by fifty threads, made while a commit is under way."""
    connections.last.held_back = "COMMIT"
    first = spool.append(ID, 0, 0, DATA)
    assert connections.last.reached.wait(DEADLINE_S)
    connections.last.statements.clear()
    futures = [first]
    threads = [
        threading.Thread(target=lambda lane=lane: futures.append(spool.append(ID, lane, 0, DATA)))
        for lane in range(1, 51)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return futures


@pytest.fixture
def faulty(open_spool: OpenSpool, connections: Connections) -> Spool:
    """A spool over `connections` that knows the producer and has a sink."""
    spool = open_spool(connect=connections)
    spool.open_producer(producer(), {}).result()
    spool.add_sink("store").result()
    return spool


def test_nothing_is_acknowledged_before_its_commit(faulty: Spool, connections: Connections) -> None:
    futures = held_back(faulty, connections)
    assert [future for future in futures if future.done()] == []
    connections.last.released.set()
    assert {future.result(DEADLINE_S) for future in futures} == {len(DATA)}


def test_what_arrives_during_a_commit_shares_the_next_one(
    faulty: Spool, connections: Connections
) -> None:
    futures = held_back(faulty, connections)
    connections.last.released.set()
    wait(futures, DEADLINE_S)
    assert connections.last.statements.count("COMMIT") == 1


def test_what_shares_a_commit_is_all_durable(
    faulty: Spool, connections: Connections, folders: Folders
) -> None:
    futures = held_back(faulty, connections)
    connections.last.released.set()
    wait(futures, DEADLINE_S)
    other = sqlite3.connect(folders.state / "spool.db")
    assert other.execute("SELECT COUNT(*) FROM batches").fetchone() == (51,)
    other.close()


def test_a_job_that_fails_takes_no_other_of_its_commit_with_it(
    faulty: Spool, connections: Connections
) -> None:
    connections.last.held_back = "COMMIT"
    faulty.append(ID, 0, 0, DATA)
    assert connections.last.reached.wait(DEADLINE_S)
    good, bad, also_good = (
        faulty.append(ID, 1, 0, DATA),
        faulty.append(ID, 2, 8, DATA),
        faulty.append(ID, 3, 0, DATA),
    )
    connections.last.released.set()
    assert (good.result(), type(bad.exception()), also_good.result()) == (
        len(DATA),
        OutOfOrder,
        len(DATA),
    )


FAULTS = [
    ("COMMIT", sqlite3.OperationalError("database or disk is full")),
    ("COMMIT", sqlite3.OperationalError("disk I/O error")),
    ("BEGIN", sqlite3.OperationalError("database is locked")),
    ("INSERT INTO batches", sqlite3.OperationalError("database or disk is full")),
    ("INSERT INTO lanes", sqlite3.OperationalError("disk I/O error")),
    ("SAVEPOINT", sqlite3.OperationalError("disk I/O error")),
]


@pytest.mark.parametrize(("statement", "error"), FAULTS)
def test_an_append_that_cannot_be_committed_fails(
    faulty: Spool, connections: Connections, statement: str, error: Exception
) -> None:
    connections.last.failing, connections.last.error = statement, error
    with pytest.raises(sqlite3.OperationalError, match=str(error)):
        faulty.append(ID, 0, 0, DATA).result(DEADLINE_S)


@pytest.mark.parametrize(("statement", "error"), FAULTS)
def test_after_a_fault_nothing_was_kept_and_nothing_counted(
    faulty: Spool, connections: Connections, statement: str, error: Exception
) -> None:
    connections.last.failing, connections.last.error = statement, error
    wait([faulty.append(ID, 0, 0, DATA)], DEADLINE_S)
    connections.last.failing = None
    statistics = faulty.statistics().result(DEADLINE_S)
    assert [statistics[name] for name in ("batches", "bytes", "received_bytes")] == [0, 0, 0]


@pytest.mark.parametrize(("statement", "error"), FAULTS)
def test_after_a_fault_the_spool_works_again(
    faulty: Spool, connections: Connections, statement: str, error: Exception
) -> None:
    connections.last.failing, connections.last.error = statement, error
    wait([faulty.append(ID, 0, 0, DATA)], DEADLINE_S)
    connections.last.failing = None
    assert faulty.append(ID, 0, 0, DATA).result(DEADLINE_S) == len(DATA)
    assert spooled(faulty) == [(0, 0, DATA)]


def test_a_failing_commit_fails_all_who_shared_it(faulty: Spool, connections: Connections) -> None:
    futures = held_back(faulty, connections)
    connections.last.failing = "COMMIT"
    connections.last.released.set()
    wait(futures, DEADLINE_S)
    assert {type(future.exception()) for future in futures} == {sqlite3.OperationalError}


def test_a_producer_whose_commit_failed_is_not_taken_for_the_next_one(
    faulty: Spool, connections: Connections
) -> None:
    connections.last.held_back = "COMMIT"
    faulty.append(ID, 0, 0, DATA)
    assert connections.last.reached.wait(DEADLINE_S)
    failed = faulty.open_producer(producer(1), {}), faulty.statistics()
    connections.last.failing = "COMMIT"
    connections.last.released.set()
    wait(failed, DEADLINE_S)
    connections.last.failing = None
    faulty.open_producer(producer(2), {}).result()
    listed = faulty.statistics().result()["producers"]
    assert [one["info"].rank for one in listed] == [0, 2]


def test_a_rollback_that_fails_too_does_not_end_the_spool(
    faulty: Spool, connections: Connections
) -> None:
    connections.last.error = sqlite3.OperationalError("disk I/O error")
    original = connections.last.execute

    def execute(sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql in ("COMMIT", "ROLLBACK"):
            raise connections.last.error
        return original(sql, *arguments)

    connections.last.execute = execute  # type: ignore[method-assign]
    wait([faulty.append(ID, 0, 0, DATA)], DEADLINE_S)
    del connections.last.execute
    # The transaction that could not be rolled back costs one more attempt.
    assert faulty.append(ID, 0, 0, DATA).exception(DEADLINE_S) is not None
    assert faulty.append(ID, 0, 0, DATA).result(DEADLINE_S) == len(DATA)
    assert spooled(faulty) == [(0, 0, DATA)]


def test_delivered_that_cannot_be_committed_leaves_the_range(
    faulty: Spool, connections: Connections
) -> None:
    faulty.append(ID, 0, 0, DATA).result()
    last = delivery(faulty).id.last
    connections.last.failing = "DELETE"
    with pytest.raises(sqlite3.OperationalError):
        faulty.delivered("store", last).result(DEADLINE_S)
    connections.last.failing = None
    assert (spooled(faulty), faulty.statistics().result()["bytes"]) == ([(0, 0, DATA)], len(DATA))


def test_a_job_that_nobody_waits_for_any_more_does_not_end_the_spool(
    faulty: Spool, connections: Connections
) -> None:
    connections.last.held_back = "COMMIT"
    under_way = faulty.append(ID, 0, 0, DATA)
    assert connections.last.reached.wait(DEADLINE_S)
    waiting = faulty.append(ID, 1, 0, DATA)
    for future in (under_way, waiting):
        future.cancel()
    connections.last.released.set()
    assert faulty.append(ID, 2, 0, DATA).result(DEADLINE_S) == len(DATA)


# --- kill -9


# Prints "<rank> <offset>" for what was acknowledged, over several processes, each killed after a
# random number.
APPEND_UNTIL_KILLED = """
import os, random, signal, sys, threading
from pathlib import Path
from tests.agent.samples import producer
from trackagent.agent.spool import Spool
def append_for_ever():
    spool = Spool(Path(sys.argv[1]), max_bytes=1 << 30)
    def go_on(rank):
        info = producer(rank)
        at = spool.open_producer(info, {}).result().get(0, 0)
        while True:
            data = b"".join((at + 8 * n).to_bytes(8, "little") for n in range(40))
            at = spool.append(info.producer_id, 0, at, data).result()
            os.write(1, f"{rank} {at}\\n".encode())
    for rank in range(3):
        threading.Thread(target=go_on, args=(rank,)).start()
for seed in range(10):
    received, written = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(written, 1)
        append_for_ever()
        signal.pause()
    os.close(written)
    with open(received) as lines:
        for _ in range(random.Random(seed).randrange(1, 60)):
            print(lines.readline(), end="")
        os.kill(child, signal.SIGKILL)
        print(lines.read(), end="")
    os.waitpid(child, 0)
"""


def test_no_acknowledged_batch_is_lost_when_the_process_is_killed(
    open_spool: OpenSpool, folders: Folders
) -> None:
    folders.state.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", APPEND_UNTIL_KILLED, folders.state / "spool.db"],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    acknowledged: dict[int, int] = {}
    for line in done.stdout.splitlines():
        rank, at = map(int, line.split())
        acknowledged[rank] = max(acknowledged.get(rank, 0), at)
    spool = open_spool()
    spool.add_sink("store").result()
    kept: dict[int, bytes] = {}
    for batch in delivery(spool).batches:
        rank = batch.producer.rank
        assert batch.first_offset == len(kept.get(rank, b""))
        kept[rank] = kept.get(rank, b"") + batch.journal_bytes
    # Each 8 bytes say at which offset of the lane they were written.
    assert {
        rank: all(
            int.from_bytes(data[at : at + 8], "little") == at for at in range(0, len(data), 8)
        )
        and len(data) >= acknowledged[rank]
        for rank, data in kept.items()
    } == dict.fromkeys(acknowledged, True)
