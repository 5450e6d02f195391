"""The journal: segments, lanes, folders, bounds and faults."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client.journals import (
    IDENTITY,
    ROOM,
    SEGMENT_BYTES,
    TENTH,
    disk,
    event,
    files,
    fill,
    memory,
    segments,
    steps,
    take_all,
    write,
)
from tests.fakes import Folders
from tests.strangers import BOB, give
from trackagent.client import record
from trackagent.client.errors import JournalError, ValueRefused
from trackagent.client.journal import Journal
from trackagent.client.record import Kind
from trackagent.client.segment import (
    MAX_LANES,
    Segment,
    read_header,
)

# --- segments


def test_a_new_journal_has_two_lanes_and_a_spare(journal: Journal, folders: Folders) -> None:
    assert len(files(memory(folders))) == 3
    assert [segment.header.lane for segment in segments(memory(folders))] == [0, 1]


def test_a_header_says_who_and_where(journal: Journal, folders: Folders) -> None:
    fill(journal, 11)
    headers = [segment.header for segment in segments(memory(folders))]
    lane = next(lane for lane in journal.lanes.values() if lane.offset)
    first, second = (header for header in headers if header.lane == lane.number)
    assert [first.identity, second.identity] == [IDENTITY, IDENTITY]
    assert (first.segment_bytes, first.base, first.number) == (SEGMENT_BYTES, 0, 0)
    assert (second.base, second.number) == (10 * TENTH, 1)


def test_a_full_segment_is_followed_by_the_next(journal: Journal, folders: Folders) -> None:
    fill(journal, 35)
    assert steps(memory(folders)) == list(range(35))
    sizes = [len(segment.records) for segment in segments(memory(folders))]
    assert [size for size in sizes if size] == [10, 10, 10, 5]


def test_a_roll_uses_the_spare_and_asks_for_another(
    open_journal: Callable[..., Journal], folders: Folders
) -> None:
    made: list[Path] = []
    woken: list[int] = []

    def create(path: Path, size: int, identity: bytes) -> Segment:
        made.append(path)
        return Segment(path, size, identity)

    journal = open_journal(create=create, wake=lambda: woken.append(len(made)))
    del made[:], woken[:]
    fill(journal, 11)
    assert (made, woken) == ([], [0])
    journal.prepare()
    assert len(made) == 1


def test_prepare_makes_no_second_spare(journal: Journal, folders: Folders) -> None:
    before = files(memory(folders))
    journal.prepare()
    journal.prepare()
    assert files(memory(folders)) == before


def test_prepare_makes_another_lane_when_all_are_taken(journal: Journal) -> None:
    lanes = [journal.take(), journal.take()]
    journal.prepare()
    assert journal.take().number == 2
    for lane in lanes:
        journal.give(lane)


def test_a_log_call_that_finds_no_spare_makes_a_segment(journal: Journal, folders: Folders) -> None:
    fill(journal, 25)  # without prepare()
    assert steps(memory(folders)) == list(range(25))


def test_a_spare_is_no_segment(journal: Journal, folders: Folders) -> None:
    headers = [read_header(path.read_bytes()) for path in sorted(memory(folders).glob("*.seg"))]
    assert headers.count(None) == 1


def test_a_schema_stands_once_in_each_segment_before_its_first_use(
    journal: Journal, folders: Folders
) -> None:
    def log(step: int) -> None:
        lane = journal.take()
        journal.write_metrics(lane, {"loss": 0.5, "lr": 0.1}, step=step, time_ns=1)
        journal.give(lane)

    for step in range(2 * ROOM // 48):
        log(step)
    written = [segment for segment in segments(memory(folders)) if segment.records]
    assert len(written) == 3
    for segment in written:
        kinds = [one.kind for one in segment.records]
        assert kinds == [Kind.SCHEMA] + [Kind.METRICS] * (len(kinds) - 1)
        assert segment.records[0].keys == ("loss", "lr")


def test_key_sets_beyond_the_schema_ids_carry_their_names(
    journal: Journal, folders: Folders
) -> None:
    lane = journal.take()
    for i in range(record.MAX_SCHEMAS + 2):
        journal.write_metrics(lane, {f"k{i}": float(i)}, step=i, time_ns=1)
    journal.give(lane)
    records = [one for segment in segments(memory(folders)) for one in segment.records]
    named = [(one.keys, one.values) for one in records if one.kind == Kind.NAMED]
    assert named == [((f"k{i}",), (float(i),)) for i in (1024, 1025)]
    assert {one.schema_id for one in records if one.kind == Kind.SCHEMA} == set(range(1024))


def test_a_record_larger_than_a_segment_is_refused_by_name(journal: Journal) -> None:
    with pytest.raises(ValueRefused) as caught:
        write(journal, event(0, ROOM + 8))
    assert caught.value.reason == "record too large"


def test_a_record_as_large_as_a_segment_is_kept(journal: Journal, folders: Folders) -> None:
    write(journal, event(7, ROOM))
    assert steps(memory(folders)) == [7]


# --- lanes


def test_calls_that_meet_get_different_lanes(journal: Journal, folders: Folders) -> None:
    one, other = journal.take(), journal.take()
    journal.write(one, event(1))
    journal.write(other, event(2))
    journal.give(one)
    journal.give(other)
    found = {
        segment.header.lane: [record.step for record in segment.records]
        for segment in segments(memory(folders))
    }
    assert found == {one.number: [1], other.number: [2]}


def test_there_are_64_lanes_and_no_more(journal: Journal) -> None:
    lanes = [journal.take(), journal.take(), *(journal.add_lane() for _ in range(MAX_LANES - 2))]
    assert sorted(lane.number for lane in lanes) == list(range(MAX_LANES))
    with pytest.raises(JournalError, match="more than 64 log calls at once"):
        journal.add_lane()


def test_threads_that_add_lanes_at_once_get_numbers_below_64(journal: Journal) -> None:
    barrier = threading.Barrier(16)
    numbers: list[int] = []

    def work() -> None:
        barrier.wait()
        try:
            numbers.extend(journal.add_lane().number for _ in range(8))
        except JournalError:
            pass

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(2, MAX_LANES))


def test_a_lane_that_is_lost_between_taking_and_using_comes_back(journal: Journal) -> None:
    for _ in range(200):
        journal.take()  # whoever took it was interrupted: nobody holds it
    assert len(journal.lanes) == 2


def test_lanes_of_a_closed_journal_do_not_come_back(journal: Journal) -> None:
    lane = journal.take()
    journal.close()
    del lane
    still_there = journal.take()
    with pytest.raises(IndexError):
        journal.take()
    assert still_there.number == 0


# --- bounds and full file systems


def test_segments_that_do_not_fit_in_memory_go_to_disk(
    open_journal: Callable[..., Journal], folders: Folders
) -> None:
    journal = open_journal(memory_bytes=3 * SEGMENT_BYTES)
    fill(journal, 45)
    assert (len(files(memory(folders))), len(files(disk(folders)))) == (3, 3)
    assert steps(memory(folders)) + steps(disk(folders)) == list(range(45))


def test_freed_memory_is_used_again(open_journal: Callable[..., Journal], folders: Folders) -> None:
    journal = open_journal(memory_bytes=4 * SEGMENT_BYTES)
    for first in range(0, 300, 10):
        fill(journal, 10, first)
        for lane, data in take_all(journal).items():
            journal.acknowledge(lane, journal.lanes[lane].acknowledged + len(data))
        journal.prepare()
    assert files(disk(folders)) == []


def test_at_its_cap_the_journal_refuses_and_says_what_to_do(
    open_journal: Callable[..., Journal],
) -> None:
    journal = open_journal(journal_bytes=4 * SEGMENT_BYTES)
    fill(journal, 30)
    with pytest.raises(JournalError) as caught:
        write(journal, event(30))
    assert str(caught.value) == (
        "the journal holds 262144 bytes, its limit: start an agent with `trackagent start`, or raise "
        "TRACKAGENT_JOURNAL_BYTES"
    )


def test_the_cap_bounds_the_files(open_journal: Callable[..., Journal], folders: Folders) -> None:
    journal = open_journal(journal_bytes=6 * SEGMENT_BYTES, memory_bytes=3 * SEGMENT_BYTES)
    for number in range(200):
        try:
            write(journal, event(number))
        except JournalError:
            journal.prepare()
    paths = [*memory(folders).glob("*.seg"), *disk(folders).glob("*.seg")]
    assert sum(path.stat().st_size for path in paths) == 6 * SEGMENT_BYTES


def test_what_was_accepted_before_the_cap_stays(
    open_journal: Callable[..., Journal], folders: Folders
) -> None:
    journal = open_journal(journal_bytes=4 * SEGMENT_BYTES)
    fill(journal, 30)
    with pytest.raises(JournalError):
        write(journal, event(30))
    assert steps(memory(folders)) == list(range(30))


def test_after_an_acknowledgement_a_full_journal_goes_on(
    open_journal: Callable[..., Journal], folders: Folders
) -> None:
    journal = open_journal(journal_bytes=4 * SEGMENT_BYTES)
    fill(journal, 30)
    with pytest.raises(JournalError):
        write(journal, event(30))
    (lane,) = take_all(journal)
    journal.acknowledge(lane, journal.lanes[lane].offset)
    journal.prepare()
    fill(journal, 10, 31)
    assert steps(memory(folders))[-10:] == list(range(31, 41))


class Failing:
    """Creates segments until it is told to fail; a Segment's `create`."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.folders: tuple[Path, ...] = ()

    def __call__(self, path: Path, size: int, identity: bytes) -> Segment:
        if self.error is not None and path.parent in self.folders:
            raise self.error
        return Segment(path, size, identity)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.EROFS]
)
def test_when_memory_fails_the_disk_is_used(
    open_journal: Callable[..., Journal], folders: Folders, number: int
) -> None:
    create = Failing()
    journal = open_journal(create=create)
    create.error, create.folders = OSError(number, os.strerror(number)), (memory(folders),)
    fill(journal, 45)
    assert steps(memory(folders)) + steps(disk(folders)) == list(range(45))
    assert len(files(disk(folders))) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_when_both_fail_the_error_names_both_and_the_next_step(
    open_journal: Callable[..., Journal], folders: Folders, number: int
) -> None:
    create = Failing()
    journal = open_journal(create=create)
    fill(journal, 10)
    create.error = OSError(number, os.strerror(number))
    create.folders = (memory(folders), disk(folders))
    fill(journal, 10, 10)  # into the spare
    with pytest.raises(JournalError) as caught:
        write(journal, event(20))
    why = os.strerror(number)
    assert str(caught.value) == (
        f"cannot create a journal segment (65536 bytes): {memory(folders)}: {why}; "
        f"{disk(folders)}: {why}; free some space, or set TRACKAGENT_DIR and TRACKAGENT_STATE"
    )


def test_a_full_journal_does_not_try_again_on_the_logging_thread(
    open_journal: Callable[..., Journal], folders: Folders
) -> None:
    create = Failing()
    journal = open_journal(create=create)
    create.error = OSError(errno.ENOSPC, "No space left on device")
    create.folders = (memory(folders), disk(folders))
    fill(journal, 20)
    with pytest.raises(JournalError):
        write(journal, event(20))
    create.error = None
    with pytest.raises(JournalError):
        write(journal, event(20))
    journal.prepare()  # the sender's thread does
    write(journal, event(20))
    assert steps(memory(folders)) == list(range(21))


def test_a_segment_that_cannot_be_made_leaves_no_file(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folders.directory.mkdir(parents=True)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Segment(folders.directory / "0.seg", SEGMENT_BYTES, b"{}")
    assert list(folders.directory.iterdir()) == []


def test_a_full_tmpfs_is_an_error_and_no_crash(
    open_journal: Callable[..., Journal], folders: Folders, small_file_system: Path
) -> None:
    journal = open_journal(directory=small_file_system / "dir", state_directory=folders.state)
    fill(journal, 400)
    in_memory = small_file_system / "dir" / "journals" / IDENTITY["producer_id"]
    assert steps(in_memory) + steps(disk(folders)) == list(range(400))
    assert len(files(in_memory)) == 1024 * 1024 // SEGMENT_BYTES
    assert shutil.disk_usage(small_file_system).free < SEGMENT_BYTES


def test_two_full_file_systems_are_one_error(
    open_journal: Callable[..., Journal], small_file_system: Path
) -> None:
    journal = open_journal(
        directory=small_file_system / "dir", state_directory=small_file_system / "state"
    )
    with pytest.raises(JournalError, match="No space left on device"):
        fill(journal, 400)


# --- folders


def bad_folders(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Name → a folder that cannot be used, and what is said about it."""
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(real)
    everyone = tmp_path / "everyone"
    everyone.mkdir()
    everyone.chmod(0o777)
    file = tmp_path / "file"
    file.touch()
    return {
        "link": (link, f"{link} is a link: name the folder that it leads to"),
        "everyone": (
            everyone,
            f"{everyone} can be written by everyone (mode 0777): chmod go-w {everyone}, or choose another "
            "folder",
        ),
        "file": (file, f"{file} is not a folder: choose another"),
        "below a file": (file / "dir", "Not a directory"),
        "not there": (Path("/proc/trackagent"), "No such file or directory"),
    }


@pytest.mark.parametrize("name", ["link", "everyone", "file", "below a file", "not there"])
def test_a_folder_that_cannot_be_used_is_one_clear_error(
    open_journal: Callable[..., Journal], tmp_path: Path, name: str
) -> None:
    folder, problem = bad_folders(tmp_path)[name]
    with pytest.raises(JournalError) as caught:
        open_journal(directory=folder, state_directory=folder)
    where = f"{folder / 'journals' / IDENTITY['producer_id']}: {problem}"
    assert str(caught.value) == (
        f"cannot create a journal segment (65536 bytes): {where}; {where}; "
        "free some space, or set TRACKAGENT_DIR and TRACKAGENT_STATE"
    )


def test_another_users_folder_is_refused(
    open_journal: Callable[..., Journal], folders: Folders
) -> None:
    folders.directory.mkdir(parents=True)
    give(folders.directory, BOB, 0o700)
    with pytest.raises(JournalError, match=f"{folders.directory} belongs to user {BOB}"):
        open_journal(state_directory=folders.directory)


def test_when_the_memory_folder_cannot_be_used_the_disk_is(
    open_journal: Callable[..., Journal], folders: Folders, tmp_path: Path
) -> None:
    link, _ = bad_folders(tmp_path)["link"]
    journal = open_journal(directory=link)
    fill(journal, 5)
    assert steps(disk(folders)) == list(range(5))
    assert list(link.iterdir()) == []


def test_missing_parents_are_made(open_journal: Callable[..., Journal], folders: Folders) -> None:
    open_journal(directory=folders.directory / "a" / "b")
    assert files(folders.directory / "a" / "b" / "journals" / IDENTITY["producer_id"]) != []


def test_folders_and_files_are_this_users_alone(journal: Journal, folders: Folders) -> None:
    folder = memory(folders)
    modes = {path: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {
        path: 0o700 if path == folder else 0o600 for path in (folder, *folder.iterdir())
    }


def test_an_identity_that_does_not_fit_a_header_is_refused(folders: Folders) -> None:
    with pytest.raises(JournalError, match="the producer's identity takes 5"):
        Journal(
            {**IDENTITY, "node": "n" * 5000},
            directory=folders.directory,
            state_directory=folders.state,
            segment_bytes=SEGMENT_BYTES,
            memory_bytes=SEGMENT_BYTES,
            journal_bytes=4 * SEGMENT_BYTES,
        )


# --- the lock


def locked(folder: Path) -> bool:
    with open(folder / "lock", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_an_open_journal_is_locked(journal: Journal, folders: Folders) -> None:
    assert locked(memory(folders))


def test_a_closed_journal_with_undelivered_records_is_not_locked(
    journal: Journal, folders: Folders
) -> None:
    fill(journal, 1)
    journal.seal(0.0, "over")
    journal.close()
    assert not locked(memory(folders))
