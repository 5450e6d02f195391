"""The spool: every byte once, and the same after it was opened again."""

from __future__ import annotations

import sqlite3
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.agent.samples import LOSS_KEYS, losses, metrics, producer, schema
from tests.agent.spools import DATA, ID, OpenSpool, delivery, ranges, spooled
from tests.fakes import DEADLINE_S, Folders
from trackagent.agent import spool as spool_module
from trackagent.agent.decode import decode
from trackagent.agent.spool import (
    AGENT_LANE,
    OutOfOrder,
    Spool,
    SpoolError,
    SpoolFull,
    UnknownProducer,
)
from trackagent.client import record

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
    origin = first.add_sink("store").result()
    first.close()
    assert open_spool().add_sink("another").result() == origin


def test_two_spools_have_different_origins(tmp_path: Path) -> None:
    spools = [Spool(tmp_path / name, max_bytes=1) for name in ("a.db", "b.db")]
    one, other = (spool.add_sink("store").result() for spool in spools)
    for spool in spools:
        spool.close()
    assert one != other


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


def test_what_comes_after_a_producer_was_forgotten_is_not_taken_for_its_own(
    forgetful: Spool,
) -> None:
    for rank, key in enumerate(["loss", "accuracy"]):
        who = producer(rank)
        data = schema(0, key) + metrics(0, 1, 0.5)
        forgetful.open_producer(who, {}).result()
        forgetful.append(who.producer_id, 0, 0, data).result()
        found = delivery(forgetful)
        [points] = decode(found, forgetful.keys).points
        assert (points.producer_id, points.keys) == (who.producer_id, (key,))
        forgetful.delivered("store", found.id.last).result()
        forgetful.end_producer(who.producer_id).result()
        forgetful.forget_ended([]).result()


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
