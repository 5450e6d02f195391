"""The spool: durable when it says so, every byte once, the same range until it is delivered."""

from __future__ import annotations

import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.agent.samples import LOSS_KEYS, Connections, losses, metrics, producer, schema
from tests.fakes import DEADLINE_S, Folders, short_folder
from trackagent.agent import spool as spool_module
from trackagent.agent.spool import (
    AGENT_LANE,
    Delivery,
    OutOfOrder,
    Spool,
    SpoolError,
    SpoolFull,
    UnknownProducer,
)
from trackagent.client import record

OpenSpool = Callable[..., Spool]
ANY_SIZE = 1 << 30
DATA = losses(range(4))
ID = producer().producer_id


@pytest.fixture
def connections() -> Connections:
    return Connections()


@pytest.fixture
def opened(spool: Spool) -> Spool:
    """A spool that knows the producer and has a sink."""
    spool.open_producer(producer(), {}).result()
    spool.add_sink("store").result()
    return spool


def delivery(spool: Spool, sink: str = "store", max_bytes: int = ANY_SIZE) -> Delivery:
    found = spool.next_delivery(sink, max_bytes).result()
    assert found is not None
    return found


def ranges(found: Delivery) -> list[tuple[int, int, bytes]]:
    """(lane, offset, bytes) of each batch."""
    return [(one.lane, one.first_offset, one.journal_bytes) for one in found.batches]


def spooled(spool: Spool, sink: str = "store") -> list[tuple[int, int, bytes]]:
    """Everything that waits for a sink."""
    found = spool.next_delivery(sink, ANY_SIZE).result()
    return [] if found is None else ranges(found)


# --- appending


def test_append_tells_up_to_where_the_lane_is_committed(opened: Spool) -> None:
    assert opened.append(ID, 0, 0, DATA).result() == len(DATA)


def test_what_is_appended_is_delivered_as_it_came(opened: Spool) -> None:
    opened.append(ID, 3, 0, DATA).result()
    assert ranges(delivery(opened)) == [(3, 0, DATA)]


def test_a_delivered_batch_names_its_producer(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    assert delivery(opened).batches[0].producer == producer()


def test_a_repeated_range_is_kept_once(opened: Spool) -> None:
    for _ in range(3):
        assert opened.append(ID, 0, 0, DATA).result() == len(DATA)
    assert spooled(opened) == [(0, 0, DATA)]


def test_of_an_overlapping_range_only_what_is_new_is_kept(opened: Spool) -> None:
    more = metrics(0, 9, 1.0, 2.0)
    opened.append(ID, 0, 0, DATA).result()
    assert opened.append(ID, 0, 0, DATA + more).result() == len(DATA + more)
    assert spooled(opened) == [(0, 0, DATA), (0, len(DATA), more)]


def test_a_range_inside_what_is_committed_changes_nothing(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    assert opened.append(ID, 0, 8, DATA[8:-8]).result() == len(DATA)
    assert spooled(opened) == [(0, 0, DATA)]


def test_a_gap_is_refused(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    with pytest.raises(OutOfOrder, match=f"goes on at {len(DATA)}, the batch begins at"):
        opened.append(ID, 0, len(DATA) + 8, DATA).result()


def test_after_a_refused_gap_the_lane_goes_on_where_it_was(opened: Spool) -> None:
    with pytest.raises(OutOfOrder):
        opened.append(ID, 0, 8, DATA).result()
    assert opened.append(ID, 0, 0, DATA).result() == len(DATA)


def test_bytes_of_an_unknown_producer_are_refused(spool: Spool) -> None:
    with pytest.raises(UnknownProducer, match="OpenRun"):
        spool.append(ID, 0, 0, DATA).result()


def test_lanes_are_counted_apart(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    opened.append(ID, 1, 0, DATA + DATA).result()
    assert opened.committed(ID).result() == {0: len(DATA), 1: 2 * len(DATA)}


def test_producers_are_counted_apart(opened: Spool) -> None:
    opened.open_producer(producer(1), {}).result()
    opened.append(ID, 0, 0, DATA).result()
    assert opened.committed(producer(1).producer_id).result() == {}


def test_opening_again_tells_what_is_committed(opened: Spool) -> None:
    opened.append(ID, 2, 0, DATA).result()
    assert opened.open_producer(producer(), {}).result() == {2: len(DATA)}


def test_a_new_producer_that_holds_only_later_bytes_goes_on_from_there(spool: Spool) -> None:
    assert spool.open_producer(producer(), {0: 4096}).result()[0] == 4096
    spool.append(ID, 0, 4096, DATA).result()
    spool.add_sink("store").result()
    assert spooled(spool)[1:] == [(0, 4096, DATA)]


def test_what_another_spool_has_of_a_new_producer_is_told_in_the_run(spool: Spool) -> None:
    spool.open_producer(producer(), {0: 4096, 1: 0}).result()
    spool.add_sink("store").result()
    ((lane, _, told),) = spooled(spool)
    event = record.decode(told, 0)
    assert (lane, event.kind, (event.data or {})["before"]) == (
        AGENT_LANE,
        record.Kind.EVENT,
        {"0": 4096},
    )


def test_bytes_that_a_known_producer_no_longer_holds_are_told_in_the_run(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    opened.open_producer(producer(), {0: len(DATA) + 800}).result()
    [_, told] = delivery(opened).batches
    event, loss = (
        record.decode(told.journal_bytes, at) for at in record.scan(told.journal_bytes).offsets
    )
    assert (event.data or {})["message"].startswith(
        f"800 bytes of lane 0 before offset {len(DATA) + 800}"
    )
    assert (told.lane, loss.kind, loss.data) == (
        AGENT_LANE,
        record.Kind.LOSS,
        {"lost with a damaged spool": 1},
    )


def test_holding_less_than_is_committed_changes_nothing(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    assert opened.open_producer(producer(), {0: 8}).result() == {0: len(DATA)}


def test_the_keys_of_a_schema_are_known_as_soon_as_it_is_committed(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    assert opened.keys(1, 0) == LOSS_KEYS


def test_the_keys_of_a_schema_are_known_after_its_bytes_are_gone(open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.open_producer(producer(), {}).result()
    spool.add_sink("store").result()
    spool.append(ID, 0, 0, DATA).result()
    spool.delivered("store", delivery(spool).id.last).result()
    spool.close()
    assert open_spool().keys(1, 0) == LOSS_KEYS


def test_a_schema_that_never_came_has_no_keys(opened: Spool) -> None:
    assert opened.keys(1, 77) is None


def test_a_schema_that_comes_late_is_found(opened: Spool) -> None:
    assert opened.keys(1, 5) is None
    opened.append(ID, 0, 0, schema(5, "late")).result()
    assert opened.keys(1, 5) == ("late",)


def test_the_agents_own_records_go_into_a_lane_of_their_own(opened: Spool) -> None:
    opened.append_own(ID, DATA).result()
    opened.append_own(ID, DATA).result()
    assert spooled(opened) == [(AGENT_LANE, 0, DATA), (AGENT_LANE, len(DATA), DATA)]


def test_own_records_appended_at_once_are_all_kept(opened: Spool) -> None:
    threads = [
        threading.Thread(target=lambda: opened.append_own(ID, DATA).result()) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened.committed(ID).result() == {AGENT_LANE: 20 * len(DATA)}


def test_an_own_record_of_an_unknown_producer_is_refused(spool: Spool) -> None:
    with pytest.raises(UnknownProducer):
        spool.append_own(ID, DATA).result()


def test_the_bytes_received_count_what_is_new(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    opened.append(ID, 0, 0, DATA).result()
    assert opened.statistics().result()["received_bytes"] == len(DATA)


# --- reopening


def test_what_was_committed_is_there_after_reopening(open_spool: OpenSpool) -> None:
    first = open_spool()
    first.open_producer(producer(), {}).result()
    first.append(ID, 0, 0, DATA).result()
    first.close()
    second = open_spool()
    second.add_sink("store").result()
    assert spooled(second) == [(0, 0, DATA)]


def test_the_origin_stays(open_spool: OpenSpool) -> None:
    first = open_spool()
    first.close()
    assert open_spool().origin == first.origin


def test_two_spools_have_different_origins(tmp_path: Path) -> None:
    spools = [Spool(tmp_path / name, max_bytes=1) for name in ("a.db", "b.db")]
    for spool in spools:
        spool.close()
    assert spools[0].origin != spools[1].origin


def test_bytes_and_batches_are_counted_anew_after_reopening(open_spool: OpenSpool) -> None:
    first = open_spool()
    first.open_producer(producer(), {}).result()
    first.append(ID, 0, 0, DATA).result()
    first.close()
    statistics = open_spool().statistics().result()
    assert (statistics["batches"], statistics["bytes"]) == (1, len(DATA))


def test_bytes_delivered_first_thing_after_reopening_are_counted_down(
    open_spool: OpenSpool,
) -> None:
    first = open_spool()
    first.open_producer(producer(), {}).result()
    first.add_sink("store").result()
    first.append(ID, 0, 0, DATA).result()
    first.close()
    second = open_spool()
    second.delivered("store", delivery(second).id.last).result()
    assert second.statistics().result()["bytes"] == 0


def test_the_file_is_for_its_owner_alone(opened: Spool, folders: Folders) -> None:
    opened.append(ID, 0, 0, DATA).result()
    files = [folders.state / f"spool.db{suffix}" for suffix in ("", "-wal", "-shm")]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 3


def test_a_spool_of_a_newer_version_is_refused_with_what_to_do(
    open_spool: OpenSpool, folders: Folders
) -> None:
    open_spool().close()
    with sqlite3.connect(folders.state / "spool.db") as connection:
        connection.execute("PRAGMA user_version = 99")
        connection.execute("DROP TABLE spool")
        connection.execute("DROP TABLE spool_copy")
    connection.close()
    with pytest.raises(SpoolError, match=r"spool\.db has version 99.*the trackagent that wrote it"):
        open_spool()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match=r"cannot open the spool .*nowhere"):
        Spool(tmp_path / "nowhere" / "spool.db", max_bytes=1)


@pytest.mark.parametrize("done", range(10))
def test_a_process_that_dies_while_the_spool_is_made_does_not_block_the_next(
    open_spool: OpenSpool, folders: Folders, done: int
) -> None:
    """`done`: statements of the schema that were carried out before the end."""

    class Dying(sqlite3.Connection):
        left = done

        def set_trace(self) -> None:
            self.set_authorizer(self.check)

        def check(self, action: int, *_: Any) -> int:
            if action in (sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_INSERT):
                self.left -= 1
            return sqlite3.SQLITE_OK if self.left >= 0 else sqlite3.SQLITE_DENY

    def connect(path: Path, **keywords: Any) -> sqlite3.Connection:
        connection = sqlite3.connect(path, factory=Dying, **keywords)
        connection.set_trace()
        return connection

    with pytest.raises(SpoolError, match="not authorized"):
        open_spool(connect=connect)
    assert open_spool().statistics().result()["batches"] == 0


@pytest.fixture
def forgetful(opened: Spool, monkeypatch: pytest.MonkeyPatch) -> Spool:
    """A spool to which every end is long ago."""
    monkeypatch.setattr(spool_module, "FORGET_AFTER_S", -1)
    return opened


def test_a_producer_that_ended_long_ago_is_forgotten(forgetful: Spool) -> None:
    forgetful.append(ID, 0, 0, DATA).result()
    forgetful.delivered("store", delivery(forgetful).id.last).result()
    forgetful.end_producer(ID).result()
    forgetful.forget_ended([]).result()
    assert forgetful.committed(ID).result() == {}


def test_a_producer_whose_journal_may_come_again_is_not_forgotten(forgetful: Spool) -> None:
    forgetful.append(ID, 0, 0, DATA).result()
    forgetful.delivered("store", delivery(forgetful).id.last).result()
    forgetful.end_producer(ID).result()
    forgetful.forget_ended([ID]).result()
    assert forgetful.committed(ID).result() == {0: len(DATA)}


def test_a_producer_whose_bytes_wait_is_not_forgotten(forgetful: Spool) -> None:
    forgetful.append(ID, 0, 0, DATA).result()
    forgetful.end_producer(ID).result()
    forgetful.forget_ended([]).result()
    forgetful.add_sink("store").result()
    assert delivery(forgetful).batches[0].producer == producer()


def test_a_producer_that_has_not_ended_is_not_forgotten(forgetful: Spool) -> None:
    forgetful.append(ID, 0, 0, DATA).result()
    forgetful.delivered("store", delivery(forgetful).id.last).result()
    forgetful.forget_ended([]).result()
    assert forgetful.committed(ID).result() == {0: len(DATA)}


def test_keys_told_at_the_opening_are_known(spool: Spool) -> None:
    spool.open_producer(producer(), {0: 800}, [schema(3, "loss")]).result()
    spool.add_sink("store").result()
    spool.append(ID, 0, 800, metrics(3, 7, 1.0)).result()
    assert spool.keys(delivery(spool).batches[0].producer_number, 3) == ("loss",)


def test_the_file_shrinks_after_a_backlog(opened: Spool, folders: Folders) -> None:
    opened.add_sink("store").result()
    piece = losses(range(10_000))
    for index in range(40):
        opened.append(ID, 0, index * len(piece), piece).result()
    while (waiting := opened.next_delivery("store", 1).result()) is not None:
        opened.delivered("store", waiting.id.last).result()
    opened.close()
    [path] = folders.state.glob("*.db")
    assert path.stat().st_size < 40 * len(piece) / 2


# --- a damaged file


def overwritten(path: Path, start: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(random.Random(1).randbytes(length))


def many_pages(open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.open_producer(producer(), {}).result()
    spool.append(ID, 0, 0, losses(range(4000))).result()
    spool.close()


@pytest.mark.parametrize(
    ("start", "length", "left"),
    [(0, 4096, 1), (4096, 8192, 0), (80_000, 40_000, 1)],
    ids=["head", "start", "middle"],
)
def test_a_damaged_spool_does_not_block_a_start(
    open_spool: OpenSpool, folders: Folders, start: int, length: int, left: int
) -> None:
    many_pages(open_spool)
    overwritten(folders.state / "spool.db", start, length)
    assert open_spool().statistics().result()["batches"] == left


def test_a_damaged_spool_is_set_aside_as_it_was(open_spool: OpenSpool, folders: Folders) -> None:
    many_pages(open_spool)
    overwritten(folders.state / "spool.db", 0, 4096)
    damaged = (folders.state / "spool.db").read_bytes()
    open_spool()
    aside = list((folders.state / "quarantine").glob("*-spool.db"))
    assert [path.read_bytes() for path in aside] == [damaged]


def test_the_reason_lies_beside_a_spool_that_was_set_aside(
    open_spool: OpenSpool, folders: Folders
) -> None:
    many_pages(open_spool)
    overwritten(folders.state / "spool.db", 0, 4096)
    open_spool()
    (reason,) = (folders.state / "quarantine").glob("*.reason")
    assert reason.read_text().startswith(
        "file is not a database of this program (byte 0 of its head);"
    )


def test_the_log_of_a_damaged_spool_is_set_aside_with_it(
    open_spool: OpenSpool, folders: Folders
) -> None:
    many_pages(open_spool)
    # As long as somebody else has the file open, SQLite does not delete its log.
    other = sqlite3.connect(folders.state / "spool.db")
    other.execute("CREATE TABLE other (x)")
    log = (folders.state / "spool.db-wal").read_bytes()
    overwritten(folders.state / "spool.db", 0, 4096)
    open_spool()
    aside = list((folders.state / "quarantine").glob("*-spool.db-wal"))
    other.close()
    assert [path.read_bytes()[: len(log)] for path in aside] == [log]


def test_a_spool_set_aside_is_told_with_its_place(
    open_spool: OpenSpool, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    many_pages(open_spool)
    overwritten(folders.state / "spool.db", 0, 4096)
    open_spool()
    (aside,) = (folders.state / "quarantine").glob("*-spool.db")
    assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == [
        f"{folders.state / 'spool.db'} is unreadable (file is not a database of this program (byte 0 of its "
        "head); 1 batches and 1 producers are brought over, known to be missing: nothing): set aside as "
        f"{aside}"
    ]


def test_a_spool_on_a_failing_disk_is_not_set_aside(
    open_spool: OpenSpool, folders: Folders, connections: Connections
) -> None:
    open_spool().close()

    def connect(path: Path, **keywords: Any) -> sqlite3.Connection:
        connection = connections(path, **keywords)
        connections.last.failing = "PRAGMA synchronous"
        connections.last.error = sqlite3.OperationalError("disk I/O error")
        return connection

    with pytest.raises(SpoolError, match="disk I/O error"):
        open_spool(connect=connect)
    assert not (folders.state / "quarantine").exists()


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


# --- the limit


def test_a_full_spool_refuses_and_says_why(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=len(DATA))
    spool.open_producer(producer(), {}).result()
    spool.append(ID, 0, 0, DATA).result()
    with pytest.raises(SpoolFull, match=f"holds {len(DATA)} bytes, its limit is {len(DATA)}"):
        spool.append(ID, 0, len(DATA), DATA).result()


def test_a_full_spool_still_knows_what_it_has(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=len(DATA))
    spool.open_producer(producer(), {}).result()
    spool.append(ID, 0, 0, DATA).result()
    assert spool.append(ID, 0, 0, DATA).result() == len(DATA)


def test_a_full_spool_has_room_again_once_its_bytes_are_delivered(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=len(DATA))
    spool.open_producer(producer(), {}).result()
    spool.add_sink("store").result()
    spool.append(ID, 0, 0, DATA).result()
    spool.delivered("store", delivery(spool).id.last).result()
    assert spool.append(ID, 0, len(DATA), DATA).result() == 2 * len(DATA)


def test_a_spool_is_full_after_reopening_too(open_spool: OpenSpool) -> None:
    first = open_spool(max_bytes=len(DATA))
    first.open_producer(producer(), {}).result()
    first.append(ID, 0, 0, DATA).result()
    first.close()
    with pytest.raises(SpoolFull):
        open_spool(max_bytes=len(DATA)).append(ID, 0, len(DATA), DATA).result()


# --- deliveries


def appended(spool: Spool, count: int) -> None:
    """`count` batches of one lane, after those of before."""
    begin = spool.committed(ID).result().get(0, 0)
    for number in range(count):
        spool.append(ID, 0, begin + number * len(DATA), DATA).result()


def test_a_sink_that_has_everything_gets_nothing(opened: Spool) -> None:
    assert opened.next_delivery("store", ANY_SIZE).result() is None


def test_a_delivery_holds_about_as_many_bytes_as_asked_for(opened: Spool) -> None:
    appended(opened, 5)
    assert len(delivery(opened, max_bytes=2 * len(DATA)).batches) == 2


def test_a_delivery_holds_one_batch_at_least(opened: Spool) -> None:
    appended(opened, 2)
    assert len(delivery(opened, max_bytes=1).batches) == 1


def test_the_range_stays_the_same_until_it_is_delivered(opened: Spool) -> None:
    appended(opened, 1)
    first = delivery(opened)
    appended(opened, 3)
    assert delivery(opened) == first


def test_the_range_stays_the_same_whatever_size_is_asked_for(opened: Spool) -> None:
    appended(opened, 5)
    first = delivery(opened, max_bytes=3 * len(DATA))
    assert delivery(opened, max_bytes=1) == first


def test_the_range_stays_the_same_after_reopening(open_spool: OpenSpool) -> None:
    first = open_spool()
    first.open_producer(producer(), {}).result()
    first.add_sink("store").result()
    appended(first, 1)
    planned = delivery(first)
    appended(first, 1)
    first.close()
    assert delivery(open_spool()) == planned


PLAN_AND_DIE = """
import os, sys
from pathlib import Path
from trackagent.agent.spool import Spool
spool = Spool(Path(sys.argv[1]), max_bytes=1 << 30)
planned = spool.next_delivery("store", 1).result()
os.write(1, f"{planned.id.origin} {planned.id.first} {planned.id.last}".encode())
os._exit(9)
"""


def test_the_range_stays_the_same_after_the_process_died_delivering_it(
    open_spool: OpenSpool, folders: Folders
) -> None:
    first = open_spool()
    first.open_producer(producer(), {}).result()
    first.add_sink("store").result()
    appended(first, 2)
    first.close()
    died = subprocess.run(
        [sys.executable, "-c", PLAN_AND_DIE, folders.state / "spool.db"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    planned = delivery(open_spool()).id
    assert died.stdout == f"{planned.origin} {planned.first} {planned.last}"
    assert (planned.first, planned.last) == (1, 1)


def test_ranges_follow_each_other_without_a_gap(opened: Spool) -> None:
    appended(opened, 4)
    found = []
    for _ in range(4):
        one = delivery(opened, max_bytes=1)
        found.append((one.id.first, one.id.last))
        opened.delivered("store", one.id.last).result()
    assert found == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_numbers_are_not_used_again_when_everything_was_delivered(open_spool: OpenSpool) -> None:
    first = open_spool()
    first.open_producer(producer(), {}).result()
    first.add_sink("store").result()
    appended(first, 1)
    before = delivery(first).id
    first.delivered("store", before.last).result()
    first.close()
    second = open_spool()
    appended(second, 1)
    assert delivery(second).id.first == before.last + 1


def test_each_sink_has_a_cursor_of_its_own(opened: Spool) -> None:
    opened.add_sink("copy").result()
    appended(opened, 2)
    opened.delivered("copy", delivery(opened, "copy", 1).id.last).result()
    assert [len(spooled(opened, name)) for name in ("copy", "store")] == [1, 2]


def test_a_new_sink_starts_with_the_oldest_batch_there_is(opened: Spool) -> None:
    appended(opened, 2)
    opened.delivered("store", delivery(opened, max_bytes=1).id.last).result()
    opened.add_sink("copy").result()
    assert delivery(opened, "copy").id.first == 2


def test_a_new_sink_of_an_emptied_spool_gets_what_comes_next(opened: Spool) -> None:
    appended(opened, 2)
    opened.delivered("store", delivery(opened).id.last).result()
    opened.add_sink("copy").result()
    appended(opened, 1)
    assert (delivery(opened, "copy").id.first, delivery(opened, "copy").id.last) == (3, 3)


def test_adding_a_known_sink_leaves_its_cursor(opened: Spool) -> None:
    opened.add_sink("slow").result()
    appended(opened, 2)
    opened.delivered("store", delivery(opened, max_bytes=1).id.last).result()
    opened.add_sink("store").result()
    assert delivery(opened).id.first == 2


def batches_left(spool: Spool) -> int:
    return int(spool.statistics().result()["batches"])


def test_batches_stay_until_the_slowest_sink_has_them(opened: Spool) -> None:
    opened.add_sink("slow").result()
    appended(opened, 3)
    opened.delivered("store", delivery(opened).id.last).result()
    assert batches_left(opened) == 3


def test_batches_are_deleted_once_every_sink_has_them(opened: Spool) -> None:
    opened.add_sink("slow").result()
    appended(opened, 3)
    opened.delivered("store", delivery(opened).id.last).result()
    opened.delivered("slow", delivery(opened, "slow", 1).id.last).result()
    assert batches_left(opened) == 2


def test_bytes_are_counted_down_when_batches_are_deleted(opened: Spool) -> None:
    appended(opened, 3)
    opened.delivered("store", delivery(opened, max_bytes=1).id.last).result()
    assert opened.statistics().result()["bytes"] == 2 * len(DATA)


def test_batches_behind_are_counted_for_each_sink(opened: Spool) -> None:
    opened.add_sink("slow").result()
    appended(opened, 3)
    opened.delivered("store", delivery(opened, max_bytes=1).id.last).result()
    sinks = opened.statistics().result()["sinks"]
    assert {sink["name"]: sink["batches_behind"] for sink in sinks} == {"slow": 3, "store": 2}


def test_rejected_ranges_are_counted_for_their_sink(open_spool: OpenSpool) -> None:
    first = open_spool()
    first.open_producer(producer(), {}).result()
    first.add_sink("store").result()
    appended(first, 3)
    for rejected in (True, False, True):
        one = delivery(first, max_bytes=1)
        first.delivered("store", one.id.last, rejected=rejected).result()
    first.close()
    sinks = open_spool().statistics().result()["sinks"]
    assert sinks == [{"name": "store", "batches_behind": 0, "rejected": 2}]


def test_producers_that_have_ended_are_not_listed(opened: Spool) -> None:
    opened.open_producer(producer(1), {}).result()
    opened.end_producer(ID).result()
    listed = opened.statistics().result()["producers"]
    assert listed == [{"info": producer(1), "committed_bytes": 0}]


# --- waiting


def test_waiting_ends_when_something_is_appended(opened: Spool) -> None:
    seen = opened.wait(0, 0)
    found: list[int] = []
    waiter = threading.Thread(target=lambda: found.append(opened.wait(seen, DEADLINE_S)))
    waiter.start()
    opened.append(ID, 0, 0, DATA).result()
    waiter.join(DEADLINE_S)
    assert found == [seen + 1]


def test_what_was_appended_before_the_wait_ends_it_at_once(opened: Spool) -> None:
    seen = opened.wait(0, 0)
    opened.append(ID, 0, 0, DATA).result()
    began = time.monotonic()
    opened.wait(seen, DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S / 2


def test_a_repeated_range_wakes_nobody(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    opened.committed(ID).result()  # the append's thread has told those who wait
    seen = opened.wait(0, 0)
    opened.append(ID, 0, 0, DATA).result()
    opened.committed(ID).result()
    assert opened.wait(seen, 0) == seen


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


# --- against a plain list


class SpoolAgainstLists(RuleBasedStateMachine):
    """Any order of appends, repetitions, deliveries and reopenings, against lists in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = short_folder()
        self.spool = self.opened()
        self.lanes: dict[tuple[int, int], bytes] = {}
        self.batches: list[tuple[int, int, int, bytes]] = []  # rank, lane, first offset, bytes
        self.cursors: dict[str, int] = {}
        self.plans: dict[str, int] = {}
        self.written = 0

    def opened(self) -> Spool:
        return Spool(self.folder / "spool.db", max_bytes=1 << 30, linger_s=0)

    def teardown(self) -> None:
        self.spool.close()
        shutil.rmtree(self.folder)

    @initialize()
    def add_store(self) -> None:
        self.add_sink("store")

    @rule(name=st.sampled_from(["store", "copy"]))
    def add_sink(self, name: str) -> None:
        self.spool.add_sink(name).result()
        self.cursors.setdefault(name, min(self.cursors.values(), default=0))

    @rule(rank=st.integers(0, 2), lane=st.integers(0, 1), words=st.integers(1, 8))
    def append(self, rank: int, lane: int, words: int) -> None:
        self.spool.open_producer(producer(rank), {}).result()
        before = self.lanes.get((rank, lane), b"")
        fresh = b"".join(self.word() for _ in range(words))
        end = self.spool.append(producer(rank).producer_id, lane, len(before), fresh).result()
        assert end == len(before + fresh)
        self.batches.append((rank, lane, len(before), fresh))
        self.lanes[rank, lane] = before + fresh

    def word(self) -> bytes:
        self.written += 1
        return self.written.to_bytes(8, "little")

    @precondition(lambda self: self.lanes)
    @rule(data=st.data())
    def append_again(self, data: st.DataObject) -> None:
        (rank, lane), known = data.draw(st.sampled_from(sorted(self.lanes.items())))
        start = data.draw(st.integers(0, len(known) // 8)) * 8
        fresh = data.draw(st.sampled_from([b"", self.word()]))
        repeated = known[start:] + fresh
        end = self.spool.append(producer(rank).producer_id, lane, start, repeated).result()
        assert end == len(known + fresh)
        if fresh:
            self.batches.append((rank, lane, len(known), fresh))
            self.lanes[rank, lane] = known + fresh

    @precondition(lambda self: self.lanes)
    @rule(data=st.data(), words=st.integers(1, 3))
    def append_after_a_gap(self, data: st.DataObject, words: int) -> None:
        (rank, lane), known = data.draw(st.sampled_from(sorted(self.lanes.items())))
        future = self.spool.append(
            producer(rank).producer_id, lane, len(known) + 8 * words, self.word()
        )
        assert isinstance(future.exception(), OutOfOrder)

    @rule(data=st.data(), max_bytes=st.integers(1, 200), accept=st.booleans())
    def deliver(self, data: st.DataObject, max_bytes: int, accept: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.cursors)))
        cursor = self.cursors[name]
        found = self.spool.next_delivery(name, max_bytes).result()
        if found is None:
            assert cursor == len(self.batches)
            return
        last = self.plans.setdefault(name, found.id.last)
        assert (found.id.first, found.id.last) == (cursor + 1, last)
        assert [
            (batch.producer.rank, batch.lane, batch.first_offset, batch.journal_bytes)
            for batch in found.batches
        ] == self.batches[cursor:last]
        if accept:
            self.spool.delivered(name, last).result()
            self.cursors[name] = self.plans.pop(name)

    @rule()
    def reopen(self) -> None:
        self.spool.close()
        self.spool = self.opened()

    @invariant()
    def only_what_no_sink_needs_is_deleted(self) -> None:
        if not self.cursors:
            return
        kept = self.batches[min(self.cursors.values()) :]
        statistics = self.spool.statistics().result()
        assert (statistics["batches"], statistics["bytes"]) == (
            len(kept),
            sum(len(batch[3]) for batch in kept),
        )


TestSpoolAgainstLists = SpoolAgainstLists.TestCase
TestSpoolAgainstLists.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
