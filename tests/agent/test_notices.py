"""What the agent itself says in a run, as a reader of the journal's format finds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.agent.samples import producer
from trackagent.agent import notices
from trackagent.agent.deaths import LastRecord
from trackagent.client import record
from trackagent.client.record import NO_STEP, Kind

LAST = LastRecord(step=1234, time_ns=1_700_000_000_123_456_789)


def said(notice: bytes) -> list[tuple[Kind, Mapping[str, Any]]]:
    found = record.scan(notice)
    assert (found.damage, found.end) == ([], len(notice))
    records = [record.decode(notice, offset) for offset in found.offsets]
    assert {one.step for one in records} <= {NO_STEP}
    return [(one.kind, one.data or {}) for one in records]


def message(notice: bytes) -> str:
    return str(said(notice)[0][1]["message"])


def test_a_death_names_rank_node_step_and_time() -> None:
    event = {
        "level": "error",
        "message": "rank 3 on node host-a (pid 4711) died without finish(): last step 1234 at "
        "2023-11-14 22:13:20 UTC",
        "rank": 3,
        "node": "host-a",
        "pid": 4711,
        "last_step": 1234,
        "last_time_ns": 1_700_000_000_123_456_789,
        "oom_killed": 0,
    }
    assert said(notices.died(producer(3), LAST, 0)) == [(Kind.EVENT, event)]


@pytest.mark.parametrize(("kills", "shown"), [(1, "1 process"), (2, "2 processes")])
def test_a_death_says_that_memory_ran_out(kills: int, shown: str) -> None:
    [(_, event)] = said(notices.died(producer(3), LAST, kills))
    assert event["message"].endswith(
        f"; since it was first seen, the kernel killed {shown} of its control group for lack of memory"
    )
    assert event["oom_killed"] == kills


def test_a_death_of_a_rank_that_logged_nothing_says_so() -> None:
    notice = notices.died(producer(), LastRecord(), None)
    assert message(notice).endswith("no step is known of it")


def test_a_time_that_no_calendar_has_does_not_hold_up_the_notice() -> None:
    assert "last step 1 at" in message(notices.died(producer(), LastRecord(1, 2**63 - 1), None))


def test_who_ends_without_a_word_or_a_trace_is_killed() -> None:
    [(kind, end)] = said(notices.killed())
    assert (kind, end["status"]) == (Kind.FINISH, "killed")
    [(_, event), (kind, end)] = said(notices.vanished(producer(3)))
    assert (kind, end["status"]) == (Kind.FINISH, "killed")
    assert event["message"].startswith("rank 3 on node host-a (pid 4711) never ended: ")
    assert event["message"].endswith(end["error"])


@pytest.mark.parametrize(
    ("notice", "reason"),
    [
        (notices.unreadable_segment("torn"), notices.UNREADABLE),
        (notices.lost_bytes(0, 8, 72, "torn"), notices.LOST),
    ],
)
def test_what_nobody_can_count_is_an_event_and_a_loss_of_one(notice: bytes, reason: str) -> None:
    [(_, event), loss] = said(notice)
    assert event["message"].endswith("torn")
    assert loss == (Kind.LOSS, {reason: 1})


@pytest.mark.parametrize(
    ("start", "shown"),
    [(8, "64 bytes of lane 5 before offset 72"), (None, "bytes of lane 5 before")],
)
def test_lost_bytes_are_named_as_far_as_they_are_known(start: int | None, shown: str) -> None:
    assert message(notices.lost_bytes(5, start, 72, "torn")).startswith(shown)


def test_a_journal_that_begins_at_its_beginning_gives_nothing_to_say() -> None:
    assert notices.taken_elsewhere({0: 0, 1: 0}) == b""
    [(_, event)] = said(notices.taken_elsewhere({0: 0, 1: 64, 2: 8}))
    assert (event["before"], event["message"][:8]) == ({"1": 64, "2": 8}, "72 bytes")
