"""What every store does, whichever it is: the contract as facts, run over each implementation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.agent.store.batches import (
    OTHER_RUN,
    RUN,
    batch,
    end,
    event,
    gap,
    loss,
    param,
    points,
    producer,
)
from tests.fakes_store import MemoryStore
from trackagent.agent.store import open_reader, open_writer
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    NotFound,
    Points,
    Reader,
    Rejected,
    RunGap,
    RunSummary,
    Setting,
    Writer,
)

R0, R1 = producer(0), producer(1)
AGAIN = producer(0, attempt=2)
FORKED = producer(0, forked=True)

OpenStore = Callable[[], tuple[Writer, Reader]]


@pytest.fixture(params=["sqlite", "sqlite merged at once", "memory"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens new, empty stores."""
    opened: list[Writer | Reader] = []
    numbers = itertools.count()

    def open_one() -> tuple[Writer, Reader]:
        if request.param == "memory":
            fake = MemoryStore()
            return fake, fake
        path = tmp_path / str(next(numbers)) / "store.db"
        writer, reader = open_writer(path), open_reader(path)
        opened.extend((writer, reader))
        return (Merging(writer) if "merged" in request.param else writer), reader

    yield open_one
    for one in opened:
        one.close()


class Merging:
    """A writer that merges after every batch."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.compact, self.close = writer.compact, writer.close

    def write(self, batch: Batch) -> None:
        self._writer.write(batch)
        assert self._writer.compact(60) is False


@pytest.fixture
def writer(store: tuple[Writer, Reader]) -> Writer:
    return store[0]


@pytest.fixture
def reader(store: tuple[Writer, Reader]) -> Reader:
    return store[1]


@pytest.fixture
def store(open_store: OpenStore) -> tuple[Writer, Reader]:
    return open_store()


def everything(reader: Reader) -> dict[str, Any]:
    """All answers of a store that do not name an order of arrival, comparable."""
    answers: dict[str, Any] = {"runs": reader.runs()}
    for run in reader.runs():
        infos = reader.series_list(run.run_id)
        answers[run.run_id] = (
            reader.params(run.run_id),
            reader.tags(run.run_id),
            reader.losses(run.run_id),
            reader.gaps(run.run_id),
            sorted((one.time_ns, one.message) for one in reader.events(run.run_id)),
            [(*astuple(info), bits(info.last_value)) for info in infos],
            [arrays(reader.series(run.run_id, info.key, info.source)) for info in infos],
            [arrays(reader.buckets(run.run_id, info.key, info.source, 7)) for info in infos],
            sorted(arrays(block) for block in exported(reader, run.run_id)),
        )
    return answers


def exported(reader: Reader, run_id: str) -> list[Any]:
    """Every stored point on its own: how points are cut into blocks is nobody's business."""
    found = []
    for block in reader.export(run_id):
        for at, step in enumerate(block.steps):
            values = tuple(bits(value) for value in block.values[:, at])
            rest = (block.attempt, int(step), int(block.times_ns[at]), values)
            found.append((block.source, block.rank, block.keys, *rest))
    return found


def astuple(info: Any) -> tuple[Any, ...]:
    return (info.key, info.source, info.points, info.first_step, info.last_step)


def arrays(shown: Any) -> Any:
    if isinstance(shown, tuple):
        return shown
    return tuple(
        part.tobytes() if isinstance(part, np.ndarray) else part
        for part in (getattr(shown, name) for name in shown.__slots__)
    )


def bits(value: float) -> str:
    return np.float64(value).tobytes().hex()


def summary(reader: Reader, run_id: str = RUN) -> RunSummary:
    return reader.run(run_id)


# --- batches ---------------------------------------------------------------------------------------


STORY = [
    batch(
        1,
        R0,
        R1,
        params=[param(R0, "lr", "1")],
        points=[points(R0, range(10)), points(R1, range(0, 20, 2), keys=("loss", "lr"))],
        metric_records={R0.producer_id: 10, R1.producer_id: 10},
    ),
    batch(
        2,
        R0,
        points=[points(R0, range(10, 40)), points(R0, range(40, 50), keys=("loss", "acc"))],
        events=[event(R0, "spike", step=12)],
        metric_records={R0.producer_id: 40},
        losses=[loss(R0, "full", 4)],
    ),
    batch(3, AGAIN, points=[points(AGAIN, range(30, 60))], tags=[param(AGAIN, "t", "new", 9)]),
    batch(
        4,
        R0,
        R1,
        ends=[end(R0, "killed", logged=-1), end(R1, logged=10)],
        losses=[loss(R0, "full", 2)],
    ),
    batch(
        5, R0, ends=[end(R0, "failed", error="boom", logged=50)], tags=[param(R0, "t", "old", 8)]
    ),
    batch(1, AGAIN, origin="another", ends=[end(AGAIN, logged=30)]),
]


@pytest.mark.parametrize("seed", range(8))
def test_batches_in_any_order_give_the_same_answers(open_store: OpenStore, seed: int) -> None:
    in_order, shuffled = open_store(), open_store()
    for one in STORY:
        in_order[0].write(one)
    for at in np.random.default_rng(seed).permutation(len(STORY)):
        shuffled[0].write(STORY[at])
    assert everything(shuffled[1]) == everything(in_order[1])


def test_batches_written_again_change_nothing(writer: Writer, reader: Reader) -> None:
    for one in STORY:
        writer.write(one)
    before = everything(reader)
    for one in reversed(STORY):
        writer.write(one)
    assert everything(reader) == before


def test_the_same_numbers_of_another_spool_are_another_batch(
    writer: Writer, reader: Reader
) -> None:
    writer.write(batch(1, R0, points=[points(R0, [1])]))
    writer.write(batch(1, R0, origin="another", points=[points(R0, [2])]))
    assert reader.series(RUN, "loss", "rank 0").steps.tolist() == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        {"points": [points(R1, [1])]},
        {"params": [param(R1, "a", "b")]},
        {"ends": [end(R0, "exploded")]},
        {
            "points": [
                Points(R0.producer_id, ("a", "b"), *(np.zeros(1, np.int64),) * 2, np.zeros((1, 1)))
            ]
        },
    ],
)
def test_a_batch_that_can_never_be_written_is_rejected(writer: Writer, bad: dict[str, Any]) -> None:
    with pytest.raises(Rejected):
        writer.write(batch(1, R0, **bad))


def test_nothing_of_a_rejected_batch_is_kept(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, points=[points(R0, [1])]))
    before = everything(reader)
    with pytest.raises(Rejected):
        writer.write(
            batch(2, R0, params=[param(R0, "a", "b")], points=[points(R0, [2]), points(R1, [1])])
        )
    assert everything(reader) == before


def test_a_rejected_batch_does_not_stop_the_next(writer: Writer, reader: Reader) -> None:
    with pytest.raises(Rejected):
        writer.write(batch(1, R0, points=[points(R0, [2], keys=("new",)), points(R1, [1])]))
    writer.write(batch(2, R0, points=[points(R0, [2], keys=("new",))]))
    assert [info.key for info in reader.series_list(RUN)] == ["new"]


# --- runs ------------------------------------------------------------------------------------------


def test_a_run_is_as_its_producers_describe_it(writer: Writer, reader: Reader) -> None:
    said = {"metric_records": {R0.producer_id: 3}, "losses": [loss(R1, "full", 7)]}
    writer.write(batch(1, R0, R1, points=[points(R0, range(3), keys=("a", "b"))], **said))
    expected = RunSummary(
        run_id=RUN,
        name=RUN[:8],
        experiment="gpt",
        status="running",
        attempt=1,
        world_size=2,
        start_time_ns=1000,
        end_time_ns=None,
        error="",
        ranks=2,
        series=2,
        points=6,
        records_stored=3,
        records_logged=None,
        lost_records=7,
    )
    assert reader.runs() == [expected]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([end(R0)], "running"),
        ([end(R0), end(R1)], "finished"),
        ([end(R0), end(R1, "killed")], "killed"),
        ([end(R0, "failed"), end(R1, "killed")], "failed"),
        ([end(R0), end(R1), end(FORKED, "failed")], "finished"),
        ([end(R0, "killed"), end(R0, "finished"), end(R1)], "finished"),
        ([end(R0, "failed"), end(R0, "killed"), end(R1)], "failed"),
        ([end(R0, "finished"), end(R0, "failed"), end(R1)], "finished"),
    ],
)
def test_the_status_is_what_the_ranks_ended_as(
    writer: Writer, reader: Reader, ends: list[Any], expected: str
) -> None:
    writer.write(batch(1, R0, R1, FORKED))
    for number, one in enumerate(ends, 2):
        writer.write(batch(number, ends=[one]))
    assert summary(reader).status == expected


def test_a_new_attempt_makes_the_run_running_again(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, ends=[end(R0, "failed", error="boom")]))
    writer.write(batch(2, AGAIN))
    run = summary(reader)
    assert (run.status, run.attempt, run.error, run.end_time_ns) == ("running", 2, "", None)


def test_the_error_is_that_of_the_rank_that_failed_first(writer: Writer, reader: Reader) -> None:
    late, early = (
        end(R0, "failed", error="late", time_ns=9),
        end(R1, "failed", error="early", time_ns=8),
    )
    writer.write(batch(1, R0, R1, ends=[late, early]))
    assert (summary(reader).error, summary(reader).end_time_ns) == ("early", 9)


def test_records_logged_are_known_once_all_have_said(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, R1, ends=[end(R0, logged=5), end(R1, logged=6)]))
    assert summary(reader).records_logged == 11


def test_records_logged_are_unknown_when_one_could_not_say(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, R1, ends=[end(R0, logged=5), end(R1, "killed", logged=-1)]))
    assert summary(reader).records_logged is None


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([end(R0, logged=5)], 5 + 3),
        ([end(FORKED, "killed", logged=-1), end(R0, logged=5)], 5 + 3),
        ([end(R0, logged=5), end(FORKED, logged=4)], 5 + 4),
        ([end(FORKED, logged=4)], None),
        ([end(FORKED, logged=4), end(R0, "killed", logged=-1)], None),
    ],
)
def test_records_logged_take_what_a_forked_process_stored_when_it_has_not_said(
    writer: Writer, reader: Reader, ends: list[Any], expected: int | None
) -> None:
    writer.write(batch(1, R0, FORKED, metric_records={FORKED.producer_id: 3}))
    for number, one in enumerate(ends, 2):
        writer.write(batch(number, ends=[one]))
    assert summary(reader).records_logged == expected


def test_records_logged_grow_with_what_a_forked_process_stores_after_the_end(
    writer: Writer, reader: Reader
) -> None:
    writer.write(batch(1, R0, FORKED, ends=[end(R0, logged=5)]))
    for number in (2, 3):
        writer.write(batch(number, metric_records={FORKED.producer_id: 3}))
    assert (summary(reader).records_logged, summary(reader).records_stored) == (11, 6)


def test_records_logged_are_unknown_while_only_a_forked_process_is_known(
    writer: Writer, reader: Reader
) -> None:
    writer.write(batch(1, FORKED, ends=[end(FORKED, logged=4)]))
    assert summary(reader).records_logged is None


def test_runs_are_listed_newest_first(writer: Writer, reader: Reader) -> None:
    for number in range(5):
        writer.write(
            batch(number, producer(run=f"{number:032}", start_time_ns=[3, 1, 4, 0, 2][number]))
        )
    assert [int(run.run_id) for run in reader.runs(limit=4)] == [2, 0, 4, 1]


def test_runs_are_filtered_by_experiment_and_status(writer: Writer, reader: Reader) -> None:
    for number in range(8):
        info = producer(run=f"{number:032}", experiment="ab"[number % 2])
        writer.write(batch(number, info, ends=[end(info)] if number < 4 else []))
    found = reader.runs(experiment="b", status="finished")
    assert sorted(int(run.run_id) for run in found) == [1, 3]


def test_no_run_is_listed_for_an_unknown_experiment(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0))
    assert reader.runs(experiment="unknown") == []


@pytest.mark.parametrize("name", [RUN, RUN[:4], "latest", "named"])
def test_a_run_is_found_by(writer: Writer, reader: Reader, name: str) -> None:
    writer.write(batch(1, producer(run_name="named", start_time_ns=10)))
    writer.write(batch(2, producer(run=OTHER_RUN, start_time_ns=1)))
    assert reader.run(name).run_id == RUN


@pytest.mark.parametrize("name", [RUN[:3], "ffff", "", "%", "_" * 32, "nobody"])
def test_no_run_is_found_by(writer: Writer, reader: Reader, name: str) -> None:
    writer.write(batch(1, R0))
    with pytest.raises(NotFound, match=RUN):
        reader.run(name)


def test_a_name_that_two_runs_have_is_refused_with_both(writer: Writer, reader: Reader) -> None:
    for number, run in enumerate((RUN, OTHER_RUN)):
        writer.write(batch(number, producer(run=run, run_name="twice")))
    with pytest.raises(NotFound, match=f"{RUN}.*{OTHER_RUN}|{OTHER_RUN}.*{RUN}"):
        reader.run("twice")


@pytest.mark.parametrize(
    "ask", ["params", "tags", "losses", "attempts", "events", "series_list", "damage"]
)
def test_questions_about_an_unknown_run_find_nothing(reader: Reader, ask: str) -> None:
    with pytest.raises(NotFound):
        getattr(reader, ask)(RUN)


# --- params, tags, events, losses ------------------------------------------------------------------


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


# --- series ----------------------------------------------------------------------------------------


def test_values_come_back_to_the_bit(writer: Writer, reader: Reader) -> None:
    raw = np.array([0x7FF8DEADBEEF0001, 1 << 63, 0x7FF0000000000001, 1], dtype=np.uint64)
    writer.write(batch(1, R0, points=[points(R0, range(4), value=raw.view(np.float64))]))
    assert reader.series(RUN, "loss", "rank 0").values.tobytes() == raw.tobytes()


def test_steps_and_times_may_be_any_int64(writer: Writer, reader: Reader) -> None:
    ends = [-(2**63), -1, 0, 2**63 - 1]
    writer.write(batch(1, R0, points=[points(R0, ends, times=ends[::-1])]))
    series = reader.series(RUN, "loss", "rank 0")
    assert (series.steps.tolist(), series.times_ns.tolist()) == (ends, ends[::-1])


def test_a_series_is_ordered_by_step(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, points=[points(R0, [5, 1]), points(R0, [3])]))
    assert reader.series(RUN, "loss", "rank 0").values.tolist() == [1, 3, 5]


def test_equal_steps_are_in_order_of_arrival(writer: Writer, reader: Reader) -> None:
    first = points(R0, [7, 7], times=[1, 1], value=[1, 2])
    writer.write(batch(1, R0, points=[first, points(R0, [7], times=[1], value=[3])]))
    assert reader.series(RUN, "loss", "rank 0").values.tolist() == [1, 2, 3]


def test_of_several_attempts_the_last_one_counts_at_each_step(
    writer: Writer, reader: Reader
) -> None:
    writer.write(batch(1, AGAIN, points=[points(AGAIN, [4, 5, 6], value=[24, 25, 26])]))
    writer.write(batch(2, R0, points=[points(R0, [3, 4, 4, 5, 9], value=[13, 14, 14, 15, 19])]))
    series = reader.series(RUN, "loss", "rank 0")
    assert (series.steps.tolist(), series.values.tolist()) == (
        [3, 4, 5, 6, 9],
        [13, 24, 25, 26, 19],
    )


def test_a_key_logged_with_different_others_is_one_series(writer: Writer, reader: Reader) -> None:
    said = [points(R0, [1, 3]), points(R0, [2], keys=("acc", "loss"))]
    writer.write(batch(1, R0, points=said))
    assert reader.series(RUN, "loss", "rank 0").values.tolist() == [1, 2.1, 3]


def test_a_forked_process_is_a_source_of_its_own(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, FORKED, points=[points(R0, [1]), points(FORKED, [2])]))
    assert [info.source for info in reader.series_list(RUN)] == ["rank 0", "rank 0 pid 4711"]


@pytest.mark.parametrize(("key", "source"), [("loss", "rank 9"), ("other", "rank 0")])
def test_a_series_that_was_never_logged_is_not_found(
    writer: Writer, reader: Reader, key: str, source: str
) -> None:
    writer.write(batch(1, R0, points=[points(R0, [1])]))
    with pytest.raises(NotFound):
        reader.series(RUN, key, source)


def test_series_are_listed_by_key_and_then_by_the_number_of_the_source(
    writer: Writer, reader: Reader
) -> None:
    ranks = [producer(rank) for rank in (10, 9, 2)]
    writer.write(batch(1, *ranks, points=[points(info, [1], keys=("b", "a")) for info in ranks]))
    listed = [(info.key, info.source) for info in reader.series_list(RUN)]
    assert listed == [(key, f"rank {rank}") for key in "ab" for rank in (2, 9, 10)]


def test_a_listed_series_says_where_it_ends(writer: Writer, reader: Reader) -> None:
    said = [
        points(R0, [5, 9, 2], value=[1, 2, 3]),
        points(R0, [9, 4], times=[91, 92], value=[7, 8]),
    ]
    writer.write(batch(1, R0, points=said))
    (info,) = reader.series_list(RUN)
    assert (*astuple(info), info.last_value) == ("loss", "rank 0", 5, 2, 9, 7)


@pytest.mark.parametrize(("last_step", "expected"), [(9, 2), (10, 2), (8, 1)])
def test_the_last_value_is_the_last_attempts_at_the_last_step(
    writer: Writer, reader: Reader, last_step: int, expected: int
) -> None:
    writer.write(batch(1, AGAIN, points=[points(AGAIN, [last_step], times=[1], value=[2])]))
    writer.write(batch(2, R0, points=[points(R0, [9], times=[2], value=[1])]))
    assert reader.series_list(RUN)[0].last_value == expected


def test_a_series_of_many_batches_comes_back_whole(writer: Writer, reader: Reader) -> None:
    keys = ("loss", "acc")
    for number in range(70):
        at = number * 37
        writer.write(batch(number, R0, points=[points(R0, range(at, at + 37), keys=keys)]))
    assert reader.series(RUN, "acc", "rank 0").values.tolist() == [
        step + 0.1 for step in range(2590)
    ]


def test_no_points_are_no_series(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, points=[points(R0, [])]))
    assert (reader.series_list(RUN), summary(reader).series) == ([], 0)


def test_the_number_of_series_counts_a_key_of_a_source_once(writer: Writer, reader: Reader) -> None:
    said = [
        points(R0, [1], keys=("a", "b")),
        points(AGAIN, [1], keys=("b", "c")),
        points(R1, [1], keys=("a",)),
    ]
    writer.write(batch(1, R0, R1, AGAIN, points=said))
    assert summary(reader).series == 4


# --- buckets ---------------------------------------------------------------------------------------


def test_buckets_have_equally_many_points(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, points=[points(R0, range(0, 20, 2))]))
    drawn = reader.buckets(RUN, "loss", "rank 0", 3)
    assert (drawn.first_step.tolist(), drawn.last_step.tolist()) == ([0, 8, 16], [6, 14, 18])
    assert drawn.count.tolist() == [4, 4, 2]


def test_buckets_carry_mean_min_and_max(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, points=[points(R0, range(5), value=[4, -1, 3, 8, 5])]))
    drawn = reader.buckets(RUN, "loss", "rank 0", 2)
    assert [drawn.mean.tolist(), drawn.min.tolist(), drawn.max.tolist()] == [
        [2, 6.5],
        [-1, 5],
        [4, 8],
    ]


def test_nan_counts_but_decides_nothing(writer: Writer, reader: Reader) -> None:
    nan = float("nan")
    writer.write(batch(1, R0, points=[points(R0, range(4), value=[nan, 2, nan, nan])]))
    drawn = reader.buckets(RUN, "loss", "rank 0", 2)
    np.testing.assert_array_equal(
        [drawn.count, drawn.mean, drawn.min, drawn.max], [[2, 2], [2, nan], [2, nan], [2, nan]]
    )


def test_a_short_series_has_a_bucket_for_each_point(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, points=[points(R0, range(3))]))
    assert reader.buckets(RUN, "loss", "rank 0", 2000).mean.tolist() == [0, 1, 2]


def test_buckets_show_the_last_attempt(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, points=[points(R0, range(4), value=[1, 1, 1, 1])]))
    writer.write(batch(2, AGAIN, points=[points(AGAIN, range(2, 6), value=[2, 2, 2, 2])]))
    assert reader.buckets(RUN, "loss", "rank 0", 3).mean.tolist() == [1, 2, 2]


def test_fewer_than_one_bucket_is_an_error(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, points=[points(R0, [1])]))
    with pytest.raises(ValueError, match="0"):
        reader.buckets(RUN, "loss", "rank 0", 0)


# --- damage ----------------------------------------------------------------------------------------


def test_nothing_of_a_sound_run_is_damaged(writer: Writer, reader: Reader) -> None:
    for one in STORY:
        writer.write(one)
    assert reader.damage(RUN) == []


# --- export ----------------------------------------------------------------------------------------


def test_an_export_has_every_stored_point(writer: Writer, reader: Reader) -> None:
    said = [points(R0, [2, 1, 1], keys=("a", "b")), points(AGAIN, [1]), points(R1, [1])]
    writer.write(batch(1, R0, R1, AGAIN, points=said))
    found = [(source, attempt, step) for source, _, _, attempt, step, *_ in exported(reader, RUN)]
    first = [("rank 0", 1, step) for step in (1, 1, 2)]
    assert sorted(found) == [*first, ("rank 0", 2, 1), ("rank 1", 1, 1)]


def test_an_export_with_a_cursor_has_only_what_came_since(writer: Writer, reader: Reader) -> None:
    cursor: dict[str, int] = {}
    seen = []
    for number in range(40):
        at = number * 3
        writer.write(batch(number, R0, points=[points(R0, range(at, at + 3))]))
        if number % 3 == 0:
            seen += [block.steps for block in reader.export(RUN, skip=cursor)]
    assert np.concatenate(seen).tolist() == list(range(120))


def test_a_cursor_at_the_end_exports_nothing(writer: Writer, reader: Reader) -> None:
    cursor: dict[str, int] = {}
    writer.write(batch(1, R0, points=[points(R0, range(9))]))
    list(reader.export(RUN, skip=cursor))
    assert list(reader.export(RUN, skip=cursor)) == []


def test_a_range_of_numbers_is_one_batch(writer: Writer, reader: Reader) -> None:
    ranged = Batch(BatchId("spool", 3, 9), [R0], points=[points(R0, [1])])
    for one in (ranged, batch(2, R0), batch(10, R0), ranged):
        writer.write(one)
    assert summary(reader).points == 1
