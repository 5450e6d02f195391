"""What every store says of series: points, buckets, damage and exports."""

from __future__ import annotations

import numpy as np
import pytest

from tests.agent.store.batches import (
    RUN,
    batch,
    points,
    producer,
)
from tests.agent.store.contract.stores import (
    AGAIN,
    FORKED,
    R0,
    R1,
    STORY,
    astuple,
    exported,
    summary,
)
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    NotFound,
    Reader,
    Writer,
)

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
