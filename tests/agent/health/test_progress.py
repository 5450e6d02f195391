"""What the watch tells `trackagent top`."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.agent.store.batches import RUN, batch, producer
from trackagent.agent.health.progress import progress
from trackagent.agent.health.settings import RULES, Thresholds
from trackagent.agent.health.watch import Watch
from trackagent.agent.present import Progress, RankProgress
from trackagent.agent.store.contract import EventData, Points, ProducerInfo

STEPS = 20
STEP_S = 0.5


class Watched:
    """A watch over two ranks of which the second takes twice as long in a timer; its clock stands."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.passed: list[tuple[str, str]] = []
        self.watch = Watch(
            Thresholds(),
            rules=frozenset(RULES),
            readings=dict,
            tell=lambda *told: None,
            passed=lambda event, info: self.passed.append((info.source, event.message)),
            clock=lambda: self.now_s,
        )
        for rank in range(2):
            self.log(producer(rank), rank, np.arange(STEPS))

    def log(self, who: ProducerInfo, rank: int, steps: np.ndarray) -> None:  # type: ignore[type-arg]
        times_ns = (steps * STEP_S * 1e9).astype(np.int64)
        values = np.array([1 / (steps + 1), np.full(len(steps), 0.1 * (rank + 1))])
        points = Points(who.producer_id, ("loss", "time/forward"), steps, times_ns, values)
        self.watch.take(batch(1, who, points=[points]))

    def progress(self) -> Progress:
        return progress(self.watch, Thresholds(), clock=lambda: self.now_s)


def test_each_rank_has_its_step_its_pace_and_its_score() -> None:
    watched = Watched()
    watched.now_s += 7.0
    assert watched.progress().ranks == {
        producer(rank).producer_id: RankProgress(
            step=STEPS - 1, still_s=7.0, step_s=STEP_S, score=score
        )
        for rank, score in ((0, 1.0), (1, 0.5))
    }


def test_a_run_has_the_losses_of_its_lowest_rank() -> None:
    assert Watched().progress().losses == {RUN: {"loss": [1 / (step + 1) for step in range(STEPS)]}}


def test_what_is_wrong_stands_until_it_is_over() -> None:
    watched = Watched()
    watched.watch.look()
    (found,) = watched.progress().standing
    assert (found.rule, found.subject, found.run_id) == ("straggler", "rank 1", RUN)
    assert "straggler in forward" in found.message


def test_a_rank_of_which_nothing_came_is_not_known() -> None:
    assert producer(5).producer_id not in Watched().progress().ranks


def test_events_are_passed_on_with_who_told_them() -> None:
    watched = Watched()
    event = EventData(producer(1).producer_id, 5, "info", "halfway")
    watched.watch.take(batch(2, producer(1), events=[event]))
    assert watched.passed == [("rank 1", "halfway")]


def test_what_was_copied_from_another_store_is_no_news() -> None:
    watched = Watched()
    old = producer(0, run="9" * 32)
    steps = np.arange(5)
    values = np.full((1, 5), np.nan)
    points = Points(old.producer_id, ("loss",), steps, steps * 1_000, values)
    told = EventData(old.producer_id, 1, "warning", "loss is NaN")
    here = producer(1)
    also = EventData(here.producer_id, 2, "warning", "a rank that goes on")
    copied = batch(2, old, here, points=[points], events=[told, also])
    watched.watch.take(dataclasses.replace(copied, history=frozenset([old.producer_id])))
    watched.watch.look()
    watched.now_s += 3_600
    watched.watch.look()
    assert old.producer_id not in watched.progress().ranks
    assert not [one for one in watched.watch.standing() if one.run_id == old.run_id]
    assert watched.passed == [("rank 1", "a rank that goes on")]
