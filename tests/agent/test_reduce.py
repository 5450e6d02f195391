"""Partials of any split, in any order, give what one look at all values gives."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackagent.agent import reduce
from trackagent.agent.store.contract import Floats, Ints

TOLERANCE = Fraction(1, 10**12)
# Below this float64 has no 12 digits left.
DENORMAL = Fraction(1, 10**300)

FINITE = st.one_of(
    st.floats(-1e100, 1e100),
    st.floats(-1e-3, 1e-3).map(lambda x: 1e9 + x),
    st.floats(-1e-3, 1e-3).map(lambda x: -1e9 + x),
    st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 2.2e-308, 1.0, 1e9, 1e9 + 1e-3, 1e9 - 1e-3]),
)
ANY = st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf]))
WEIGHTS = st.one_of(
    st.just(1.0), st.floats(1e-6, 1e6), st.sampled_from([0.0, 0.1, 3.0, 4096.0, 1e9 + 1])
)
Observed = list[tuple[float, int, float]]  # value, rank, weight


def observed(values: st.SearchStrategy[float]) -> st.SearchStrategy[Observed]:
    return st.lists(st.tuples(values, st.integers(0, 9), WEIGHTS), min_size=1, max_size=24)


def table_of(seen: Observed) -> Floats:
    values, ranks, weights = zip(*seen, strict=True)
    return reduce.of_values(np.array([values]), np.array(ranks), np.array(weights))


def one_step(table: Floats) -> Floats:
    """All partials of a table as one."""
    none: Ints = np.zeros(table.shape[2], np.int64)
    return reduce.by_step(none, none, table)[2][:, 0, 0]


def in_parts(seen: Observed, draw: st.DataObject) -> Floats:
    """The same values shuffled, split into any parts, these reduced, and merged in any order two by two."""
    rest = draw.draw(st.permutations(seen))
    parts = []
    while rest:
        size = draw.draw(st.integers(1, len(rest)))
        parts.append(one_step(table_of(rest[:size])))
        rest = rest[size:]
    while len(parts) > 1:
        second = parts.pop(draw.draw(st.integers(0, len(parts) - 1)))
        first = parts.pop(draw.draw(st.integers(0, len(parts) - 1)))
        parts.append(reduce.merged(first[:, None, None], second[:, None, None])[:, 0, 0])
    return parts[0]


def exactly(seen: Observed) -> tuple[Fraction, Fraction, Fraction]:
    """Weight, weighted sum and squared distances from the mean, in rational numbers."""
    pairs = [(Fraction(w), Fraction(x)) for x, _, w in seen if math.isfinite(x)]
    weight = sum((w for w, _ in pairs), Fraction(0))
    total = sum((w * x for w, x in pairs), Fraction(0))
    middle = total / weight if weight else Fraction(0)
    return weight, total, sum((w * (x - middle) ** 2 for w, x in pairs), Fraction(0))


def close(found: float, exact: Fraction, least: Fraction = DENORMAL) -> bool:
    return abs(Fraction(found) - exact) <= max(TOLERANCE * abs(exact), least)


@given(observed(FINITE), st.data())
def test_mean_and_deviation_of_any_split_and_order_are_those_of_all_values(
    seen: Observed, draw: st.DataObject
) -> None:
    table = in_parts(seen, draw)
    weight, total, squares = exactly(seen)
    one = table[:, None, None]
    if not weight:
        assert math.isnan(reduce.mean(one)[0, 0])
        return
    # A sum of huge values that cancel has digits lost that no value had: as two float64 it holds 30.
    scale = sum((Fraction(w) * abs(Fraction(x)) for x, _, w in seen), Fraction(0))
    assert close(reduce.mean(one)[0, 0], total / weight, max(DENORMAL, scale / weight / 10**28))
    spread = scale * scale / weight / 10**28 if weight else Fraction(0)
    assert close(table[reduce.M2], squares, max(DENORMAL, spread))


@given(observed(ANY), st.data())
def test_counts_and_extremes_are_exact_whatever_is_logged(
    seen: Observed, draw: st.DataObject
) -> None:
    table = dict(zip(reduce.STATS, in_parts(seen, draw).tolist(), strict=True))
    numbers = [(x, rank) for x, rank, _ in seen if not math.isnan(x)]
    assert (table["count"], table["nans"]) == (len(numbers), len(seen) - len(numbers))
    if not numbers:
        assert math.isnan(table["min"])
        assert (table["min_rank"], table["max_rank"]) == (-1, -1)
        return
    least, most = min(x for x, _ in numbers), max(x for x, _ in numbers)
    assert (table["min"], table["max"]) == (least, most)
    assert table["min_rank"] == min(rank for x, rank in numbers if x == least)
    assert table["max_rank"] == min(rank for x, rank in numbers if x == most)


@given(observed(ANY), st.data())
def test_infinities_make_the_mean_by_the_rules_of_floating_point(
    seen: Observed, draw: st.DataObject
) -> None:
    weighing = [x for x, _, weight in seen if weight > 0]
    infinite = {x for x in weighing if math.isinf(x)}
    one = in_parts(seen, draw)[:, None, None]
    if len(infinite) == 1:
        assert reduce.mean(one)[0, 0] == infinite.pop()
        assert math.isnan(reduce.std(one)[0, 0])
    elif infinite:
        assert math.isnan(reduce.mean(one)[0, 0])
    elif any(not math.isnan(x) for x in weighing):
        assert math.isfinite(reduce.mean(one)[0, 0])


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.1, 0.7, 0.3], [4096.0, 1000.0, 17.0]])
def test_small_differences_around_a_huge_value_keep_their_deviation(weights: list[float]) -> None:
    values = [1e9 - 1e-3, 1e9, 1e9 + 1e-3]
    table = one_step(table_of([(x, 0, w) for x, w in zip(values, weights, strict=True)]))
    weight, _, squares = exactly([(x, 0, w) for x, w in zip(values, weights, strict=True)])
    assert close(table[reduce.M2] / float(weight), squares / weight)


def test_partials_of_one_step_become_one_and_others_stay_apart() -> None:
    steps = np.array([7, 3, 7, 3, 7, 5])
    values = np.array([[1.0, 10, 2, 20, 6, 100], [0.0, 1, 0, 1, 0, 1]])
    table = reduce.of_values(values, np.arange(6), np.ones(6))
    found, times, reduced = reduce.by_step(steps, np.arange(6) * 10, table)
    assert (found.tolist(), times.tolist()) == ([3, 5, 7], [30, 50, 40])
    assert reduce.mean(reduced).tolist() == [[15, 100, 3], [1, 1, 0]]
    assert reduced[reduce.COUNT].tolist() == [[2, 1, 3], [2, 1, 3]]
    assert reduced[reduce.MAX_RANK].tolist() == [[3, 5, 4], [1, 5, 0]]
    assert reduce.std(reduced)[0].tolist() == pytest.approx([5, 0, math.sqrt(14 / 3)])
