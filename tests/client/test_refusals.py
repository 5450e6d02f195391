"""What a run refuses is counted by its reason, and the place of the hole is in the journal."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.fakes import Folders, holes, logged_records, next_line, said, start_script, wait_until
from trackagent.client import record
from trackagent.client.errors import JournalError
from trackagent.client.journal import Journal
from trackagent.client.record import Kind
from trackagent.client.refusals import MAX_OPEN_GAPS, Refusals

SEGMENT_BYTES = 64 * 1024


@pytest.fixture
def journal(folders: Folders) -> Iterator[Journal]:
    """A journal of four small segments, without a sender."""
    made = Journal(
        {"producer_id": "00" * 16, "rank": 0},
        directory=folders.directory,
        state_directory=folders.state,
        segment_bytes=SEGMENT_BYTES,
        memory_bytes=4 * SEGMENT_BYTES,
        journal_bytes=4 * SEGMENT_BYTES,
    )
    yield made
    made.seal(0.0, "the test is over")
    made.close()


def write(refusals: Refusals, journal: Journal, *, last: bool = False) -> None:
    lane = journal.take()
    try:
        refusals.write(journal, lane, last=last)
    finally:
        journal.give(lane)


def fill(journal: Journal) -> None:
    """Logs until nothing more fits, small records included."""
    lane = journal.take()
    for size in (4000, 0):
        data = record.encode_json(Kind.TAGS, {"x": "x" * size}, step=0, time_ns=0)
        with contextlib.suppress(JournalError):
            while True:
                journal.write(lane, data)
    journal.give(lane)


def gaps(folders: Folders) -> list[tuple[Any, ...]]:
    """(reason, first step, last step, records) of each GAP record, in the order of writing."""
    names = ("reason", "first_step", "last_step", "records")
    return [tuple(data[name] for name in names) for data in said(folders, Kind.GAP)]


def last_loss(folders: Folders) -> Mapping[str, int]:
    """What the last LOSS record says, nothing where there is none."""
    return [{}, *said(folders, Kind.LOSS)][-1]


# --- what becomes a gap


def test_calls_refused_in_a_row_are_one_gap(journal: Journal, folders: Folders) -> None:
    refusals = Refusals()
    for step in (7, 8, 9):
        refusals.add("journal full", step, 100)
    write(refusals, journal)
    assert gaps(folders) == [("journal full", 7, 9, 3)]


def test_a_call_that_gets_through_ends_a_gap(journal: Journal, folders: Folders) -> None:
    refusals = Refusals()
    for step, stored in ((7, 100), (8, 100), (10, 101)):
        refusals.add("journal full", step, stored)
    write(refusals, journal)
    assert gaps(folders) == [("journal full", 7, 8, 2), ("journal full", 10, 10, 1)]


def test_each_reason_has_its_own_gap(journal: Journal, folders: Folders) -> None:
    refusals = Refusals()
    for step in range(4):
        refusals.add(("journal full", "too many calls at once")[step % 2], step, 0)
    write(refusals, journal)
    assert sorted(gaps(folders)) == [
        ("journal full", 0, 2, 2),
        ("too many calls at once", 1, 3, 2),
    ]


def test_a_refused_value_is_counted_and_no_gap(journal: Journal, folders: Folders) -> None:
    refusals = Refusals()
    refusals.add("not a number", None, 0)
    write(refusals, journal)
    assert (last_loss(folders), gaps(folders)) == ({"not a number": 1}, [])


def test_gaps_that_cannot_be_written_yet_are_few(journal: Journal, folders: Folders) -> None:
    refusals = Refusals()
    for stored in range(1000):
        refusals.add("journal full", 2 * stored, stored)
    write(refusals, journal)
    found = gaps(folders)
    assert len(found) == MAX_OPEN_GAPS
    assert sum(records for *_, records in found) == 1000
    assert (found[-1][2], last_loss(folders)) == (1998, {"journal full": 1000})


def test_what_was_written_is_not_written_again(journal: Journal, folders: Folders) -> None:
    refusals = Refusals()
    refusals.add("journal full", 7, 0)
    for _ in range(3):
        write(refusals, journal)
    assert (len(gaps(folders)), len(said(folders, Kind.LOSS)), refusals.unwritten) == (1, 1, False)


def test_a_gap_that_grows_is_written_again_as_the_same(journal: Journal, folders: Folders) -> None:
    refusals = Refusals()
    for step in (7, 8):
        refusals.add("journal full", step, 100)
        write(refusals, journal)
    first, second = said(folders, Kind.GAP)
    assert first["first_time_ns"] == second["first_time_ns"]
    assert gaps(folders) == [("journal full", 7, 7, 1), ("journal full", 7, 8, 2)]


# --- in a full journal


def test_a_full_journal_still_says_what_was_lost(journal: Journal, folders: Folders) -> None:
    fill(journal)
    refusals = Refusals()
    refusals.add("journal full", 7, 0)
    write(refusals, journal)
    assert (last_loss(folders), gaps(folders)) == (
        {"journal full": 1},
        [("journal full", 7, 7, 1)],
    )


def test_a_full_journal_says_it_at_each_doubling(journal: Journal, folders: Folders) -> None:
    fill(journal)
    refusals = Refusals()
    for step in range(1000):
        refusals.add("journal full", step, 0)
        try:
            write(refusals, journal)
        except JournalError:
            continue
    counts = [data["journal full"] for data in said(folders, Kind.LOSS)]
    assert counts == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_the_last_words_are_exact(journal: Journal, folders: Folders) -> None:
    fill(journal)
    refusals = Refusals()
    for step in range(1000):
        refusals.add("journal full", step, 0)
    write(refusals, journal)
    refusals.add("journal full", 1000, 0)
    write(refusals, journal, last=True)
    assert (last_loss(folders), gaps(folders)[-1]) == (
        {"journal full": 1001},
        ("journal full", 0, 1000, 1001),
    )


def test_last_words_have_an_end(journal: Journal) -> None:
    fill(journal)
    refusals = Refusals()
    told = 0
    with contextlib.suppress(JournalError):
        for step in range(1000):
            refusals.add("journal full", step, 0)
            write(refusals, journal, last=True)
            told = step + 1
    assert 20 < told < 100


# --- a run

FILLS = """
import sys, threading
from trackagent import client

run = client.init(experiment="full")
# The tags of git come a little later, and would be refused and counted as well.
for thread in threading.enumerate():
    if thread.name == "trackagent-git":
        thread.join()
for step in range(10_000):
    client.log({"loss": float(step)}, step=None if sys.argv[1] == "counted" else step)
print("full", flush=True)
sys.stdin.readline()
client.finish()
"""
SMALL = {"TRACKAGENT_SEGMENT_BYTES": "65536", "TRACKAGENT_JOURNAL_BYTES": str(4 * 65536)}


@pytest.mark.parametrize("steps", ["given", "counted"])
def test_a_full_journal_leaves_a_hole_where_it_was(folders: Folders, steps: str) -> None:
    with start_script(folders, FILLS, steps, **SMALL) as process:
        assert next_line(process) == "full"
        process.communicate("\n")
    kept = {one.step for one in logged_records(folders)}
    missing = holes(folders)
    assert 2000 < len(kept) < 10_000
    # Not one hole at the end, always: another lane may have had some room left.
    assert (kept | missing, kept & missing) == (set(range(10_000)), set())
    assert last_loss(folders) == {"journal full": len(missing)}


def test_a_rank_that_is_killed_with_a_full_journal_has_told_its_loss(folders: Folders) -> None:
    with start_script(folders, FILLS, "given", **SMALL) as process:
        assert next_line(process) == "full"
        lost = 10_000 - len(logged_records(folders))
        # At the next flush, all of it or at least half.
        wait_until(lambda: 2 * sum(last_loss(folders).values()) > lost, "the loss is told")
        os.kill(process.pid, signal.SIGKILL)
    kept = {one.step for one in logged_records(folders)}
    assert last_loss(folders)["journal full"] <= 10_000 - len(kept)
    assert 2 * len(holes(folders)) > lost
    assert holes(folders).isdisjoint(kept)
