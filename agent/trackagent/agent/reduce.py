"""The algebra of reductions: what is known of one key at one step over some ranks, and how two of these
become one. Pure; in any order and any grouping the same answer as one look at all values, to 1e-12.

A **partial** is a column of STATS: of many keys and steps together a table, float64 (STATS, keys, n).

    count, nans          how many values are numbers (infinities too), and how many are NaN
    weight, weight_low   sum of the weights of the numbers, as an unevaluated sum of two float64
    sum, sum_low         sum of weight times number, likewise
    m2                   sum of weight times squared distance from the weighted mean; NaN with an infinity
    min, max             of the numbers; NaN where there is none
    min_rank, max_rank   the ranks that hold them, of several the lowest; -1 where there is none

Sums are double-doubles: TwoSum (Knuth, The Art of Computer Programming 2, 4.2.2) and TwoProduct with
Veltkamp's splitting (Dekker, Numer. Math. 18, 1971). Squared distances are merged as Chan, Golub and
LeVeque (1979) do, weighted as West (CACM 22, 1979) does, the difference of the means being taken in
double-doubles: so values that differ by 1e-3 around 1e9 have the right standard deviation.
"""

from __future__ import annotations

import numpy as np

from trackagent.agent.store.contract import Floats, Ints

STATS = (
    "count",
    "nans",
    "weight",
    "weight_low",
    "sum",
    "sum_low",
    "m2",
    "min",
    "max",
    "min_rank",
    "max_rank",
)
COUNT, NANS, WEIGHT, WEIGHT_LOW, SUM, SUM_LOW, M2, MIN, MAX, MIN_RANK, MAX_RANK = range(len(STATS))
NO_RANK = -1

_SPLITTER = 134217729.0  # 2**27 + 1


def of_values(values: Floats, ranks: Ints, weights: Floats) -> Floats:
    """Each value as a partial of its own: (STATS, keys, n) of values (keys, n), ranks (n,) and weights (n,),
    which are finite and not negative."""
    numbers = ~np.isnan(values)
    weights = np.where(numbers, weights, 0.0)
    weighs = weights > 0
    table = np.zeros((len(STATS), *values.shape))
    table[COUNT] = numbers
    table[NANS] = ~numbers
    table[WEIGHT] = weights
    with np.errstate(all="ignore"):
        table[SUM], table[SUM_LOW] = _product(weights, np.where(weighs, values, 0.0))
    table[M2] = np.where(weighs & np.isinf(values), np.nan, 0.0)
    table[MIN] = table[MAX] = values
    table[MIN_RANK] = table[MAX_RANK] = np.where(numbers, ranks, NO_RANK)
    return table


def merged(a: Floats, b: Floats) -> Floats:
    """Two tables of partials, one by one."""
    table = np.empty(np.broadcast_shapes(a.shape, b.shape))
    with np.errstate(all="ignore"):
        table[COUNT] = a[COUNT] + b[COUNT]
        table[NANS] = a[NANS] + b[NANS]
        table[WEIGHT], table[WEIGHT_LOW] = _sum(a[WEIGHT], a[WEIGHT_LOW], b[WEIGHT], b[WEIGHT_LOW])
        table[SUM], table[SUM_LOW] = _sum(a[SUM], a[SUM_LOW], b[SUM], b[SUM_LOW])
        table[M2] = a[M2] + b[M2] + _between(a, b)
    # NaN, of no value at all, is neither below nor above anything.
    for stat, rank, beats in ((MIN, MIN_RANK, np.less), (MAX, MAX_RANK, np.greater)):
        lower_rank = (b[stat] == a[stat]) & (b[rank] < a[rank])
        second = np.isnan(a[stat]) | beats(b[stat], a[stat]) | lower_rank
        second &= ~np.isnan(b[stat])
        table[stat] = np.where(second, b[stat], a[stat])
        table[rank] = np.where(second, b[rank], a[rank])
    return table


def by_step(steps: Ints, times_ns: Ints, table: Floats) -> tuple[Ints, Ints, Floats]:
    """Partials in any order, (n,), (n,), (STATS, keys, n): those of equal steps become one, by ascending
    step, with the latest of their times. Arrays that are so already are returned as they are."""
    if not (steps[1:] > steps[:-1]).all():
        order = np.argsort(steps, kind="stable")
        steps, times_ns, table = steps[order], times_ns[order], table[:, :, order]
    while len(steps) > 1:
        same = steps[1:] == steps[:-1]
        if not same.any():
            break
        # Neighbours two by two, all at once: as many rounds as the logarithm of how often a step is there.
        begins = np.flatnonzero(np.concatenate(([True], ~same)))
        place = np.arange(len(steps)) - np.repeat(begins, np.diff(np.append(begins, len(steps))))
        first = place % 2 == 0
        second = np.flatnonzero(~first)
        target = np.cumsum(first)[second] - 1
        pairs = merged(table[:, :, second - 1], table[:, :, second])
        times = np.maximum(times_ns[second - 1], times_ns[second])
        steps, times_ns, table = steps[first], times_ns[first], table[:, :, first]
        table[:, :, target] = pairs
        times_ns[target] = times
    return steps, times_ns, table


def mean(table: Floats) -> Floats:
    """The weighted mean of the numbers, (keys, n); NaN where there are none, or none that weighs."""
    with np.errstate(all="ignore"):
        quotient: Floats = table[SUM] / (table[WEIGHT] + table[WEIGHT_LOW])
    return quotient


def std(table: Floats) -> Floats:
    """The weighted standard deviation of the numbers (the population's: 0 of a single one), (keys, n)."""
    with np.errstate(all="ignore"):
        root: Floats = np.sqrt(table[M2] / (table[WEIGHT] + table[WEIGHT_LOW]))
    return root


def _between(a: Floats, b: Floats) -> Floats:
    """What the distance of two means adds to the squared distances: with D = Wa Sb - Wb Sa, the square of
    D / (Wa Wb), times Wa Wb / (Wa + Wb)."""
    weight_a, weight_b = a[WEIGHT], b[WEIGHT]
    left, left_low = _product(weight_a, b[SUM])
    right, right_low = _product(weight_b, a[SUM])
    left_low = left_low + (weight_a * b[SUM_LOW] + a[WEIGHT_LOW] * b[SUM])
    right_low = right_low + (weight_b * a[SUM_LOW] + b[WEIGHT_LOW] * a[SUM])
    difference, low = _sum(left, left_low, -right, -right_low)
    apart = (difference + low) / weight_a / weight_b
    share = weight_a / (weight_a + weight_b)
    return np.where((weight_a > 0) & (weight_b > 0), apart * apart * share * weight_b, 0.0)


def _sum(a: Floats, a_low: Floats, b: Floats, b_low: Floats) -> tuple[Floats, Floats]:
    """The sum of two double-doubles; an infinity or NaN has nothing in its low part."""
    high, error = _two_sum(a, b)
    low, low_error = _two_sum(a_low, b_low)
    whole, error = _quick_two_sum(high, error + low)
    whole, error = _quick_two_sum(whole, error + low_error)
    finite = np.isfinite(high) & np.isfinite(whole)
    return np.where(finite, whole, high), np.where(finite, error, 0.0)


def _two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _quick_two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Where |a| >= |b|."""
    total = a + b
    return total, b - (total - a)


def _product(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The product of two numbers as a double-double."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    # Beyond the splitter's range, and of infinities, there is no error that could be told.
    return product, np.where(np.isfinite(error), error, 0.0)


def _split(a: Floats) -> tuple[Floats, Floats]:
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high
