"""Damaged journals, and what else lies where journals should: set aside by name, and in nobody's way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import trackagent.agent.segments as segments_module
from tests.agent.left import (
    MANY,
    NAME,
    left_behind,
    nothing_is_spooled,
    overwrite,
    problems,
    segments,
    steps,
    steps_in,
)
from tests.agent.samples import (
    SEGMENT_BYTES,
    journal,
    log_losses,
    producer,
)
from tests.fakes import Folders
from trackagent.agent.orphans import Orphans
from trackagent.agent.spool import Spool
from trackagent.client.segment import HEADER_BYTES, LAST_WORDS_BYTES

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


@pytest.fixture
def noise_in_a_segment(orphans: Orphans, folders: Folders) -> None:
    """The agent has read a journal of which 80 bytes in the middle are noise."""
    overwrite(left_behind(folders)[0], 30_000, b"\xff" * 80)
    orphans.look()


@pytest.mark.usefixtures("noise_in_a_segment")
def test_damage_in_a_segment_costs_what_stands_there_only(spool: Spool) -> None:
    found = steps(spool)
    assert (found == sorted(set(found)), 2 <= len(MANY) - len(found) <= 4) == (True, True)


@pytest.mark.usefixtures("noise_in_a_segment")
def test_damage_in_a_segment_is_an_event_of_the_run(spool: Spool) -> None:
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


@pytest.mark.parametrize("times", [1, 3])
def test_a_segment_that_is_gone_while_its_journal_is_read_is_told_when_it_is_missing_again(
    spool: Spool,
    orphans: Orphans,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    times: int,
) -> None:
    left_behind(folders)
    read = segments_module._segment_file

    def gone(path: Path) -> object:
        raise FileNotFoundError(2, "No such file or directory", "00000002.seg")

    monkeypatch.setattr(segments_module, "_segment_file", gone)
    for _ in range(times):
        orphans.look()
    monkeypatch.setattr(segments_module, "_segment_file", read)
    orphans.look()
    problem = "[Errno 2] No such file or directory: '00000002.seg'"
    told = [] if times == 1 else [f"journal {NAME}: {problem}; trying again"]
    assert (caplog.messages, steps(spool)) == (told, list(MANY))
