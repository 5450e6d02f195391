"""What every store does with batches, and what it says of runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.agent.store.batches import (
    OTHER_RUN,
    RUN,
    batch,
    end,
    loss,
    param,
    points,
    producer,
)
from tests.agent.store.contract.stores import (
    AGAIN,
    FORKED,
    R0,
    R1,
    STORY,
    OpenStore,
    everything,
    summary,
)
from trackagent.agent.store.contract import (
    BatchId,
    NotFound,
    Points,
    Reader,
    Rejected,
    RunSummary,
    Writer,
)

# --- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_batches_in_any_order_give_the_same_answers(open_store: OpenStore, seed: int) -> None:
    in_order, shuffled = open_store(), open_store()
    for one in STORY:
        in_order[0].write(one)
    for at in np.random.default_rng(seed).permutation(len(STORY)):
        shuffled[0].write(STORY[at])
    assert everything(shuffled[1]) == everything(in_order[1])


def test_what_batches_were_made_of_is_known(writer: Writer, reader: Reader) -> None:
    parts = [BatchId("node b", *ends) for ends in ((1, 4), (9, 9), (5, 7), (9, 9))]
    for number, part in enumerate(parts, start=1):
        writer.write(batch(number, includes=[part, BatchId("node c", number, number)]))
    assert reader.ranges("node b") == [(1, 7), (9, 9)]
    assert reader.ranges("node c") == [(1, 4)]
    assert reader.ranges("spool") == [(1, 4)]
    assert reader.ranges("node d") == []


def test_what_is_missing_of_another_spool_is_known_however_much_came_since(
    writer: Writer, reader: Reader
) -> None:
    apart = [(number, number) for number in range(1, 201, 2)]
    for number, ends in enumerate(apart, start=1):
        writer.write(batch(number, includes=[BatchId("node b", *ends)]))
    assert reader.ranges("node b") == apart


def copy(source: Reader, target: tuple[Writer, Reader]) -> None:
    def known(origin: str) -> int:
        return max((last for _, last in target[1].ranges(origin)), default=0)

    for one in source.copies(RUN, known):
        target[0].write(one)


def test_a_copied_run_is_the_same(open_store: OpenStore) -> None:
    source, target = open_store(), open_store()
    for one in STORY:
        source[0].write(one)
    copy(source[1], target)
    assert everything(target[1]) == everything(source[1])


def test_a_run_that_goes_on_is_copied_as_it_does(open_store: OpenStore) -> None:
    source, target = open_store(), open_store()
    for one in STORY:
        source[0].write(one)
        copy(source[1], target)
        copy(source[1], target)
    assert everything(target[1]) == everything(source[1])


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
