"""What every store says across ranks: of points that it holds, of partials, and of both together."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.agent.store.batches import RUN, batch, end, loss, param, points, producer
from tests.agent.store.contract.stores import OpenStore, summary
from trackagent.agent.policies import Policies
from trackagent.agent.reducing import reduced
from trackagent.agent.store.contract import (
    Batch,
    NotFound,
    Points,
    ProducerInfo,
    Reader,
    Reduction,
    Writer,
)

WEIGHT = "trackagent/weight"


def rank(number: int, **changes: Any) -> ProducerInfo:
    """Of four on two nodes, in groups tp=0 and tp=1."""
    more = {"world_size": 4, "node": f"n{number // 2}", "groups": (("tp", str(number % 2)),)}
    return producer(number, **{**more, **changes})


RANKS = [rank(number) for number in range(4)]
VALUES = [[1.0, 10.0, 5.0], [2.0, math.nan, 5.0], [3.0, 30.0, 5.0], [6.0, 20.0, 5.0]]


def logged(ranks: list[ProducerInfo] = RANKS, **more: Any) -> Batch:
    """Steps 0 to 2 of each rank."""
    said = [points(one, range(3), value=VALUES[one.rank]) for one in ranks]
    records = {one.producer_id: 3 for one in ranks}
    return batch(more.pop("number", 1), *ranks, points=said, metric_records=records, **more)


def kept_as(said: Batch, keep: str, **more: Any) -> Batch:
    """What an agent makes of it where this is kept of the keys."""
    text = json.dumps({"reduce": "mean", "keep": keep, "every": 1, **more})
    known = Policies()
    known.learn(batch(1, RANKS[0], tags=[param(RANKS[0], "trackagent/define/*", text)]))
    return reduced(said, known, keep_all_ranks=64, stores=True)


def numbers(found: Reduction) -> dict[str, list[float]]:
    """Everything but times, comparable."""
    columns = {
        name: getattr(found, name)
        for name in ("steps", "count", "nans", "world_size", "mean", "std", "min", "max")
    }
    ranks = {"min_rank": found.min_rank, "max_rank": found.max_rank}
    return {name: column.tolist() for name, column in {**columns, **ranks}.items()}


@pytest.mark.parametrize("keep", ["all", "extremes", "none"])
def test_whatever_is_kept_a_reduction_says_the_same(
    writer: Writer, reader: Reader, keep: str
) -> None:
    writer.write(kept_as(logged(), keep))
    found = numbers(reader.reduction(RUN, "loss"))
    assert found.pop("std") == pytest.approx([math.sqrt(3.5), math.sqrt(200 / 3), 0])
    assert found == {
        "steps": [0, 1, 2],
        "count": [4, 3, 4],
        "nans": [0, 1, 0],
        "world_size": [4, 4, 4],
        "mean": [3.0, 20.0, 5.0],
        "min": [1.0, 10.0, 5.0],
        "max": [6.0, 30.0, 5.0],
        "min_rank": [0, 0, 0],
        "max_rank": [3, 2, 0],
    }


@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize(
    ("over", "means"),
    [("node n0", [1.5, 10.0, 5.0]), ("node n1", [4.5, 25.0, 5.0]), ("tp=1", [4.0, 20.0, 5.0])],
)
def test_some_ranks_can_be_looked_at(
    writer: Writer, reader: Reader, keep: str, over: str, means: list[float]
) -> None:
    writer.write(kept_as(logged(), keep))
    found = reader.reduction(RUN, "loss", over)
    assert (found.over, found.mean.tolist(), found.world_size.tolist()) == (over, means, [2, 2, 2])


def test_ranks_that_come_later_are_added_to_what_is_there(writer: Writer, reader: Reader) -> None:
    first, later = logged(RANKS[:1]), logged(RANKS[1:3], number=2)
    writer.write(kept_as(first, "none"))
    assert reader.reduction(RUN, "loss").count.tolist() == [1, 1, 1]
    writer.write(kept_as(later, "all"))  # as where a definition came late
    found = reader.reduction(RUN, "loss")
    assert (found.count.tolist(), found.nans.tolist()) == ([3, 2, 3], [0, 1, 0])
    assert (found.max.tolist(), found.max_rank.tolist()) == ([3, 30, 5], [2, 2, 0])


def test_a_delivery_that_comes_again_changes_nothing_whatever_is_kept_then(
    writer: Writer, reader: Reader
) -> None:
    for keep in ("none", "all", "extremes"):
        writer.write(kept_as(logged(), keep))
    assert reader.reduction(RUN, "loss").count.tolist() == [4, 3, 4]


def test_points_that_stand_in_a_reduction_count_once(writer: Writer, reader: Reader) -> None:
    writer.write(kept_as(logged(), "all", every=2))
    assert reader.reduction(RUN, "loss").count.tolist() == [4, 3, 4]
    assert reader.series(RUN, "loss", "rank 3").steps.tolist() == [0, 2]


def test_of_several_attempts_the_last_one_counts_at_each_step(
    writer: Writer, reader: Reader
) -> None:
    again = rank(0, attempt=2, world_size=2)
    writer.write(kept_as(logged(number=2), "none"))
    said = batch(1, again, points=[points(again, [2, 3], value=[7.0, 8.0])])
    writer.write(kept_as(said, "none"))
    found = reader.reduction(RUN, "loss")
    assert found.steps.tolist() == [0, 1, 2, 3]
    assert found.mean.tolist() == [3.0, 20.0, 7.0, 8.0]
    assert found.world_size.tolist() == [4, 4, 2, 2]


def test_weights_count_in_means_wherever_points_are(open_store: OpenStore) -> None:
    columns = np.array([[1.0, 5.0], [300.0, 100.0]])
    said = [
        Points(one.producer_id, ("loss", WEIGHT), np.array([7]), np.array([7]), values[:, None])
        for one, values in zip(RANKS[:2], columns.T, strict=True)
    ]
    for keep in ("all", "none"):
        writer, reader = open_store()
        writer.write(kept_as(batch(1, *RANKS[:2], points=said), keep))
        found = reader.reduction(RUN, "loss")
        assert (found.mean.tolist(), found.weight.tolist()) == ([2.0], [400.0])
    writer.write(kept_as(batch(2, *RANKS[:2], points=said), "all", reduce="sum"))
    assert [one.key for one in reader.reductions_list(RUN)] == ["loss"]


def test_a_sum_is_one_of_what_was_logged(writer: Writer, reader: Reader) -> None:
    text = json.dumps({"reduce": "sum", "keep": None, "every": 1})
    values = np.array([[10.0], [10.0]])
    said = [
        Points(R.producer_id, ("tokens", WEIGHT), np.array([1]), np.array([1]), values)
        for R in RANKS
    ]
    tag = param(RANKS[0], "trackagent/define/tokens", text)
    writer.write(batch(1, *RANKS, points=said, tags=[tag]))
    found = reader.reduction(RUN, "tokens")
    assert (found.reduce, found.sum.tolist()) == ("sum", [40.0])


@pytest.mark.parametrize("keep", ["all", "extremes", "none"])
def test_reductions_change_no_figure_of_the_run(open_store: OpenStore, keep: str) -> None:
    writer, reader = open_store()
    plain, plain_reader = open_store()
    rest = {"ends": [end(one, logged=3) for one in RANKS], "losses": [loss(RANKS[1], "full", 2)]}
    writer.write(kept_as(logged(**rest), keep))
    plain.write(logged(**rest))
    names = (
        "status",
        "ranks",
        "world_size",
        "records_stored",
        "records_logged",
        "lost_records",
        "attempt",
    )
    told, expected = summary(reader), summary(plain_reader)
    assert [getattr(told, name) for name in names] == [getattr(expected, name) for name in names]
    assert told.points == sum(one.points for one in reader.series_list(RUN))
    assert told.series == len(reader.series_list(RUN))
    assert all(one.source.startswith("rank ") for one in reader.series_list(RUN))
    assert reader.samples_list(RUN) == []
    assert {block.rank for block in reader.export(RUN)} <= {0, 1, 2, 3}
    assert reader.attempts(RUN) == [1]


@pytest.mark.parametrize("keep", ["all", "none"])
def test_the_list_tells_who_reported_the_last_step(
    writer: Writer, reader: Reader, keep: str
) -> None:
    writer.write(kept_as(logged(), keep))
    late = [points(one, [3, 4], keys=("loss", "acc")) for one in RANKS[:2]]
    writer.write(kept_as(batch(2, *RANKS[:2], points=late), keep))
    writer.write(kept_as(batch(3, RANKS[2], points=[points(RANKS[2], [4])]), keep))
    told = [
        (one.key, one.reduce, one.first_step, one.last_step, one.reported, one.world_size)
        for one in reader.reductions_list(RUN)
    ]
    assert told == [("acc", "mean", 3, 4, 2, 4), ("loss", "mean", 0, 4, 3, 4)]


def test_what_is_not_reduced_is_not_in_the_list(writer: Writer, reader: Reader) -> None:
    text = json.dumps({"reduce": "none", "keep": None, "every": 1})
    tag = param(RANKS[0], "trackagent/define/loss", text)
    writer.write(logged(tags=[tag]))
    assert reader.reductions_list(RUN) == []


def test_keys_that_look_like_partials_are_keys_of_ranks(writer: Writer, reader: Reader) -> None:
    odd = ("loss\x1fcount", "loss\x1fsum")
    writer.write(batch(1, RANKS[0], points=[points(RANKS[0], [1], keys=odd)]))
    over_all = replace(RANKS[0], producer_id=b"*" * 16, reduced="all")
    writer.write(batch(2, over_all, points=[points(over_all, [1], keys=odd)]))
    assert [one.key for one in reader.reductions_list(RUN)] == list(odd)


@pytest.mark.parametrize("keep", ["all", "extremes", "none"])
def test_a_copy_in_another_store_says_the_same(open_store: OpenStore, keep: str) -> None:
    (writer, reader), (other, copy) = open_store(), open_store()
    writer.write(kept_as(logged(), keep))
    for one in reader.copies(RUN, lambda origin: 0):
        other.write(kept_as(one, keep))
    for over in ("all", "node n1", "tp=0"):
        assert numbers(copy.reduction(RUN, "loss", over)) == numbers(
            reader.reduction(RUN, "loss", over)
        )


def test_forked_processes_are_no_ranks(writer: Writer, reader: Reader) -> None:
    forked = rank(0, forked=True)
    writer.write(batch(1, RANKS[0], forked, points=[points(RANKS[0], [1]), points(forked, [1])]))
    assert reader.reduction(RUN, "loss").count.tolist() == [1]


@pytest.mark.parametrize(
    ("key", "over"), [("none", "all"), ("loss", "node n9"), ("loss", "tp=7"), ("loss", "")]
)
def test_what_nobody_logged_is_not_found(
    writer: Writer, reader: Reader, key: str, over: str
) -> None:
    writer.write(kept_as(logged(), "none"))
    with pytest.raises(NotFound):
        reader.reduction(RUN, key, over)
