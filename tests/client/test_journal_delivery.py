"""What a journal hands out to be sent, frees when it is acknowledged, and leaves at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.client.journals import (
    SEGMENT_BYTES,
    TENTH,
    disk,
    event,
    files,
    fill,
    memory,
    steps,
    take_all,
)
from tests.fakes import Folders
from trackagent.client.errors import JournalError
from trackagent.client.journal import Journal

# --- sending and acknowledging


def test_unsent_bytes_are_those_of_the_records(journal: Journal) -> None:
    fill(journal, 25)
    assert list(take_all(journal).values()) == [b"".join(map(event, range(25)))]


def test_what_was_handed_out_is_not_handed_out_again(journal: Journal) -> None:
    fill(journal, 5)
    take_all(journal)
    fill(journal, 5, 5)
    assert list(take_all(journal).values()) == [b"".join(map(event, range(5, 10)))]


def test_parts_are_whole_records_of_at_most_the_asked_size(journal: Journal) -> None:
    fill(journal, 25)
    parts = list(journal.unsent(3 * TENTH + 7))
    assert [len(part.journal_bytes) // TENTH for part in parts] == [3, 3, 3, 1] * 2 + [3, 2]
    assert [part.first_offset for part in parts] == [
        sum(len(before.journal_bytes) for before in parts[:i]) for i in range(len(parts))
    ]


def test_a_record_larger_than_the_asked_size_is_a_part_of_its_own(journal: Journal) -> None:
    fill(journal, 3)
    assert [part.journal_bytes for part in journal.unsent(8)] == [event(i) for i in range(3)]


def test_what_was_not_taken_is_handed_out_next_time(journal: Journal) -> None:
    fill(journal, 25)
    first = next(journal.unsent(1 << 30)).journal_bytes
    assert [first, *take_all(journal).values()] == [
        b"".join(map(event, range(10))),
        b"".join(map(event, range(10, 25))),
    ]


def test_an_acknowledgement_frees_the_segments_before_it(
    journal: Journal, folders: Folders
) -> None:
    fill(journal, 35)
    (lane,) = take_all(journal)
    journal.acknowledge(lane, 25 * TENTH)
    assert steps(memory(folders)) == list(range(20, 35))


def test_the_segment_in_use_is_never_freed(journal: Journal, folders: Folders) -> None:
    fill(journal, 30)
    (lane,) = take_all(journal)
    journal.acknowledge(lane, 30 * TENTH)
    fill(journal, 2, 30)
    assert steps(memory(folders)) == [*range(20, 30), 30, 31]


def test_an_older_acknowledgement_changes_nothing(journal: Journal) -> None:
    fill(journal, 35)
    (lane,) = take_all(journal)
    journal.acknowledge(lane, 25 * TENTH)
    journal.acknowledge(lane, 10 * TENTH)
    assert journal.held()[lane] == 25 * TENTH


@pytest.mark.parametrize("lane", [2, 63, 10**6])
def test_an_acknowledgement_of_an_unknown_lane_changes_nothing(journal: Journal, lane: int) -> None:
    fill(journal, 5)
    journal.acknowledge(lane, 10**9)
    assert not journal.delivered


def test_an_acknowledgement_beyond_the_end_counts_as_the_end(journal: Journal) -> None:
    fill(journal, 5)
    (lane,) = take_all(journal)
    journal.acknowledge(lane, 10**9)
    assert journal.held()[lane] == 5 * TENTH


def test_bytes_are_in_flight_until_they_are_acknowledged(journal: Journal) -> None:
    fill(journal, 5)
    assert journal.in_flight == 0
    (lane,) = take_all(journal)
    journal.acknowledge(lane, 2 * TENTH)
    assert journal.in_flight == 3 * TENTH


def test_after_a_rewind_what_is_not_committed_is_handed_out_again(journal: Journal) -> None:
    fill(journal, 25)
    (lane,) = take_all(journal)
    journal.rewind({lane: 13 * TENTH})
    assert take_all(journal) == {lane: b"".join(map(event, range(13, 25)))}


def test_a_rewind_to_before_what_is_held_starts_with_what_is_held(journal: Journal) -> None:
    fill(journal, 25)
    (lane,) = take_all(journal)
    journal.acknowledge(lane, 12 * TENTH)
    journal.rewind({})
    assert take_all(journal) == {lane: b"".join(map(event, range(12, 25)))}


def test_a_journal_is_delivered_when_all_is_acknowledged(journal: Journal) -> None:
    fill(journal, 5)
    (lane,) = take_all(journal)
    journal.acknowledge(lane, 4 * TENTH)
    before = journal.delivered
    journal.acknowledge(lane, 5 * TENTH)
    assert (before, journal.delivered) == (False, True)


# --- the end


def deliver(journal: Journal) -> None:
    take_all(journal)
    for lane, end in journal.ends().items():
        journal.acknowledge(lane, end)


def test_closing_a_delivered_journal_deletes_its_folder(journal: Journal, folders: Folders) -> None:
    fill(journal, 25)
    deliver(journal)
    journal.seal(0.0, "over")
    journal.close()
    assert list((folders.directory / "journals").iterdir()) == []


def test_closing_a_delivered_journal_deletes_its_folder_on_disk_too(
    open_journal: Callable[..., Journal], folders: Folders
) -> None:
    journal = open_journal(memory_bytes=3 * SEGMENT_BYTES)
    fill(journal, 45)
    assert disk(folders).exists()
    deliver(journal)
    journal.seal(0.0, "over")
    journal.close()
    assert list((folders.state / "journals").iterdir()) == []


def test_closing_keeps_what_is_not_delivered(journal: Journal, folders: Folders) -> None:
    fill(journal, 25)
    (lane,) = take_all(journal)
    journal.acknowledge(lane, 24 * TENTH)
    journal.seal(0.0, "over")
    journal.close()
    assert steps(memory(folders)) == [20, 21, 22, 23, 24]


def test_closing_twice_is_closing_once(journal: Journal, folders: Folders) -> None:
    journal.seal(0.0, "over")
    journal.close()
    journal.close()
    assert list((folders.directory / "journals").iterdir()) == []


def test_a_sealed_journal_has_no_lane_left(journal: Journal) -> None:
    journal.seal(0.0, "the run has finished")
    with pytest.raises(IndexError):
        journal.take()
    with pytest.raises(JournalError, match="the run has finished"):
        journal.add_lane()


def test_seal_gives_a_lane_for_the_last_records(journal: Journal, folders: Folders) -> None:
    lane = journal.seal(0.0, "over")
    assert lane is not None
    journal.write(lane, event(9))
    assert steps(memory(folders)) == [9]


def test_a_journal_with_a_call_that_never_ends_deletes_nothing(
    journal: Journal, folders: Folders
) -> None:
    never_given_back = journal.take()
    assert journal.seal(0.0, "over") is not None
    deliver(journal)
    journal.close()
    assert files(memory(folders)) != []
    assert never_given_back.state.ended


def test_seal_waits_for_a_call_under_way(journal: Journal) -> None:
    lane = journal.take()
    giving = threading.Timer(0.05, journal.give, [lane])
    giving.start()
    journal.seal(10.0, "over")
    giving.join()
    assert journal.delivered
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        lane.segment.map.size()


def test_the_places_of_a_journal_are_those_in_which_something_waits(
    open_journal: Callable[..., Journal], folders: Folders
) -> None:
    journal = open_journal(memory_bytes=3 * SEGMENT_BYTES)
    places = [journal.places()]
    for records in (20, 25):  # three segments in memory, of which one is the other lane's
        fill(journal, records)
        places.append(journal.places())
    (lane,) = take_all(journal)
    for offset in (30, 45):
        journal.acknowledge(lane, offset * TENTH)
        places.append(journal.places())
    both = [folders.directory, folders.state]
    assert places == [[], [folders.directory], both, [folders.state], []]
