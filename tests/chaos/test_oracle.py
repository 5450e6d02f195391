"""The oracle finds what is wrong: each made-up fault of a store, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.chaos import oracle
from tests.chaos.oracle import StoredEvent, StoredPoint, StoredRun, Violation, check
from tests.chaos.records import ENDED, KILLED, RUNNING, Metrics, Notes, Producer, Text, record

RUN_ID = "ab" * 16
PRODUCER = Producer(RUN_ID, 3, 1, 7)
COUNT = 60


def notes(**changes: object) -> Notes:
    """60 records of PRODUCER, all of which have returned."""
    numbers = dict.fromkeys(range(COUNT), 0)
    return replace(Notes(PRODUCER, numbers, numbers, {}, ENDED), **changes)


def stored(numbers: range = range(COUNT), producer: Producer = PRODUCER) -> StoredRun:
    """What a store without fault holds of these records."""
    points, settings, events, records = [], {"param": {}, "tag": {}}, [], 0
    for number in numbers:
        one = record(producer, number)
        if isinstance(one, Metrics):
            time_ns = 10**9 * (one.time_s or 5)
            points += [
                StoredPoint(producer.source, one.step, key, bits, time_ns)
                for key, bits in one.bits.items()
            ]
            records += 1
        elif one.kind == "event":
            events.append(StoredEvent(producer.source, one.level, one.text, one.step))
        else:
            settings[one.kind][one.key] = one.text
    return StoredRun(points, settings["param"], settings["tag"], events, (), records)


def first(kind: str) -> int:
    """The number of the first record of a kind: metrics, timed, param, tag or event."""
    for number in range(COUNT):
        one = record(PRODUCER, number)
        if isinstance(one, Text) and one.kind == kind:
            return number
        if isinstance(one, Metrics) and kind == ("timed" if one.time_s else "metrics"):
            return number
    raise AssertionError(kind)


def kinds(noted: Notes, run: StoredRun) -> list[str]:
    return [violation.kind for violation in check([noted], {RUN_ID: run})]


def test_a_store_without_fault_passes() -> None:
    assert check([notes()], {RUN_ID: stored()}) == []


def test_records_of_the_user_and_the_agent_are_not_looked_at() -> None:
    run = stored()
    run = replace(
        run,
        params={**run.params, "lr": "1"},
        tags={**run.tags, "git.commit": "abc"},
        events=[*run.events, StoredEvent("rank 3", "error", "the process ended", None)],
    )
    assert check([notes()], {RUN_ID: run}) == []


def test_a_run_that_is_not_stored_has_lost_everything() -> None:
    violations = check([notes()], {})
    assert [violation.kind for violation in violations] == [oracle.LOST] * COUNT


@pytest.mark.parametrize("kind", ["metrics", "timed", "param", "tag", "event"])
def test_a_lost_record_is_found(kind: str) -> None:
    number = first(kind)
    before, after = stored(range(number)), stored(range(number + 1, COUNT))
    run = StoredRun(
        [*before.points, *after.points],
        {**before.params, **after.params},
        {**before.tags, **after.tags},
        [*before.events, *after.events],
        records_stored=before.records_stored + after.records_stored,
    )
    assert kinds(notes(), run) == [oracle.LOST]
    assert f"record {number}:" in check([notes()], {RUN_ID: run})[0].what


def changed_point(change: Callable[[StoredPoint], list[StoredPoint]]) -> StoredRun:
    """What is stored when a point of the first record with several keys was changed."""
    run = stored()
    step = next(p.step for p in run.points if sum(q.step == p.step for q in run.points) > 1)
    at = next(i for i, point in enumerate(run.points) if point.step == step)
    return replace(run, points=[*run.points[:at], *change(run.points[at]), *run.points[at + 1 :]])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda point: [], [oracle.LOST]),
        (lambda point: [point, point], [oracle.DOUBLED]),
        (lambda point: [point._replace(bits=point.bits ^ 1)], [oracle.WRONG]),
        (lambda point: [point, point._replace(key="strange")], [oracle.NEVER_LOGGED]),
        (
            lambda point: [point, point._replace(step=1 << 40)],
            [oracle.NEVER_LOGGED, oracle.MISCOUNTED],
        ),
        (
            lambda point: [point, point._replace(source="rank 9")],
            [oracle.NEVER_LOGGED, oracle.MISCOUNTED],
        ),
    ],
    ids=["gone", "twice", "other bits", "another key", "another step", "another rank"],
)
def test_a_wrong_point_is_found(
    change: Callable[[StoredPoint], list[StoredPoint]], expected: list[str]
) -> None:
    assert kinds(notes(), changed_point(change)) == expected


def test_a_time_that_is_not_the_one_given_is_found() -> None:
    run = stored()
    step = PRODUCER.step(first("timed"))
    points = [p._replace(time_ns=p.time_ns + (p.step == step)) for p in run.points]
    assert set(kinds(notes(), replace(run, points=points))) == {oracle.WRONG}


def test_a_doubled_event_is_found() -> None:
    run = stored()
    assert kinds(notes(), replace(run, events=[*run.events, run.events[0]])) == [oracle.DOUBLED]


@pytest.mark.parametrize("name", ["params", "tags"])
def test_a_changed_setting_is_found(name: str) -> None:
    run = stored()
    settings = dict(getattr(run, name))
    settings[next(iter(settings))] += "x"
    assert kinds(notes(), replace(run, **{name: settings})) == [oracle.WRONG]


def test_what_nobody_logged_is_found() -> None:
    run = stored()
    event = StoredEvent("rank 3", "info", "chaos/3/1/999 made up", None)
    run = replace(
        run,
        params={**run.params, "chaos/3/1/999": "x"},
        tags={**run.tags, "chaos/3/1/998": "x"},
        events=[*run.events, event],
    )
    assert kinds(notes(), run) == [oracle.NEVER_LOGGED] * 3


@pytest.mark.parametrize("kept", [True, False])
def test_the_call_under_way_when_a_process_was_killed_may_have_come_or_not(kept: bool) -> None:
    last = COUNT - 1
    returned = dict.fromkeys(range(last), 0)
    noted = notes(returned=returned, state=KILLED)
    assert check([noted], {RUN_ID: stored(range(COUNT if kept else last))}) == []


@pytest.mark.parametrize("state", [ENDED, KILLED])
def test_calls_that_never_came_back_are_found(state: str) -> None:
    noted = notes(returned=dict.fromkeys(range(COUNT - 2), 0), state=state)
    assert kinds(noted, stored()) == [oracle.LATE] * 2


def test_a_refused_record_is_not_missed_but_counted() -> None:
    last = COUNT - 1
    noted = notes(returned=dict.fromkeys(range(last), 0), refused={last: 0})
    run = stored(range(last))
    assert check([noted], {RUN_ID: replace(run, lost_records=1)}) == []
    assert kinds(noted, run) == [oracle.MISCOUNTED]
    assert kinds(noted, replace(stored(), lost_records=1)) == [oracle.NEVER_LOGGED]


def test_a_loss_that_did_not_happen_is_found() -> None:
    assert kinds(notes(), replace(stored(), lost_records=1)) == [oracle.MISCOUNTED]


def test_a_wrong_count_is_found_when_all_have_ended() -> None:
    run = stored()
    run = replace(run, records_stored=run.records_stored + 1)
    assert kinds(notes(), run) == [oracle.MISCOUNTED]
    assert kinds(notes(state=RUNNING), run) == []


def test_records_that_the_agent_could_not_read_are_found() -> None:
    event = StoredEvent("rank 3", "error", "unreadable records: 8 bytes: zeroed", None)
    run = stored()
    assert kinds(notes(), replace(run, events=[*run.events, event])) == [oracle.WRONG]


def test_damage_in_the_store_is_found() -> None:
    run = replace(stored(), damage=["12 points of loss/0"])
    assert check([notes()], {RUN_ID: run}) == [
        Violation(oracle.WRONG, "abababab: damage: 12 points of loss/0")
    ]
