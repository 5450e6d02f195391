"""The quarantine's cap: what goes, what stays, and that it is counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import AgentProcess, Folders, wait_until
from trackagent.agent import quarantine
from trackagent.agent.quarantine import Held, Quarantine, set_aside, set_aside_database

MIB = 1024 * 1024


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "quarantine"


def put(place: Path, name: str, size: int = MIB) -> Path:
    """A damaged file that is set aside, after those of before."""
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.parent / "damaged"
    path.write_bytes(bytes(size))
    # The time of what is in it says nothing about when it came.
    os.utime(path, (10**9 - len(list(place.glob("*"))), 10**9))
    return set_aside(path, place, name, "it is damaged")


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if not path.name.startswith("."))


def test_below_the_cap_nothing_goes(place: Path) -> None:
    put(place, "1-spool.db")
    put(place, "2-spool.db")
    quarantine = Quarantine([place], max_bytes=3 * MIB)
    quarantine.trim()
    assert names(place) == ["1-spool.db", "1-spool.reason", "2-spool.db", "2-spool.reason"]
    assert quarantine.held() == Held(2, 2 * MIB + 2 * 4096, 0)


def test_the_oldest_go_with_all_that_belongs_to_them(place: Path) -> None:
    put(place, "b.seg")
    (place / "b.seg-wal").write_bytes(bytes(MIB))
    put(place, "c.seg")
    put(place, "a.seg")
    quarantine = Quarantine([place], max_bytes=2 * MIB)
    quarantine.trim()
    assert names(place) == ["a.seg", "a.reason"][::-1]
    assert quarantine.held().deleted == 2


def test_the_newest_stays_even_when_it_is_larger_than_the_cap(place: Path) -> None:
    put(place, "old.seg")
    put(place, "new.db", 3 * MIB)
    quarantine = Quarantine([place], max_bytes=MIB)
    quarantine.trim()
    quarantine.trim()
    assert (names(place), quarantine.held().deleted) == (["new.db", "new.reason"], 1)


def test_all_folders_share_the_cap(tmp_path: Path) -> None:
    disk, memory = tmp_path / "disk" / "quarantine", tmp_path / "memory" / "quarantine"
    put(memory, "1.seg")
    put(disk, "2.seg")
    put(memory, "3.seg")
    quarantine = Quarantine([disk, memory], max_bytes=2 * MIB + 64 * 1024)
    quarantine.trim()
    assert (names(disk), names(memory)) == (["2.reason", "2.seg"], ["3.reason", "3.seg"])


def test_folders_and_links_are_deleted_and_not_followed(place: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"x")
    place.mkdir()
    (place / "1.seg").symlink_to(kept)
    (place / "2.seg").mkdir()
    (place / "2.seg" / "large").write_bytes(bytes(2 * MIB))
    put(place, "3.seg")
    Quarantine([place], max_bytes=MIB).trim()
    assert (names(place), kept.read_bytes()) == (["3.reason", "3.seg"], b"x")


def test_what_was_deleted_is_counted_over_restarts(place: Path) -> None:
    for number in range(3):
        put(place, f"{number}.seg")
        Quarantine([place], max_bytes=MIB).trim()
    assert Quarantine([place], max_bytes=MIB).held().deleted == 2


def test_a_database_goes_with_its_log(place: Path) -> None:
    path = place.parent / "spool.db"
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").write_text(f"content{suffix}")
    set_aside_database(path, place, "it is damaged")
    (name,) = [name for name in names(place) if name.endswith(".db")]
    assert [(place / f"{name}{suffix}").read_text() for suffix in ("", "-wal", "-shm")] == [
        "content",
        "content-wal",
        "content-shm",
    ]
    assert list(place.parent.glob("spool.db*")) == []


def test_a_databases_log_is_never_left_alone_in_its_place(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the agent dies between the two: a new file would be made of the damaged one's log."""
    path = place.parent / "spool.db"
    path.write_text("content")
    Path(f"{path}-wal").write_text("log")
    left: list[list[str]] = []
    real = quarantine.set_aside

    def looks(*arguments: Any) -> Path:
        left.append(sorted(one.name for one in place.parent.glob("spool.db*")))
        return real(*arguments)

    monkeypatch.setattr(quarantine, "set_aside", looks)
    set_aside_database(path, place, "it is damaged")
    assert left == [["spool.db"]]


@pytest.mark.parametrize("count", ["", "{", "[]", '{"items": "many"}'])
def test_a_damaged_count_begins_again(place: Path, count: str) -> None:
    for number in range(2):
        put(place, f"{number}.seg")
    (place / ".deleted").write_text(count)
    quarantine = Quarantine([place], max_bytes=MIB)
    quarantine.trim()
    assert quarantine.held().deleted == 1


def test_no_folder_is_an_empty_quarantine(place: Path) -> None:
    quarantine = Quarantine([place], max_bytes=MIB)
    quarantine.trim()
    assert quarantine.held() == Held(0, 0, 0)


def test_the_agent_keeps_the_cap_and_shows_what_it_deleted(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    place = folders.state / "quarantine"
    folders.state.mkdir(mode=0o700)
    for number in range(3):
        put(place, f"{number}.seg")
    place.chmod(0o700)
    agent = own_agent("--quarantine-bytes", str(MIB)).start()
    wait_until(lambda: names(place) == ["2.reason", "2.seg"])
    status = json.loads(agent.run_cli("status", "--json").stdout)
    assert status["quarantine"] == {
        "items": 1,
        "bytes": MIB + 4096,
        "max_bytes": MIB,
        "deleted": 2,
    }
    assert "1 damaged file, 1.0 MiB of 1.0 MiB; 2 deleted" in agent.run_cli("status").stdout
