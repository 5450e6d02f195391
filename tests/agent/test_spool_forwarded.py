"""What other agents forward, in the spool: each range of an origin once, however it comes."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.agent.samples import TIME_NS, producer
from tests.agent.spools import DATA, ID, OpenSpool, delivery, spooled
from tests.agent.test_spool_salvage import spoil
from tests.fakes import Folders
from trackagent.agent.decode import decode
from trackagent.agent.spool import Overlaps, Spool, SpoolFull, TooManyHoles
from trackagent.agent.spooltables import FORWARDED_LANE, MAX_RANGES
from trackagent.agent.store.contract import BatchId

ORIGIN = "ab" * 16
DAY_NS = 86_400 * 10**9


def accept(spool: Spool, first: int, last: int, *, origin: str = ORIGIN, size: int = 10) -> None:
    part = f"{first}-{last}".encode().ljust(size)
    spool.accept(BatchId(origin, first, last), part, "host-b").result()


def parts(spool: Spool) -> list[bytes]:
    """What waits for the sink."""
    return [data.rstrip() for _, _, data in spooled(spool)]


def test_a_part_goes_to_the_sink_unread(opened: Spool) -> None:
    accept(opened, 1, 4)
    batch = decode(delivery(opened), opened.keys)
    ((forwarder, part),) = batch.parts
    assert part.rstrip() == b"1-4"
    assert forwarder.producer_id == bytes.fromhex(ORIGIN)
    assert forwarder.node == "host-b"
    assert not batch.producers


def test_a_range_that_came_changes_nothing(opened: Spool) -> None:
    for first, last in ((1, 4), (5, 5), (1, 4), (5, 5)):
        accept(opened, first, last)
    assert parts(opened) == [b"1-4", b"5-5"]


def test_ranges_may_come_in_any_order(opened: Spool) -> None:
    for first, last in ((9, 12), (1, 4), (5, 8), (9, 12)):
        accept(opened, first, last)
    assert parts(opened) == [b"9-12", b"1-4", b"5-8"]
    assert opened.arrived(ORIGIN).result() == [(1, 12)]


def test_origins_have_nothing_to_do_with_each_other(opened: Spool) -> None:
    accept(opened, 1, 4)
    accept(opened, 1, 4, origin="cd" * 16)
    assert len(parts(opened)) == 2


def test_a_range_of_which_only_something_came_is_refused(opened: Spool) -> None:
    accept(opened, 3, 6)
    with pytest.raises(Overlaps, match=f"5 to 9 of {ORIGIN} overlaps 3 to 6"):
        accept(opened, 5, 9)
    assert parts(opened) == [b"3-6"]


def test_what_a_store_knows_of_before_does_not_come_again(opened: Spool) -> None:
    opened.note_arrived(ORIGIN, [(1, 7), (9, 9)]).result()
    for first, last in ((1, 7), (8, 8), (9, 9)):
        accept(opened, first, last)
    assert parts(opened) == [b"8-8"]


def test_a_full_spool_takes_no_part(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=100)
    spool.add_sink("store").result()
    accept(spool, 1, 1, size=80)
    with pytest.raises(SpoolFull):
        accept(spool, 2, 2, size=80)
    assert spool.arrived(ORIGIN).result() == [(1, 1)]


def test_who_forwards_is_nobody_who_logs(opened: Spool) -> None:
    before = opened.not_ended().result()
    accept(opened, 1, 1)
    assert opened.not_ended().result() == before


def test_what_came_is_known_after_a_restart(open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.add_sink("store").result()
    accept(spool, 1, 4)
    spool.close()
    again = open_spool()
    accept(again, 1, 4)
    assert parts(again) == [b"1-4"]


def test_what_came_is_known_after_damage(open_spool: OpenSpool, folders: Folders) -> None:
    spool = open_spool()
    spool.add_sink("store").result()
    accept(spool, 1, 4)
    spool.delivered("store", delivery(spool).id.last).result()
    spool.close()
    spoil(folders.state / "spool.db", "arrived")
    again = open_spool()
    assert again.arrived(ORIGIN).result() == [(1, 4)]
    accept(again, 1, 4)
    assert parts(again) == []


def test_a_spool_of_before_forwarding_is_taken_over(
    open_spool: OpenSpool, folders: Folders
) -> None:
    spool = open_spool()
    spool.open_producer(producer(), {}).result()
    spool.add_sink("store").result()
    spool.append(ID, 0, 0, DATA).result()
    spool.close()
    connection = sqlite3.connect(folders.state / "spool.db")
    connection.executescript(
        "DROP TABLE arrived; DROP TABLE arrived_copy; PRAGMA user_version = 2;"
    )
    connection.close()
    again = open_spool()
    accept(again, 1, 4)
    assert [data.rstrip() for _, _, data in spooled(again)] == [DATA, b"1-4"]


def test_a_sink_that_begins_now_gets_what_comes_then(opened: Spool) -> None:
    opened.append(ID, 0, 0, DATA).result()
    opened.add_sink("hub", from_now=True).result()
    accept(opened, 1, 4)
    assert [lane for lane, _, _ in spooled(opened, "hub")] == [FORWARDED_LANE]


def test_nothing_is_kept_for_a_sink_that_is_removed(opened: Spool) -> None:
    opened.add_sink("hub").result()
    accept(opened, 1, 4)
    opened.delivered("store", delivery(opened).id.last).result()
    assert opened.statistics().result()["batches"] == 1
    opened.remove_sink("hub").result()
    assert opened.statistics().result()["batches"] == 0
    assert opened.sinks().result() == ["store"]


def _covered(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {number for first, last in ranges for number in range(first, last + 1)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.permutations(range(30)), st.integers(1, 30))
def test_what_came_is_what_was_accepted(spool: Spool, order: list[int], count: int) -> None:
    origin = f"{hash((*order, count)) % (1 << 128):032x}"
    for number in order[:count]:
        accept(spool, 3 * number + 1, 3 * number + 3, origin=origin)
    found = spool.arrived(origin).result()
    expected = {3 * number + k for number in order[:count] for k in (1, 2, 3)}
    assert _covered(found) == expected
    assert all(low[1] + 1 < high[0] for low, high in itertools.pairwise(found))


def test_what_is_missing_may_come_however_much_has_come_since(opened: Spool) -> None:
    apart = [(number, number) for number in range(1, 2 * MAX_RANGES, 2)]
    opened.note_arrived(ORIGIN, apart).result()
    with pytest.raises(TooManyHoles, match="dead letters"):
        accept(opened, 9_000, 9_001)
    assert opened.arrived(ORIGIN).result() == apart
    accept(opened, 8_192, 8_192)
    accept(opened, 2, 2)
    accept(opened, 9_000, 9_001)
    assert parts(opened) == [b"8192-8192", b"2-2", b"9000-9001"]


@pytest.mark.parametrize(
    ("range_", "other"),
    [((1, 3), (3, 4)), ((6, 9), (3, 6)), ((5, 9), (3, 6)), ((1, 9), (3, 6)), ((5, 7), (8, 9))],
)
def test_a_range_with_something_new_and_something_that_came_is_refused(
    opened: Spool, range_: tuple[int, int], other: tuple[int, int]
) -> None:
    accept(opened, *other)
    accept(opened, 6, 6) if other == (8, 9) else None
    with pytest.raises(Overlaps):
        accept(opened, *range_)


def test_what_came_of_an_agent_is_known_until_a_week_after_its_last_part(
    open_spool: OpenSpool,
) -> None:
    now_ns = TIME_NS
    spool = open_spool(clock=lambda: now_ns)
    spool.add_sink("store").result()
    for number in range(1, 4):
        accept(spool, number, number)
        spool.delivered("store", delivery(spool).id.last).result()
        now_ns += 6 * DAY_NS
        spool.forget_ended([]).result()
        assert spool.arrived(ORIGIN).result() == [(1, number)]
    now_ns += 2 * DAY_NS
    spool.forget_ended([]).result()
    assert spool.arrived(ORIGIN).result() == []


def test_a_sink_apart_has_ids_that_no_other_has(open_spool: OpenSpool) -> None:
    spool = open_spool()

    def origins() -> list[str]:
        return [
            spool.add_sink("store").result(),
            *(spool.add_sink(hub, from_now=True, apart=True).result() for hub in ("a", "b")),
        ]

    found = origins()
    assert len(set(found)) == 3
    assert all(len(bytes.fromhex(one)) == 16 for one in found)
    for hub in ("a", "b"):
        spool.remove_sink(hub).result()
    assert origins() == found
