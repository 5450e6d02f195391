"""Where runs go: what ranks have said of it is known after a restart, and tokens stay with their runs."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trackagent.agent.routes import NEWEST_RUNS, Routes
from trackagent.client.hub import Hub

RUN, OTHER = "a" * 32, "b" * 32
PIN, ANOTHER_PIN = "1" * 64, "2" * 64
HUB = Hub("10.0.0.1:7717", PIN, "c" * 32)

Open = Callable[[], Routes]


@pytest.fixture
def open_routes(tmp_path: Path) -> Iterator[Open]:
    """Those of this test's file."""
    made: list[Routes] = []

    def opened() -> Routes:
        made.append(Routes(tmp_path / "routes.db", tmp_path / "quarantine"))
        return made[-1]

    yield opened
    for one in made:
        one.close()


def test_what_was_noted_is_known_after_a_restart(open_routes: Open) -> None:
    first = open_routes()
    first.note(RUN, HUB)
    first.close()
    again = open_routes()
    assert again.address(PIN) == "10.0.0.1:7717"
    assert again.tokens(PIN, [RUN, OTHER]) == {RUN: "c" * 32}
    assert again.pins() == [PIN]


def test_a_hub_that_moved_is_at_its_last_address(open_routes: Open) -> None:
    routes = open_routes()
    routes.note(RUN, HUB)
    routes.note(OTHER, Hub("10.0.0.2:7717", PIN, "d" * 32))
    assert routes.address(PIN) == "10.0.0.2:7717"
    assert routes.tokens(PIN, [RUN, OTHER]) == {RUN: "c" * 32, OTHER: "d" * 32}


def test_a_runs_token_is_the_last_one(open_routes: Open) -> None:
    routes = open_routes()
    routes.note(RUN, HUB)
    routes.note(RUN, Hub(HUB.address, PIN, "e" * 32))
    assert routes.tokens(PIN, [RUN]) == {RUN: "e" * 32}


def test_a_run_has_a_token_at_each_of_its_hubs(open_routes: Open) -> None:
    routes = open_routes()
    routes.note(RUN, HUB)
    routes.note(RUN, Hub("10.0.0.9:7717", ANOTHER_PIN, "f" * 32))
    assert routes.tokens(PIN, [RUN]) == {RUN: "c" * 32}
    assert routes.tokens(ANOTHER_PIN, [RUN]) == {RUN: "f" * 32}


def test_the_newest_runs_speak_for_calls_that_concern_none(open_routes: Open) -> None:
    routes = open_routes()
    assert routes.newest(PIN) == {}
    runs = [f"{number:032x}" for number in range(NEWEST_RUNS + 1)]
    for run_id in runs:
        routes.note(run_id, HUB)
    routes.note(OTHER, Hub(HUB.address, ANOTHER_PIN, "d" * 32))
    assert list(routes.newest(PIN)) == runs[:0:-1]
    assert routes.newest(ANOTHER_PIN) == {OTHER: "d" * 32}


def test_the_hubs_of_which_nobody_has_spoken_for_longest_are_forgotten(tmp_path: Path) -> None:
    routes = Routes(tmp_path / "routes.db", tmp_path / "quarantine", max_hubs=3)
    pins = [f"{number}" * 64 for number in range(5)]
    for pin in pins[:3]:
        routes.note(RUN, Hub("10.0.0.1:7717", pin, "c" * 32))
    routes.note(OTHER, Hub("10.0.0.2:7717", pins[0], "d" * 32))
    for pin in pins[3:]:
        routes.note(RUN, Hub("10.0.0.1:7717", pin, "c" * 32))
    assert routes.pins() == [pins[0], *pins[3:]]
    routes.note(RUN, Hub("10.0.0.1:7717", pins[2], "c" * 32))
    assert routes.address(pins[2]) == "10.0.0.1:7717"
    routes.close()


def test_nobody_has_said_where_a_hub_is(open_routes: Open) -> None:
    assert open_routes().address(PIN) is None


def test_the_file_is_for_its_user_alone(open_routes: Open, tmp_path: Path) -> None:
    open_routes().note(RUN, HUB)
    assert stat.S_IMODE((tmp_path / "routes.db").stat().st_mode) == 0o600


def test_a_damaged_file_is_set_aside_and_begun_anew(open_routes: Open, tmp_path: Path) -> None:
    first = open_routes()
    first.note(RUN, HUB)
    first.close()
    with (tmp_path / "routes.db").open("r+b") as file:
        file.write(b"garbage" * 100)
    again = open_routes()
    assert again.pins() == []
    again.note(RUN, HUB)
    assert again.address(PIN) == HUB.address
    assert list((tmp_path / "quarantine").iterdir())


def test_what_cannot_be_written_is_not_noted(open_routes: Open, tmp_path: Path) -> None:
    routes = open_routes()
    holder = sqlite3.connect(tmp_path / "routes.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    routes._database.execute("PRAGMA busy_timeout = 1")
    with pytest.raises(sqlite3.OperationalError):
        routes.note(RUN, HUB)
    holder.execute("ROLLBACK")
    holder.close()
    routes.note(RUN, HUB)
    assert routes.address(PIN) == HUB.address
