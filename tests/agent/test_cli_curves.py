"""What is computed from series before they are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from trackagent.agent.cli.curves import RankMean, in_both, thinned, united


def test_thinning_keeps_the_extremes_and_what_is_not_finite() -> None:
    y = np.zeros(1_000_003)
    y[[17, 500_000, 900_001]] = 5.0, -7.0, np.nan
    x, kept = thinned(np.arange(len(y), dtype=float), y)
    assert [kept[x == at].tolist() for at in (17, 500_000)] == [[5.0], [-7.0]]
    assert x[np.isnan(kept)].tolist() == [900_001]


def test_thinning_keeps_both_ends() -> None:
    x, _ = thinned(np.arange(1_000_003.0), np.full(1_000_003, 1.5))
    assert (x[0], x[-1]) == (0, 1_000_002)


def test_thinning_bounds_the_points() -> None:
    rng = np.random.default_rng(0)
    assert len(thinned(np.arange(1e6), rng.normal(size=1_000_000))[0]) <= 4_002


def mean_of(*ranks: tuple[list[int], list[float]]) -> list[tuple[int, float]]:
    mean = RankMean()
    for steps, values in ranks:
        mean.add(np.array(steps), np.array(values))
    return list(zip(*(column.tolist() for column in mean.points()), strict=True))


def test_the_mean_is_over_the_ranks_that_logged_a_step() -> None:
    found = mean_of(([0, 1, 2], [1.0, 2.0, 3.0]), ([1, 2, 3], [4.0, 5.0, 6.0]))
    assert found == [(0, 1.0), (1, 3.0), (2, 4.0), (3, 6.0)]


def test_the_mean_of_equal_steps_is_over_all_ranks() -> None:
    ranks = [([0, 5], [float(rank), 1.0]) for rank in range(4)]
    assert mean_of(*ranks) == [(0, 1.5), (5, 1.0)]


def test_the_mean_of_a_step_with_nan_is_nan() -> None:
    found = mean_of(([0, 1], [np.nan, 1.0]), ([0, 1], [1.0, 3.0]))
    assert [(step, repr(value)) for step, value in found] == [(0, "nan"), (1, "2.0")]


@pytest.mark.filterwarnings("error")
def test_the_mean_of_opposite_infinities_is_nan() -> None:
    assert repr(mean_of(([0], [np.inf]), ([0], [-np.inf]))[0][1]) == "nan"


def test_spans_that_meet_are_one() -> None:
    assert united([(5, 9), (0, 3), (8, 12), (2, 2)]) == [(0, 3), (5, 12)]


def test_the_mean_has_a_gap_where_all_ranks_have() -> None:
    assert in_both([(0, 3), (5, 12)], [(2, 6), (20, 30)]) == [(2, 3), (5, 6)]
