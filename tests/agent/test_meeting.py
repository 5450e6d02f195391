"""The tables in which ranks meet: one step at a time, bounded, and forgotten."""

from __future__ import annotations

import asyncio

import pytest

from trackagent.agent import meeting
from trackagent.agent.meeting import BadMeeting, Meetings, NoRoom
from trackagent.protos.v1 import agent_pb2

Request = agent_pb2.MeetRequest
GET, SET, ADD, COMPARE_SET = Request.GET, Request.SET, Request.ADD, Request.COMPARE_SET
NOTHING = (False, b"")


class Table:
    """Meetings with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meetings = Meetings(lambda: self.now)

    def ask(
        self,
        operation: Request.Operation.ValueType,
        value: bytes = b"",
        *,
        job: str = "job",
        key: str = "key",
        expected: bytes = b"",
        amount: int = 0,
    ) -> tuple[bool, bytes]:
        request = Request(
            job=job, operation=operation, key=key, value=value, expected=expected, amount=amount
        )
        answer = asyncio.run(self.meetings.meet(request))
        return answer.found, answer.value


@pytest.fixture
def table() -> Table:
    return Table()


def test_what_is_set_is_there_for_the_job(table: Table) -> None:
    assert table.ask(GET) == NOTHING
    assert table.ask(SET, b"x") == (True, b"x")
    assert (table.ask(GET), table.ask(GET, key="other"), table.ask(GET, job="other")) == (
        (True, b"x"),
        NOTHING,
        NOTHING,
    )


def test_an_empty_value_is_there_too(table: Table) -> None:
    table.ask(SET, b"")
    assert table.ask(GET) == (True, b"")


def test_sums_begin_at_0(table: Table) -> None:
    assert [table.ask(ADD, amount=one) for one in (2, -5, 0)] == [
        (True, b"2"),
        (True, b"-3"),
        (True, b"-3"),
    ]


@pytest.mark.parametrize("there", [b"x", b"1_0", b" 1", b"1.0", b"9" * 30])
def test_to_what_is_no_number_nothing_is_added(table: Table, there: bytes) -> None:
    table.ask(SET, there)
    with pytest.raises(BadMeeting, match="no number"):
        table.ask(ADD, amount=1)
    assert table.ask(GET) == (True, there)


def test_a_sum_has_an_end(table: Table) -> None:
    table.ask(ADD, amount=(1 << 63) - 1)
    with pytest.raises(BadMeeting, match="too large"):
        table.ask(ADD, amount=1)


def test_of_many_that_set_one_wins(table: Table) -> None:
    assert table.ask(COMPARE_SET, b"a") == (True, b"a")
    assert table.ask(COMPARE_SET, b"b") == (True, b"a")
    assert table.ask(COMPARE_SET, b"c", expected=b"x") == (True, b"a")
    assert table.ask(COMPARE_SET, b"d", expected=b"a") == (True, b"d")


def test_what_was_expected_and_is_not_there_sets_nothing(table: Table) -> None:
    assert table.ask(COMPARE_SET, b"a", expected=b"x") == NOTHING
    assert table.ask(GET) == NOTHING


def test_names_and_values_have_an_end(table: Table) -> None:
    long = "x" * 250
    assert table.ask(SET, b"v" * 4096, job=long, key=long) == (True, b"v" * 4096)
    for changes in ({"job": ""}, {"key": ""}, {"key": "x" * 251}, {"job": "x" * 271}):
        with pytest.raises(BadMeeting, match="give 1 to 250"):
            table.ask(SET, **changes)
    for value, expected in ((b"v" * 4097, b""), (b"", b"v" * 4097)):
        with pytest.raises(BadMeeting, match="has 4097 bytes: give at most 4096"):
            table.ask(COMPARE_SET, value, expected=expected)
    with pytest.raises(BadMeeting, match="there is no operation 9"):
        table.ask(9)  # type: ignore[arg-type]


def test_jobs_and_keys_have_an_end(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MAX_JOBS", 2)
    monkeypatch.setattr(meeting, "MAX_KEYS", 2)
    for job in "ab":
        table.ask(SET, job=job)
    with pytest.raises(NoRoom, match="2 jobs meet here already"):
        table.ask(SET, job="c")
    assert table.ask(GET, job="c") == NOTHING  # who only looks takes no room
    table.ask(SET, job="a", key="2")
    with pytest.raises(NoRoom, match="2 keys already"):
        table.ask(SET, job="a", key="3")
    assert table.ask(SET, b"x", job="a", key="2") == (True, b"x")


def test_bytes_have_an_end_and_are_given_back(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "MAX_BYTES", 3 * 4096)
    table.ask(SET, b"v" * 4096, key="1")
    table.ask(SET, b"v" * 4096, key="2")
    with pytest.raises(NoRoom, match="bytes already"):
        table.ask(SET, b"v" * 4096, key="3")
    table.ask(SET, b"", key="1")
    table.ask(SET, b"v" * 4096, key="3")
    table.now = meeting.FORGOTTEN_AFTER_S
    for key in "12":
        table.ask(SET, b"v" * 4096, job="next", key=key)


def test_what_is_there_grows_within_the_bytes_too(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "MAX_BYTES", 3 * 4096)
    for key in "123":
        table.ask(SET, b"v" * 1000, key=key)
    for key in "12":
        table.ask(SET, b"v" * 4096, key=key)
    with pytest.raises(NoRoom, match="bytes already"):
        table.ask(SET, b"v" * 4096, key="3")
    with pytest.raises(NoRoom, match="bytes already"):
        table.ask(COMPARE_SET, b"w" * 4096, key="3", expected=b"v" * 1000)
    assert table.ask(GET, key="3") == (True, b"v" * 1000)
    assert table.ask(SET, b"w" * 1000, key="3") == (True, b"w" * 1000)
    table.ask(SET, b"", key="1")
    table.ask(SET, b"v" * 4096, key="3")


def test_a_job_is_forgotten_a_day_after_its_last_use(table: Table) -> None:
    table.ask(SET, b"1", job="used")
    table.ask(SET, b"1", job="unused")
    table.now = meeting.FORGOTTEN_AFTER_S - 1
    table.ask(GET, job="used")
    table.now = meeting.FORGOTTEN_AFTER_S
    assert (table.ask(GET, job="used"), table.ask(GET, job="unused")) == ((True, b"1"), NOTHING)
