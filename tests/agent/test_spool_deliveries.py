"""What sinks get of the spool: the same range until it is delivered."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys

from tests.agent.samples import producer
from tests.agent.spools import (
    ANY_SIZE,
    DATA,
    ID,
    OpenSpool,
    appended,
    delivery,
    ranges,
    spooled,
)
from tests.fakes import DEADLINE_S, Folders
from trackagent.agent.spool import (
    Spool,
)

LONG_S = 3600.0


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


def test_what_a_sink_has_yet_to_get_stays_while_its_cursor_is_lost(
    opened: Spool, folders: Folders
) -> None:
    opened.add_sink("copy").result()
    appended(opened, 1)
    with contextlib.closing(sqlite3.connect(folders.state / "spool.db")) as other, other:
        other.execute("DELETE FROM sinks WHERE name = 'copy'")
    opened.delivered("store", delivery(opened).id.last).result()
    opened.add_sink("copy").result()
    assert spooled(opened, "copy") == [(0, 0, DATA)]


def test_a_patient_delivery_has_what_arrives_meanwhile(opened: Spool) -> None:
    found = opened.next_delivery("store", ANY_SIZE, patience_s=LONG_S)
    opened.append(ID, 0, 0, DATA)
    result = found.result(DEADLINE_S)
    assert result is not None
    assert ranges(result) == [(0, 0, DATA)]


def test_a_patient_delivery_comes_when_nothing_arrives(opened: Spool) -> None:
    appended(opened, 1)
    assert opened.next_delivery("store", ANY_SIZE, patience_s=0.01).result(DEADLINE_S) is not None


def test_a_patient_word_of_a_delivery_shares_the_commit_of_what_arrives(opened: Spool) -> None:
    appended(opened, 1)
    last = delivery(opened).id.last
    said = opened.delivered("store", last, patience_s=LONG_S)
    opened.append(ID, 0, len(DATA), DATA)
    said.result(DEADLINE_S)
    assert spooled(opened) == [(0, len(DATA), DATA)]


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
