"""Whose a run is: the first one's, for ever, and nobody else's when that cannot be told."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trackagent.agent.owners import NotYours, Owners
from trackagent.agent.store.contract import StoreError

ME, BOB, CAROL = os.geteuid(), 60_002, 60_003
RUN, OTHER = "a" * 32, "b" * 32
ONE, TWO = b"1" * 16, b"2" * 16

Open = Callable[..., Owners]


@pytest.fixture
def open_owners(tmp_path: Path) -> Iterator[Open]:
    """open_owners(is_stored): those of this test's file."""
    made: list[Owners] = []

    def opened(is_stored: Callable[[str], bool] = lambda run_id: False) -> Owners:
        made.append(Owners(tmp_path / "owners.db", tmp_path / "quarantine", is_stored))
        return made[-1]

    yield opened
    for one in made:
        one.close()


def test_a_run_is_the_first_ones(open_owners: Open) -> None:
    owners = open_owners()
    owners.claim(RUN, ONE, BOB)
    owners.claim(RUN, TWO, BOB)
    with pytest.raises(NotYours, match=f"the run {RUN} is another user's"):
        owners.claim(RUN, b"3" * 16, CAROL)


def test_what_was_claimed_is_known_to_the_next_agent(open_owners: Open) -> None:
    open_owners().claim(RUN, ONE, BOB)
    assert [open_owners().is_of(ONE, uid) for uid in (BOB, CAROL, ME)] == [True, False, False]


def test_a_producer_is_of_one_user_whatever_run_is_named(open_owners: Open) -> None:
    owners = open_owners()
    owners.claim(RUN, ONE, BOB)
    with pytest.raises(NotYours, match="this producer"):
        owners.claim(OTHER, ONE, CAROL)
    owners.claim(OTHER, TWO, CAROL)  # nothing of the refused call was kept


def test_a_producer_that_nobody_opened_is_nobodys(open_owners: Open) -> None:
    assert open_owners().is_of(ONE, BOB) is False


def test_a_stored_run_that_nobody_is_known_to_have_opened_is_the_agents_users(
    open_owners: Open,
) -> None:
    owners = open_owners(lambda run_id: run_id == RUN)
    with pytest.raises(NotYours):
        owners.claim(RUN, ONE, BOB)
    owners.claim(RUN, ONE, ME)


def test_producers_from_before_are_the_agents_users_and_no_one_elses_are_taken(
    open_owners: Open,
) -> None:
    owners = open_owners()
    owners.claim(RUN, ONE, BOB)
    owners.claim_unknown([(RUN, ONE), (OTHER, TWO)])
    assert (owners.is_of(ONE, BOB), owners.is_of(TWO, ME)) == (True, True)


def test_nothing_is_claimed_when_the_store_does_not_answer(open_owners: Open) -> None:
    def locked(run_id: str) -> bool:
        raise StoreError("locked")

    with pytest.raises(StoreError):
        open_owners(locked).claim(RUN, ONE, BOB)
    assert open_owners().is_of(ONE, BOB) is False


def test_a_damaged_file_is_set_aside_with_its_reason(open_owners: Open, tmp_path: Path) -> None:
    (tmp_path / "owners.db").write_bytes(b"damaged " * 1000)
    open_owners().claim(RUN, ONE, BOB)
    reasons = [path.read_text() for path in (tmp_path / "quarantine").glob("*.reason")]
    assert reasons == ["file is not a database\n"]


def test_a_file_that_cannot_be_opened_is_left_as_it_is(open_owners: Open, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "owners.db").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"owners\.db"):
        open_owners()
    assert (tmp_path / "elsewhere").stat().st_size == 0


def test_a_file_that_another_process_writes_is_an_error(open_owners: Open, tmp_path: Path) -> None:
    owners = open_owners()
    owners.claim(RUN, ONE, BOB)
    with sqlite3.connect(tmp_path / "owners.db", isolation_level=None) as other:
        other.execute("DROP TABLE runs")
    other.close()
    with pytest.raises(sqlite3.OperationalError):
        owners.claim(OTHER, TWO, BOB)
