"""A new spool takes no part that came before it was."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.agent.samples import TIME_NS
from tests.agent.spools import OpenSpool, delivery, spooled
from trackagent.agent.arrivals import Arrivals, AtTheHub
from trackagent.agent.spool import Forgotten, Spool
from trackagent.agent.store.contract import BatchId, StoreError

ORIGIN, OTHER = "ab" * 16, "cd" * 16


class Before:
    """What a store knows; the first answers may be what went wrong."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.problems: list[Exception] = []

    def __call__(self, origin: str) -> Sequence[tuple[int, int]]:
        self.asked.append(origin)
        if self.problems:
            raise self.problems.pop()
        return [(1, 4), (9, 9)] if origin == ORIGIN else []


@pytest.fixture
def before() -> Before:
    return Before()


@pytest.fixture
def arrivals(opened: Spool, before: Before) -> Iterator[Arrivals]:
    one = Arrivals(opened, before)
    yield one
    one.close()


def accept(arrivals: Arrivals, first: int, last: int, origin: str = ORIGIN) -> None:
    part = f"{first}-{last}".encode().ljust(8)
    arrivals.accept(BatchId(origin, first, last), part, "host-b").result()


def test_what_the_store_has_is_not_taken_again(arrivals: Arrivals, opened: Spool) -> None:
    for ends in ((1, 4), (5, 8), (9, 9), (10, 10)):
        accept(arrivals, *ends)
    assert [data.rstrip() for _, _, data in spooled(opened)] == [b"5-8", b"10-10"]
    assert arrivals.arrived(ORIGIN).result() == [(1, 10)]


def test_it_is_asked_once_for_each_origin(arrivals: Arrivals, before: Before) -> None:
    for _ in range(3):
        accept(arrivals, 5, 8)
        accept(arrivals, 5, 8, OTHER)
    assert sorted(before.asked) == [ORIGIN, OTHER]


def test_who_asks_for_an_origin_first_hears_what_the_store_has(arrivals: Arrivals) -> None:
    assert arrivals.arrived(ORIGIN).result() == [(1, 4), (9, 9)]


def test_nothing_is_taken_while_the_store_does_not_answer(
    arrivals: Arrivals, opened: Spool, before: Before
) -> None:
    before.problems.append(StoreError("locked"))
    with pytest.raises(StoreError):
        accept(arrivals, 1, 4)
    assert spooled(opened) == []
    accept(arrivals, 1, 4)
    assert spooled(opened) == []


def test_a_spool_that_knows_an_origin_needs_to_ask_nobody(
    arrivals: Arrivals, opened: Spool, before: Before
) -> None:
    opened.accept(BatchId(ORIGIN, 20, 20), b"20-20   ", "host-b").result()
    accept(arrivals, 21, 21)
    assert before.asked == []


def test_it_is_asked_again_for_what_the_spool_has_forgotten(
    open_spool: OpenSpool, before: Before
) -> None:
    now_ns = TIME_NS
    spool = open_spool(clock=lambda: now_ns)
    arrivals = Arrivals(spool, before)
    spool.add_sink("store").result()
    accept(arrivals, 5, 8)
    spool.delivered("store", delivery(spool).id.last).result()
    now_ns += 8 * 86_400 * 10**9
    spool.forget_ended([]).result()
    assert arrivals.arrived(ORIGIN).result() == [(1, 4), (9, 9)]
    accept(arrivals, 1, 4)
    assert (spooled(spool), before.asked) == ([], [ORIGIN, ORIGIN])
    arrivals.close()


def test_what_the_spool_forgets_while_it_is_asked_is_asked_again(
    open_spool: OpenSpool, before: Before
) -> None:
    now_ns = TIME_NS
    spool = open_spool(clock=lambda: now_ns)
    spool.add_sink("store").result()

    def forgetting(origin: str) -> Sequence[tuple[int, int]]:
        """The answer is on its way while something is forgotten."""
        nonlocal now_ns
        found = before(origin)
        spool.accept(BatchId(OTHER, 1, 1), b"1-1     ", "host-c").result()
        spool.delivered("store", delivery(spool).id.last).result()
        now_ns += 8 * 86_400 * 10**9
        spool.forget_ended([]).result()
        return found

    arrivals = Arrivals(spool, forgetting)
    with pytest.raises(Forgotten):
        accept(arrivals, 5, 8)
    accept(arrivals, 5, 8)
    assert [data.rstrip() for _, _, data in spooled(spool)] == [b"5-8"]
    arrivals.close()


def test_who_passes_parts_on_takes_none_for_one_that_came_before(
    opened: Spool, before: Before
) -> None:
    arrivals = Arrivals(opened, before, passes_on=True)
    assert arrivals.arrived(ORIGIN).result() == [(1, 4), (9, 9)]
    accept(arrivals, 2, 9)
    assert [data.rstrip() for _, _, data in spooled(opened)] == [b"2-9"]
    assert arrivals.arrived(ORIGIN).result() == [(2, 9)]
    arrivals.close()


def test_who_passes_parts_on_asks_nobody(opened: Spool, before: Before) -> None:
    arrivals = Arrivals(opened, before, passes_on=True)
    before.problems.append(StoreError("the hub is away"))
    accept(arrivals, 5, 8)
    assert before.asked == []
    assert [data.rstrip() for _, _, data in spooled(opened)] == [b"5-8"]
    arrivals.close()


class OneAtATime:
    """A hub's sink, which is for one thread, and sees whether it is used by one."""

    def __init__(self) -> None:
        self.most = self._inside = 0

    def last_accepted(self, origin: str) -> int:
        self._inside += 1
        self.most = max(self.most, self._inside)
        time.sleep(0)  # so that others get their turn
        self._inside -= 1
        return 9 if origin == ORIGIN else 0


def test_a_hub_is_asked_by_one_thread_at_a_time() -> None:
    hub = OneAtATime()
    asked = AtTheHub(hub)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(asked, [ORIGIN, OTHER] * 500))
    assert answers == [[(9, 9)], []] * 500
    assert hub.most == 1
