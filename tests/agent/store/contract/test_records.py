"""What every store keeps of params, tags, events, losses and gaps."""

from __future__ import annotations

import itertools

import pytest

from tests.agent.store.batches import (
    OTHER_RUN,
    RUN,
    batch,
    event,
    gap,
    loss,
    param,
    producer,
)
from tests.agent.store.contract.stores import (
    AGAIN,
    FORKED,
    R0,
    R1,
    summary,
)
from trackagent.agent.store.contract import (
    Reader,
    RunGap,
    Setting,
    Writer,
)


def test_a_param_keeps_its_first_value(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, params=[param(R0, "lr", "1"), param(R0, "lr", "2")]))
    assert reader.params(RUN) == {"lr": "1"}


def test_a_second_value_of_a_param_is_a_warning(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, R1, params=[param(R0, "lr", "1"), param(R1, "lr", "2", 7)]))
    (warning,) = reader.events(RUN)
    assert (warning.level, warning.source, warning.time_ns) == ("warning", "rank 1", 7)


def test_an_equal_param_is_no_event(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, R1, params=[param(R0, "lr", "1"), param(R1, "lr", "1")]))
    assert reader.events(RUN) == []


def test_params_belong_to_their_run(writer: Writer, reader: Reader) -> None:
    other = producer(run=OTHER_RUN)
    writer.write(batch(1, R0, other, params=[param(R0, "lr", "1"), param(other, "lr", "2")]))
    assert (reader.params(RUN), reader.params(OTHER_RUN)) == ({"lr": "1"}, {"lr": "2"})


@pytest.mark.parametrize("tags", [("old", "new"), ("new", "old")])
def test_the_later_tag_stays(writer: Writer, reader: Reader, tags: tuple[str, str]) -> None:
    times = {"old": 1, "new": 2}
    said = [Setting(R0.producer_id, "t", value, times[value]) for value in tags]
    writer.write(batch(1, R0, tags=said))
    assert reader.tags(RUN) == {"t": "new"}


def test_an_event_comes_back_as_it_was(writer: Writer, reader: Reader) -> None:
    said = event(FORKED, "NaN in “loss”", level="error", step=-3, data={"a": [1, None, {"ü": 1.5}]})
    writer.write(batch(1, FORKED, events=[said]))
    (found,) = reader.events(RUN)
    assert (found.time_ns, found.level, found.step, found.message, found.data, found.source) == (
        *(said.time_ns, said.level, said.step, said.message, said.data),
        "rank 0 pid 4711",
    )


def test_events_come_in_order_of_arrival(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, events=[event(R0, "b", time_ns=2), event(R0, "a", time_ns=1)]))
    writer.write(batch(2, R0, events=[event(R0, "c", time_ns=0)]))
    assert [one.message for one in reader.events(RUN)] == ["b", "a", "c"]


def test_events_after_an_id_are_those_that_came_since(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, events=[event(R0, "a"), event(R0, "b"), event(R0, "c")]))
    first, *rest = reader.events(RUN)
    assert reader.events(RUN, after=first.id) == rest


def test_the_largest_count_of_a_loss_stays(writer: Writer, reader: Reader) -> None:
    for number, records in enumerate((5, 9, 7)):
        writer.write(batch(number, R0, losses=[loss(R0, "full", records)]))
    assert (reader.losses(RUN), summary(reader).lost_records) == ({"full": 9}, 9)


def test_more_of_a_loss_is_added(writer: Writer, reader: Reader) -> None:
    for number, records in enumerate((5, 9, 7)):
        writer.write(batch(number, R0, losses=[loss(R0, "full", records, more=True)]))
    assert (reader.losses(RUN), summary(reader).lost_records) == ({"full": 21}, 21)


def test_more_of_a_loss_is_added_once_however_often_its_batch_is_written(
    writer: Writer, reader: Reader
) -> None:
    for _ in range(2):
        writer.write(batch(1, R0, losses=[loss(R0, "full", 5, more=True)]))
    assert reader.losses(RUN) == {"full": 5}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_more_of_a_loss_comes_on_top_of_the_largest_count(
    writer: Writer, reader: Reader, order: tuple[int, ...]
) -> None:
    said = [loss(R0, "full", 10), loss(R0, "full", 3, more=True), loss(R0, "full", 6)]
    for at in order:
        writer.write(batch(at, R0, losses=[said[at]]))
    assert (reader.losses(RUN), summary(reader).lost_records) == ({"full": 13}, 13)


def test_losses_are_summed_over_runs(writer: Writer, reader: Reader) -> None:
    elsewhere = producer(0, run=OTHER_RUN)
    said = [loss(R0, "full", 1), loss(elsewhere, "full", 2, more=True), loss(R1, "closed", 4)]
    writer.write(batch(1, R0, R1, elsewhere, losses=said))
    assert reader.all_losses() == {"full": 3, "closed": 4}


def test_a_gap_says_where_records_are_missing(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, AGAIN, gaps=[gap(AGAIN, 3, 9, records=7)]))
    assert reader.gaps(RUN) == [RunGap("rank 0", 2, "full", 3, 9, 7, 107, 7)]


def test_gaps_come_in_the_order_of_their_times(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R1, gaps=[gap(R1, 5, 6, time_ns=30)]))
    writer.write(batch(2, R0, gaps=[gap(R0, 5, 6, time_ns=20), gap(R0, 1, 2, time_ns=10)]))
    found = [(one.source, one.first_step) for one in reader.gaps(RUN)]
    assert found == [("rank 0", 1), ("rank 0", 5), ("rank 1", 5)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_gap_that_has_grown_is_one(
    writer: Writer, reader: Reader, order: tuple[int, ...]
) -> None:
    said = [gap(R0, 3, 5, records=3), gap(R0, 3, 9, records=7), gap(R0, 2, 7, records=6)]
    for at in order:
        writer.write(batch(at, R0, gaps=[said[at]]))
    (found,) = reader.gaps(RUN)
    assert (found.first_step, found.last_step, found.records) == (2, 9, 7)


def test_of_too_many_gaps_the_oldest_become_one(writer: Writer, reader: Reader) -> None:
    gaps = [gap(R0, 10 * i, 10 * i + 5, records=i, time_ns=1000 * i) for i in range(1003)]
    writer.write(batch(1, R0, R1, gaps=[*gaps, gap(R1, 0, 1)]))
    found = [one for one in reader.gaps(RUN) if one.source == "rank 0"]
    first, second = found[:2]
    assert (len(found), sum(one.records for one in found)) == (1000, sum(range(1003)))
    assert (first.first_step, first.last_step, first.records) == (0, 35, 6)
    assert (second.first_step, second.last_time_ns) == (40, 4100)


def test_losses_are_summed_over_producers_by_reason(writer: Writer, reader: Reader) -> None:
    said = [loss(R0, "full", 1), loss(R1, "full", 2), loss(R1, "closed", 4)]
    writer.write(batch(1, R0, R1, losses=said))
    assert reader.losses(RUN) == {"full": 3, "closed": 4}
