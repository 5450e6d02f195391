"""Who logs on this node, and what they are told."""

from __future__ import annotations

from tests.agent.collect.sampled import stored
from tests.agent.samples import producer
from tests.agent.spools import ID
from tests.fakes import wait_until
from trackagent.agent.active import Active
from trackagent.agent.collect.contract import Incident
from trackagent.agent.spool import Spool

OTHER = "f" * 32
HOT = Incident("warning", "GPU 3 is too hot", {"gpu": 3, "celsius": 95.0})


def test_nobody_is_here_at_first(spool: Spool) -> None:
    assert Active(spool).runs() == {}


def test_a_run_is_here_once_it_is_opened(spool: Spool) -> None:
    active = Active(spool)
    assert active.ranks() == []
    spool.open_producer(producer(3), {}).result()
    assert active.ranks() == [producer(3)]


def test_a_run_that_ended_is_not_here(opened: Spool) -> None:
    active = Active(opened)
    assert active.ranks() == [producer()]
    opened.end_producer(ID).result()
    assert active.runs() == {}


def test_a_run_is_known_by_its_lowest_rank_here(spool: Spool) -> None:
    for rank in (5, 2, 9):
        spool.open_producer(producer(rank), {}).result()
    assert Active(spool).runs() == {producer().run_id: producer(2)}


def test_a_run_is_known_by_its_last_attempt(spool: Spool) -> None:
    spool.open_producer(producer(0), {}).result()
    again = producer(1, attempt=2)
    spool.open_producer(again, {}).result()
    assert Active(spool).runs() == {producer().run_id: again}


def test_what_is_sampled_is_no_run_that_is_here(spool: Spool) -> None:
    spool.open_producer(producer(0, sampled="node host-a"), {}).result()
    assert Active(spool).runs() == {}


def test_what_a_rank_forked_is_no_rank(spool: Spool) -> None:
    spool.open_producer(producer(0, forked=True), {}).result()
    assert Active(spool).ranks() == []


def test_an_event_is_told_to_every_run_here_once(opened: Spool) -> None:
    opened.open_producer(producer(1), {}).result()
    opened.open_producer(producer(2, run_id=OTHER), {}).result()
    assert Active(opened).tell(HOT) == 2
    events = stored(opened).events
    assert [
        (one.producer_id, one.level, one.message, one.data)
        for one in sorted(events, key=lambda one: one.producer_id)
    ] == [
        (producer(rank).producer_id, "warning", HOT.message, {"gpu": 3, "celsius": 95.0})
        for rank in (0, 2)
    ]


def test_an_event_can_be_for_one_run(opened: Spool) -> None:
    other = producer(2, run_id=OTHER)
    opened.open_producer(other, {}).result()
    assert Active(opened).tell(HOT, to=other) == 1
    assert [one.producer_id for one in stored(opened).events] == [producer(2).producer_id]


def test_an_event_can_be_for_a_run_that_has_ended(spool: Spool) -> None:
    gone = producer(0)
    spool.open_producer(gone, {}).result()
    spool.end_producer(gone.producer_id).result()
    assert Active(spool).tell(HOT, to=gone) == 1
    assert [one.producer_id for one in stored(spool).events] == [gone.producer_id]


def test_with_nobody_here_nobody_is_told(spool: Spool) -> None:
    assert Active(spool).tell(HOT) == 0


def test_a_run_of_another_node_is_told_by_this_one(spool: Spool) -> None:
    far = producer(2, run_id=OTHER, node="host-b")
    active = Active(spool, "host-a")
    for _ in range(2):
        assert active.tell(HOT, to=far) == 1
        wait_until(lambda: len(spool.producers().result()) == 1)
        wait_until(lambda: spool.not_ended().result() == [])
    spool.add_sink("store").result()
    wait_until(lambda: spool.statistics().result()["batches"] == 2)
    (voice,) = spool.producers().result()
    assert [one.message for one in stored(spool).events] == [HOT.message] * 2
    assert (voice.run_id, voice.source) == (OTHER, "node host-a")
    assert active.ranks() == []
