"""Group commit: who shares a transaction, who waits for whom, and what is taken back when one fails."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest

from tests.agent.samples import Connection
from tests.fakes import DEADLINE_S
from trackagent.agent import commits
from trackagent.agent.commits import GroupCommit

LONG_S = 3600.0
Make = Callable[..., GroupCommit]


@pytest.fixture
def connection() -> Iterator[Connection]:
    """A database with a table `kept (value)`."""
    made = sqlite3.connect(
        ":memory:", factory=Connection, isolation_level=None, check_same_thread=False
    )
    made.execute("CREATE TABLE kept (value)")
    made.statements.clear()
    yield made
    made.close()


@pytest.fixture
def make(connection: Connection) -> Iterator[Make]:
    """make(**what else it is given): a group commit on `connection`, closed after the test."""
    made: list[GroupCommit] = []

    def start(**options: Any) -> GroupCommit:
        made.append(GroupCommit(connection, **options))
        return made[-1]

    yield start
    connection.released.set()
    for one in made:
        one.close()


def keeping(connection: Connection, value: int) -> Callable[[], int]:
    """A job that inserts `value` and returns it."""

    def work() -> int:
        connection.execute("INSERT INTO kept VALUES (?)", (value,))
        return value

    return work


def kept(connection: Connection) -> list[int]:
    return [value for (value,) in connection.execute("SELECT value FROM kept ORDER BY value")]


def results(*futures: Future[int]) -> list[int]:
    return [future.result(DEADLINE_S) for future in futures]


def behind_a_commit(
    group: GroupCommit, connection: Connection, submit: Callable[[], list[Future[int]]]
) -> list[Future[int]]:
    """What `submit` submits while a commit is under way, once it is done; earlier statements forgotten."""
    connection.held_back = "COMMIT"
    group.submit(keeping(connection, 0))
    assert connection.reached.wait(DEADLINE_S)
    connection.statements.clear()
    futures = submit()
    connection.released.set()
    wait(futures, DEADLINE_S)
    return futures


def failing() -> int:
    raise ValueError("no")


def test_a_job_gets_what_its_work_returned(make: Make, connection: Connection) -> None:
    assert results(make().submit(keeping(connection, 7))) == [7]


def test_a_patient_job_waits_for_others_to_share_its_commit(
    make: Make, connection: Connection
) -> None:
    group = make()
    first = group.submit(keeping(connection, 1), patience_s=LONG_S)
    second = group.submit(keeping(connection, 2))
    assert (results(first, second), connection.statements.count("COMMIT")) == ([1, 2], 1)


def test_a_patient_job_waits_no_longer_than_it_may(make: Make, connection: Connection) -> None:
    assert results(make().submit(keeping(connection, 7), patience_s=0.01)) == [7]


def test_one_with_less_patience_takes_the_others_along(make: Make, connection: Connection) -> None:
    group = make()
    futures = [
        group.submit(keeping(connection, value), patience_s=patience_s)
        for value, patience_s in enumerate((LONG_S, 0.01, LONG_S))
    ]
    assert (results(*futures), connection.statements.count("COMMIT")) == ([0, 1, 2], 1)


def test_patience_ends_where_a_transaction_is_full_of_jobs(
    make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "MAX_JOBS", 2)
    group = make()
    futures = [group.submit(keeping(connection, value), patience_s=LONG_S) for value in range(2)]
    assert results(*futures) == [0, 1]


def test_patience_ends_where_a_transaction_is_full_of_bytes(
    make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "MAX_BYTES", 100)
    assert results(make().submit(keeping(connection, 7), size=100, patience_s=LONG_S)) == [7]


def test_closing_does_not_wait_for_patience(make: Make, connection: Connection) -> None:
    group = make()
    future = group.submit(keeping(connection, 7), patience_s=LONG_S)
    group.close()
    assert future.result(0) == 7


def test_closing_finishes_everything_submitted(
    make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "MAX_JOBS", 2)
    group = make()
    futures = [group.submit(keeping(connection, value)) for value in range(20)]
    group.close()
    assert [future.result(0) for future in futures] == list(range(20))


def test_a_transaction_has_a_limit_of_jobs(
    make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "MAX_JOBS", 2)
    group = make()
    behind_a_commit(
        group,
        connection,
        lambda: [group.submit(keeping(connection, value)) for value in range(5)],
    )
    assert connection.statements.count("COMMIT") == 3


def test_a_transaction_has_a_limit_of_bytes(
    make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "MAX_BYTES", 100)
    group = make()
    behind_a_commit(
        group,
        connection,
        lambda: [group.submit(keeping(connection, value), size=60) for value in range(4)],
    )
    assert connection.statements.count("COMMIT") == 2


def test_a_job_that_raises_is_rolled_back_alone(make: Make, connection: Connection) -> None:
    group = make()

    def insert_and_raise() -> int:
        keeping(connection, 66)()
        raise ValueError("no")

    behind_a_commit(
        group,
        connection,
        lambda: [group.submit(insert_and_raise), group.submit(keeping(connection, 1))],
    )
    assert kept(connection) == [0, 1]


def test_those_before_a_job_that_raises_have_done_their_work_once(
    make: Make, connection: Connection
) -> None:
    group = make()
    futures = behind_a_commit(
        group,
        connection,
        lambda: [
            group.submit(keeping(connection, 1)),
            group.submit(failing),
            group.submit(keeping(connection, 2)),
        ],
    )
    assert (results(futures[0], futures[2]), kept(connection)) == ([1, 2], [0, 1, 2])


def test_a_job_that_raises_fails_with_what_it_raised(make: Make) -> None:
    with pytest.raises(ValueError, match="no"):
        make().submit(failing).result(DEADLINE_S)


def test_a_job_that_raises_is_told_of_before_anything_else_is_begun(
    make: Make, connection: Connection
) -> None:
    told: list[str] = []
    group = make(rolled_back=lambda: told.append("rolled back"))

    def next_one() -> int:
        told.append("begun")
        return 1

    behind_a_commit(group, connection, lambda: [group.submit(failing), group.submit(next_one)])
    # Together first, then each by itself.
    assert told == ["rolled back", "rolled back", "begun"]


def test_of_a_commit_nothing_is_told_as_rolled_back(make: Make, connection: Connection) -> None:
    told: list[str] = []
    group = make(rolled_back=lambda: told.append("rolled back"))
    results(group.submit(keeping(connection, 1)))
    assert told == []


def test_a_commit_that_fails_is_told_of_before_who_asked_knows(
    make: Make, connection: Connection
) -> None:
    told: list[str] = []
    group = make(rolled_back=lambda: told.append("rolled back"))

    connection.failing = "COMMIT"
    for value, patience_s in enumerate((LONG_S, LONG_S, 0.0)):
        future = group.submit(keeping(connection, value), patience_s=patience_s)
        future.add_done_callback(lambda _: told.append("failed"))
    group.close()
    assert told == ["rolled back", "failed", "failed", "failed"]


def test_a_job_whose_own_rollback_fails_is_told_of(make: Make, connection: Connection) -> None:
    told: list[str] = []
    connection.failing = "ROLLBACK TO"
    future = make(rolled_back=lambda: told.append("rolled back")).submit(failing)
    wait([future], DEADLINE_S)
    assert told == ["rolled back"]


def test_a_job_given_up_before_its_turn_is_left_out(make: Make, connection: Connection) -> None:
    group = make()

    def submit() -> list[Future[int]]:
        given_up, other = (group.submit(keeping(connection, value)) for value in (1, 2))
        given_up.cancel()
        return [other]

    behind_a_commit(group, connection, submit)
    assert kept(connection) == [0, 2]


def test_a_job_given_up_in_its_turn_is_carried_out(make: Make, connection: Connection) -> None:
    connection.held_back = "COMMIT"
    future = make().submit(keeping(connection, 1))
    assert connection.reached.wait(DEADLINE_S)
    given_up = future.cancel()
    connection.released.set()
    assert (given_up, future.result(DEADLINE_S)) == (False, 1)


def test_a_job_that_comes_after_the_end_fails_at_once(make: Make, connection: Connection) -> None:
    group = make()
    group.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        group.submit(keeping(connection, 1)).result(DEADLINE_S)
