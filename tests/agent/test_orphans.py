"""Journals without a sender: what the dead left and what forked processes write, all of it, once."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import trackagent.agent.orphans as orphans_module
import trackagent.agent.segments as segments_module
import trackagent.agent.store as store
from tests.agent.samples import (
    RUN_ID,
    SEGMENT_BYTES,
    Connections,
    journal,
    log_losses,
    producer,
)
from tests.fakes import DEADLINE_S, Folders, start_script, wait_until
from trackagent.agent.decode import decode
from trackagent.agent.orphans import Orphans
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import Batch, EventData
from trackagent.client import record
from trackagent.client.journal import Journal
from trackagent.client.record import Kind
from trackagent.client.segment import HEADER_BYTES, LAST_WORDS_BYTES

ID = producer().producer_id
NAME = ID.hex()
MANY = range(2000)  # fill more than one segment
KILLED = ("killed", "the process ended without finish()", -1)


def spooled(spool: Spool) -> Batch:
    """All that waits in the spool, decoded."""
    delivery = spool.next_delivery("store", 1 << 40).result()
    assert delivery is not None
    return decode(delivery, spool.keys)


def steps(spool: Spool) -> list[int]:
    """Of all points in the spool, in order."""
    return [int(step) for points in spooled(spool).points for step in points.steps]


def ends(spool: Spool) -> list[tuple[str, str, int]]:
    return [(end.status, end.error, end.logged) for end in spooled(spool).ends]


def problems(spool: Spool) -> list[EventData]:
    """Events but those that say that a rank died."""
    return [event for event in spooled(spool).events if "last_step" not in event.data]


def nothing_is_spooled(spool: Spool) -> bool:
    return spool.next_delivery("store", 1 << 40).result() is None


def left_behind(folders: Folders, wanted: range = MANY) -> list[Path]:
    """The segments with records of a journal whose owner is gone, in order of their offsets."""
    target = journal(folders)
    log_losses(target, wanted)
    target.close()
    return segments(folders)


def segments(folders: Folders) -> list[Path]:
    """Segment files that hold steps, in their order."""
    found = [path for folder in folders.journals() for path in folder.glob("*.seg")]
    return sorted(filter(steps_in, found), key=steps_in)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def steps_in(path: Path) -> list[int]:
    """The steps of a segment's records."""
    data = path.read_bytes()
    found = (record.decode(data, at) for at in record.scan(data, HEADER_BYTES).offsets)
    return [one.step for one in found if one.kind == Kind.METRICS]


# --- what the dead left

LOG_UNTIL_KILLED = """
import signal, sys
from tests.agent.samples import journal, log_losses
from tests.fakes import Folders
from pathlib import Path
from uuid import uuid4
log_losses(journal(Folders(Path(sys.argv[1]), Path(sys.argv[2]))), range(2000))
print("logged", flush=True)
signal.pause()
"""


@pytest.fixture
def killed(folders: Folders) -> None:
    """The journal of a process that logged MANY steps and was killed."""
    process = start_script(
        folders,
        LOG_UNTIL_KILLED,
        *folders,
        PYTHONPATH=str(Path(__file__).parents[2]),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        process.send_signal(signal.SIGKILL)


@pytest.mark.usefixtures("killed")
def test_what_a_killed_process_logged_is_read_whole(spool: Spool, orphans: Orphans) -> None:
    orphans.look()
    assert steps(spool) == list(MANY)


@pytest.mark.usefixtures("killed")
def test_the_end_of_a_killed_process_is_noted_once(spool: Spool, orphans: Orphans) -> None:
    for _ in range(3):
        orphans.look()
    assert ends(spool) == [KILLED]


@pytest.mark.usefixtures("killed")
def test_the_journal_of_a_killed_process_is_deleted(orphans: Orphans, folders: Folders) -> None:
    orphans.look()
    assert folders.journals() == []


def test_a_killed_process_is_listed_no_longer(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    left_behind(folders)
    orphans.look()
    assert spool.statistics().result()["producers"] == []


def test_what_was_acknowledged_before_is_not_read_again(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    target = journal(folders)
    log_losses(target, MANY)
    spool.open_producer(producer(), {}).result()
    first = next(target.unsent(1 << 30))
    spool.append(ID, first.lane, first.first_offset, first.journal_bytes).result()
    target.close()
    orphans.look()
    assert steps(spool) == list(MANY)


def test_a_journal_that_was_acknowledged_in_part_goes_on_where_it_begins(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    target = journal(folders)
    log_losses(target, MANY)
    first = next(target.unsent(1 << 30))
    target.acknowledge(first.lane, first.first_offset + len(first.journal_bytes))
    target.close()
    begin = steps_in(segments(folders)[0])[0]
    orphans.look()
    assert steps(spool) == list(range(begin, len(MANY)))


def test_every_lane_is_read(spool: Spool, orphans: Orphans, folders: Folders) -> None:
    target = journal(folders)
    lanes = [target.take(), target.take()]
    for step in range(10):
        target.write_metrics(lanes[step % 2], {"loss": 0.0}, step=step, time_ns=0)
    target.close()
    orphans.look()
    assert sorted(steps(spool)) == list(range(10))


def test_segments_in_memory_and_on_disk_are_one_journal(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    target = journal(folders, memory_bytes=2 * SEGMENT_BYTES)
    log_losses(target, range(6000))
    target.close()
    assert len({path.parent for path in segments(folders)}) == 2
    orphans.look()
    assert steps(spool) == list(range(6000))


def test_both_folders_of_a_journal_are_deleted(orphans: Orphans, folders: Folders) -> None:
    target = journal(folders, memory_bytes=2 * SEGMENT_BYTES)
    log_losses(target, range(6000))
    target.close()
    orphans.look()
    assert folders.journals() == []


def test_a_journal_without_a_record_notes_an_end(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    journal(folders).close()
    orphans.look()
    assert ends(spool) == [KILLED]


def test_a_large_segment_is_spooled_in_pieces(
    spool: Spool, orphans: Orphans, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "READ_BYTES", 8192)
    left_behind(folders)
    orphans.look()
    delivery = spool.next_delivery("store", 1 << 40).result()
    assert delivery is not None
    assert max(len(batch.journal_bytes) for batch in delivery.batches) < 2 * 8192


def test_one_that_ended_well_is_not_said_to_be_killed(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    left_behind(folders)
    spool.open_producer(producer(), {}).result()
    spool.end_producer(ID).result()
    orphans.look()
    assert ends(spool) == []


# --- owners that live


def test_the_journal_of_a_living_owner_is_left_alone(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    target = journal(folders)
    log_losses(target, range(5))
    orphans.look()
    found = nothing_is_spooled(spool), len(segments(folders))
    target.close()
    assert found == (True, 1)


def test_an_owner_that_dies_later_is_read_then(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    target = journal(folders)
    log_losses(target, range(5))
    orphans.look()
    target.close()
    orphans.look()
    assert steps(spool) == list(range(5))


@pytest.fixture
def forked(folders: Folders) -> Iterator[Journal]:
    """The open journal of a forked process, which has no sender."""
    target = journal(folders, producer(forked=True))
    yield target
    target.close()


def test_what_a_forked_process_logs_is_read_while_it_lives(
    spool: Spool, orphans: Orphans, forked: Journal
) -> None:
    log_losses(forked, range(5))
    orphans.look()
    log_losses(forked, range(5, 9))
    orphans.look()
    assert steps(spool) == list(range(9))


def test_a_living_forked_process_has_no_end(
    spool: Spool, orphans: Orphans, forked: Journal
) -> None:
    log_losses(forked, range(5))
    orphans.look()
    assert ends(spool) == []


def test_segments_that_a_forked_process_has_left_are_deleted(
    orphans: Orphans, forked: Journal, folders: Folders
) -> None:
    log_losses(forked, range(5000))
    before = len(segments(folders))
    orphans.look()
    assert (before, len(segments(folders))) == (4, 1)


def test_a_forked_process_goes_on_after_its_segments_were_deleted(
    spool: Spool, orphans: Orphans, forked: Journal
) -> None:
    for begin in range(0, 8000, 1000):
        log_losses(forked, range(begin, begin + 1000))
        orphans.look()
    assert steps(spool) == list(range(8000))


def test_a_forked_process_that_ends_is_read_to_its_end(
    spool: Spool, orphans: Orphans, forked: Journal, folders: Folders
) -> None:
    log_losses(forked, range(3000))
    orphans.look()
    log_losses(forked, range(3000, 6000))
    forked.close()
    orphans.look()
    assert (steps(spool), ends(spool), folders.journals()) == (list(range(6000)), [KILLED], [])


def test_the_next_agent_goes_on_with_a_forked_process(
    spool: Spool, orphans: Orphans, forked: Journal, folders: Folders
) -> None:
    log_losses(forked, range(3000))
    orphans.look()
    log_losses(forked, range(3000, 6000))
    Orphans(spool, folders.directory, folders.state, folders.state / "quarantine").look()
    assert steps(spool) == list(range(6000))


# --- damage


def in_quarantine(folders: Folders) -> list[str]:
    return sorted(path.name for path in (folders.state / "quarantine").iterdir())


HEADERS = {
    "another magic": (0, b"NOTOURS!"),
    "a byte of the checksum": (12, b"\xff\xfe"),
    "a newer version": (8, b"\x09\x00"),
    "another byte order": (10, b"\xfe\xff"),
    "a byte of the identity": (60, b"\x00"),
    "zeros": (0, bytes(HEADER_BYTES)),
}


@pytest.mark.parametrize(("at", "data"), HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_segment_with_an_unreadable_header_is_set_aside_and_the_rest_delivered(
    spool: Spool, orphans: Orphans, folders: Folders, which: int, at: int, data: bytes
) -> None:
    target = journal(folders)
    log_losses(target, range(4000))
    target.close()
    found = segments(folders)[:3]
    lost = set(steps_in(found[which]))
    overwrite(found[which], at, data)
    orphans.look()
    assert (steps(spool), in_quarantine(folders)) == (
        [step for step in range(4000) if step not in lost],
        [f"{NAME}-{found[which].stem}.reason", f"{NAME}-{found[which].name}"],
    )


def test_the_reason_lies_beside_a_segment_that_was_set_aside(
    orphans: Orphans, folders: Folders
) -> None:
    path = left_behind(folders)[0]
    overwrite(path, 0, b"NOTOURS!")
    orphans.look()
    reason = folders.state / "quarantine" / f"{NAME}-{path.stem}.reason"
    assert reason.read_text() == "the magic is b'NOTOURS!' instead of b'TRKJRNL1'\n"


def test_a_segment_set_aside_is_kept_as_it_was(orphans: Orphans, folders: Folders) -> None:
    path = left_behind(folders)[0]
    overwrite(path, 0, b"NOTOURS!")
    data = path.read_bytes()
    orphans.look()
    assert (folders.state / "quarantine" / f"{NAME}-{path.name}").read_bytes() == data


def test_taking_a_journal_over_waits_for_nobody_to_share_its_commits(
    open_spool: Callable[..., Spool], folders: Folders
) -> None:
    left_behind(folders)
    spool = open_spool(linger_s=3600)
    Orphans(spool, folders.directory, folders.state, folders.state / "quarantine").look()
    assert folders.journals() == []


def test_the_run_says_which_segment_was_set_aside(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    path = left_behind(folders)[0]
    overwrite(path, 0, b"NOTOURS!")
    orphans.look()
    aside = folders.state / "quarantine" / f"{NAME}-{path.name}"
    assert [event.message for event in problems(spool) if event.level == "error"] == [
        "a journal segment is unreadable (the magic is b'NOTOURS!' instead of b'TRKJRNL1'): "
        f"set aside as {aside}"
    ]


def test_a_journal_of_nothing_readable_is_set_aside_and_its_folder_deleted(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    left_behind(folders, range(3))
    for path in folders.journals()[0].glob("*.seg"):
        overwrite(path, 0, b"NOTOURS!")
    orphans.look()
    assert (nothing_is_spooled(spool), folders.journals()) == (True, [])


def test_a_segment_of_another_producer_is_set_aside(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    other = journal(folders, producer(1))
    log_losses(other, range(100, 105))
    foreign = segments(folders)[0].read_bytes()
    other.close()
    left_behind(folders, range(5))
    (folders.directory / "journals" / NAME / "99999999.seg").write_bytes(foreign)
    orphans.look()
    assert (sorted(steps(spool)), in_quarantine(folders)) == (
        [*range(5), *range(100, 105)],
        [f"{NAME}-99999999.reason", f"{NAME}-99999999.seg"],
    )


def test_damage_in_a_segment_costs_what_stands_there_only(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    path = left_behind(folders)[0]
    overwrite(path, 30_000, b"\xff" * 80)
    orphans.look()
    found = steps(spool)
    assert (found == sorted(set(found)), 2 <= len(MANY) - len(found) <= 4) == (True, True)


def test_damage_in_a_segment_is_an_event_of_the_run(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    path = left_behind(folders)[0]
    overwrite(path, 30_000, b"\xff" * 80)
    orphans.look()
    (event,) = problems(spool)
    assert event.message.startswith("unreadable records: ")


@pytest.mark.parametrize("damage", [bytes(4096), b"\xff" * 4096], ids=["zeros", "noise"])
def test_damage_at_the_end_of_a_segment_does_not_hold_up_the_next(
    spool: Spool, orphans: Orphans, folders: Folders, damage: bytes
) -> None:
    path = left_behind(folders)[0]
    lost = steps_in(path)[-110:]
    overwrite(path, SEGMENT_BYTES - LAST_WORDS_BYTES - len(damage), damage)
    orphans.look()
    found = steps(spool)
    assert (set(MANY) - set(found) <= set(lost), found[-1], len(problems(spool))) == (
        True,
        MANY[-1],
        1,
    )


def test_a_segment_that_was_cut_off_does_not_hold_up_the_next(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    path = left_behind(folders)[0]
    kept = list(range(len(steps_in(path)), len(MANY)))
    os.truncate(path, 20_000)
    orphans.look()
    found = steps(spool)
    assert (found[: -len(kept)], found[-len(kept) :]) == (list(range(len(found) - len(kept))), kept)


def test_a_record_cut_by_the_end_of_its_process_is_left_out(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    target = journal(folders)
    log_losses(target, range(5))
    lane = target.take()
    at = lane.segment.position
    lane.segment.map[at + 8 : at + 40] = b"x" * 32  # written but not published
    target.close()
    orphans.look()
    assert (steps(spool), problems(spool)) == (list(range(5)), [])


# --- what else lies there


@pytest.fixture
def journals(folders: Folders) -> Path:
    """The folder of all journals in memory."""
    path = folders.directory / "journals"
    path.mkdir(parents=True)
    return path


def test_no_folder_of_journals_is_no_problem(orphans: Orphans) -> None:
    orphans.look()


def test_a_file_in_place_of_the_folder_of_journals_is_no_problem(
    orphans: Orphans, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    folders.directory.mkdir()
    (folders.directory / "journals").write_text("")
    orphans.look()
    assert caplog.messages == []


def test_journals_that_cannot_be_listed_are_looked_for_again(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    folders.directory.mkdir(parents=True, exist_ok=True)
    loop = folders.directory / "journals"
    loop.symlink_to(loop)
    orphans.look()
    loop.unlink()
    left_behind(folders, range(5))
    orphans.look()
    assert steps(spool) == list(range(5))


def test_what_a_lost_spool_had_acknowledged_is_not_read_again(
    spool: Spool, orphans: Orphans, folders: Folders
) -> None:
    target = journal(folders)
    log_losses(target, range(5))
    for lane, end in target.ends().items():
        target.acknowledge(lane, end)
    log_losses(target, range(5, 8))
    target.close()
    orphans.look()
    assert steps(spool) == [5, 6, 7]


@pytest.mark.parametrize("content", [[], ["lock"]], ids=["nothing", "a lock"])
def test_a_folder_without_segments_is_deleted(
    spool: Spool, orphans: Orphans, journals: Path, content: list[str]
) -> None:
    (journals / NAME).mkdir()
    for name in content:
        (journals / NAME / name).touch()
    orphans.look()
    assert (list(journals.iterdir()), nothing_is_spooled(spool)) == ([], True)


def test_foreign_files_and_folders_are_left_alone(orphans: Orphans, journals: Path) -> None:
    (journals / "notes.txt").write_text("mine")
    (journals / "folder").mkdir()
    (journals / "folder" / "00000000.seg").write_text("mine too")
    orphans.look()
    assert sorted(str(path.relative_to(journals)) for path in journals.rglob("*")) == [
        "folder",
        "folder/00000000.seg",
        "notes.txt",
    ]


def test_a_journal_that_is_being_made_is_left_alone(orphans: Orphans, journals: Path) -> None:
    (journals / f".{NAME}.4711").mkdir()
    orphans.look()
    assert [path.name for path in journals.iterdir()] == [f".{NAME}.4711"]


def test_a_link_in_place_of_a_journal_is_left_alone(
    orphans: Orphans, journals: Path, tmp_path: Path
) -> None:
    (tmp_path / "00000000.seg").write_text("mine")
    (journals / NAME).symlink_to(tmp_path)
    (journals / ("f" * 32)).symlink_to("nowhere")
    orphans.look()
    assert ([path.name for path in tmp_path.iterdir()], len(list(journals.iterdir()))) == (
        ["00000000.seg"],
        2,
    )


@pytest.mark.parametrize("kind", ["dangling link", "folder", "empty file"])
def test_what_is_no_segment_does_not_hold_up_the_segments(
    spool: Spool, orphans: Orphans, folders: Folders, kind: str
) -> None:
    left_behind(folders)
    odd = folders.directory / "journals" / NAME / "00000099.seg"
    if kind == "dangling link":
        odd.symlink_to("nowhere")
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.touch()
    orphans.look()
    assert (steps(spool), folders.journals()) == (list(MANY), [])


def test_one_journal_that_cannot_be_read_holds_up_no_other(
    spool: Spool, orphans: Orphans, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(folders)
    other = journal(folders, producer(1))
    log_losses(other, range(3))
    other.close()
    read = segments_module._segment_file

    def failing(path: Path) -> object:
        if path.parent.name == NAME:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(segments_module, "_segment_file", failing)
    orphans.look()
    assert (steps(spool), [path.name for path in folders.journals()]) == (list(range(3)), [NAME])


def test_a_journal_that_cannot_be_read_is_told_once(
    orphans: Orphans,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    left_behind(folders)

    def failing(path: Path) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(segments_module, "_segment_file", failing)
    for _ in range(3):
        orphans.look()
    assert caplog.messages == [f"journal {NAME}: [Errno 5] Input/output error; trying again"]


# --- faults and ends of the agent


@pytest.mark.parametrize(
    "statement", ["INSERT INTO batches", "UPDATE producers", "INSERT INTO producers", "COMMIT"]
)
def test_a_fault_of_the_spool_leaves_the_journal_for_the_next_look(
    open_spool: Callable[..., Spool], folders: Folders, statement: str
) -> None:
    connections = Connections()
    spool = open_spool(connect=connections)
    spool.add_sink("store").result()
    orphans = Orphans(spool, folders.directory, folders.state, folders.state / "quarantine")
    left_behind(folders)
    connections.last.failing = statement
    orphans.look()
    assert [path.name for path in folders.journals()] == [NAME]
    connections.last.failing = None
    orphans.look()
    assert (steps(spool), ends(spool), folders.journals()) == (list(MANY), [KILLED], [])


def test_a_spool_that_cannot_be_replaced_yet_ends_no_thread(
    open_spool: Callable[..., Spool],
    folders: Folders,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orphans_module, "SCAN_INTERVAL_S", 0.01)
    monkeypatch.setattr(orphans_module, "TIDY_INTERVAL_S", 0.0)
    connections = Connections()
    spool = open_spool(connect=connections)
    spool.add_sink("store").result()
    connections.last.failing = "COMMIT"
    connections.last.error = sqlite3.DatabaseError("database disk image is malformed")
    connections.full = True
    orphans = Orphans(
        spool, folders.directory, folders.state, folders.state / "quarantine", gone_after_s=0.04
    )
    orphans.start()
    try:
        for what in ("tidy the spool", "look for producers that are gone"):
            told = f"cannot {what}: the spool is damaged"
            wait_until(lambda told=told: told in caplog.text)  # type: ignore[misc]
        connections.full = False
        left_behind(folders)
        wait_until(lambda: not folders.journals())
    finally:
        orphans.stop()


def test_a_full_spool_leaves_the_rest_in_the_journal(
    open_spool: Callable[..., Spool], folders: Folders
) -> None:
    left_behind(folders)
    spool = open_spool(max_bytes=70_000)
    spool.add_sink("store").result()
    orphans = Orphans(spool, folders.directory, folders.state, folders.state / "quarantine")
    orphans.look()
    found = steps(spool)
    delivery = spool.next_delivery("store", 1 << 40).result()
    assert delivery is not None
    spool.delivered("store", delivery.id.last).result()
    orphans.look()
    assert (found + steps(spool), len(folders.journals())) == (list(MANY), 0)


LOOK_AND_DIE = """
import os, shutil, sys
from pathlib import Path
from uuid import uuid4
from trackagent.agent.orphans import Orphans
from trackagent.agent.spool import Spool
shutil.rmtree = lambda path: os._exit(9)
directory, state = map(Path, sys.argv[1:])
spool = Spool(state / "spool.db", max_bytes=1 << 30)
Orphans(spool, directory, state, state / "quarantine").look()
"""


def test_an_agent_that_dies_before_it_deletes_the_journal_doubles_nothing(
    open_spool: Callable[..., Spool], folders: Folders
) -> None:
    open_spool().close()
    left_behind(folders)
    died = subprocess.run(
        [os.sys.executable, "-c", LOOK_AND_DIE, *folders], check=False, timeout=DEADLINE_S
    )
    spool = open_spool()
    spool.add_sink("store").result()
    before = len(folders.journals())
    Orphans(spool, folders.directory, folders.state, folders.state / "quarantine").look()
    assert (died.returncode, before, steps(spool), ends(spool), folders.journals()) == (
        9,
        1,
        list(MANY),
        [KILLED],
        [],
    )


def test_the_store_shows_a_killed_run_with_all_of_its_records(
    spool: Spool, orphans: Orphans, folders: Folders, tmp_path: Path
) -> None:
    left_behind(folders)
    orphans.look()
    writer = store.open_writer(tmp_path / "store.db")
    writer.write(spooled(spool))
    writer.close()
    reader = store.open_reader(tmp_path / "store.db")
    run = reader.run(RUN_ID)
    reader.close()
    assert (run.status, run.records_stored) == ("killed", len(MANY))


# --- the thread


def test_the_thread_finds_what_is_left_behind(
    spool: Spool, orphans: Orphans, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans_module, "SCAN_INTERVAL_S", 0.01)
    left_behind(folders)
    orphans.start()
    wait_until(lambda: not folders.journals())
    orphans.stop()
    assert steps(spool) == list(MANY)


def test_stopping_takes_what_has_ended_meanwhile(
    spool: Spool, orphans: Orphans, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans_module, "SCAN_INTERVAL_S", 3600.0)
    orphans.start()
    left_behind(folders)
    orphans.stop()
    assert steps(spool) == list(MANY)


def test_journals_still_to_be_read_are_counted(
    spool: Spool, orphans: Orphans, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    left_behind(folders)
    monkeypatch.setattr(orphans, "_adopt", lambda folders: counts.append(orphans.reading))
    orphans.look()
    assert (counts, orphans.reading) == ([1], 0)
