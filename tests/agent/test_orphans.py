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
from tests.agent.left import (
    ID,
    KILLED,
    MANY,
    NAME,
    ends,
    left_behind,
    nothing_is_spooled,
    segments,
    spooled,
    steps,
    steps_in,
)
from tests.agent.samples import (
    RUN_ID,
    SEGMENT_BYTES,
    Connections,
    journal,
    log_losses,
    producer,
)
from tests.fakes import DEADLINE_S, Folders, start_script, wait_until
from trackagent.agent.orphans import Orphans
from trackagent.agent.spool import Spool
from trackagent.client.journal import Journal

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


@pytest.mark.parametrize(
    ("hub", "known"),
    [
        (f"node-0:7717 {'0' * 64} {'1' * 32}", "node-0:7717"),
        ("as a newer client says it", None),
        ("", None),
    ],
)
def test_a_journal_says_which_hub_its_records_are_for(
    spool: Spool, orphans: Orphans, folders: Folders, hub: str, known: str | None
) -> None:
    target = journal(folders, producer(hub=hub))
    log_losses(target, MANY)
    target.close()
    assert {
        found.hub and found.hub.address
        for found in segments_module.segment_files(folders.journals())
    } == {known}
    orphans.look()
    assert steps(spool) == list(MANY)


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
