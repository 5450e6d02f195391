"""Curves drawn with characters: what a reader can tell from them."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import pytest

from trackagent.agent.draw import Curve, draw

AXIS = "└"


def curve(y: object, *, x: object = None, rank: int = 0, heavy: bool = False) -> Curve:
    values = np.asarray(y, float)
    steps = np.arange(len(values), dtype=float) if x is None else np.asarray(x, float)
    return Curve(f"rank {rank}", str(rank), steps, values, heavy)


def lines(*curves: Curve, width: int = 60, rows: int = 8, log: bool = False) -> list[str]:
    return draw("loss", curves, width=width, rows=rows, log=log).plain.splitlines()


def plot(*curves: Curve, width: int = 60, rows: int = 8, log: bool = False) -> list[str]:
    """The rows of the plot, without the labels at its left."""
    drawn = lines(*curves, width=width, rows=rows, log=log)[1 : rows + 1]
    return [line.split("┤")[-1].split("│")[-1] for line in drawn]


def test_a_rising_curve_goes_from_the_bottom_left_to_the_top_right() -> None:
    drawn = plot(curve(np.arange(100)))
    assert (drawn[-1][0], drawn[0][-1]) == ("⣀", "⠉")


def test_a_line_between_two_points_has_no_hole() -> None:
    drawn = plot(curve([0, 1], x=[0, 1000]))
    assert [column for column in zip_longest(*drawn, fillvalue=" ") if set(column) == {" "}] == []


def test_a_spike_among_many_points_is_seen() -> None:
    values = np.zeros(100_000)
    values[50_001] = 1.0
    assert plot(curve(values))[0].strip() != ""


@pytest.mark.parametrize("width", [200, 80, 40, 20, 1])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    curves = [curve(np.arange(50.0) + rank, rank=rank) for rank in range(4)]
    # Below this the labels and the narrowest plot do not fit.
    assert max(map(len, lines(*curves, width=width))) <= max(width, 20)


def test_the_labels_at_the_left_are_the_values_of_their_rows() -> None:
    drawn = lines(curve(np.linspace(0, 100, 50)), rows=9)
    assert [line.split("┤")[0].strip() for line in drawn if "┤" in line] == ["100", "50", "0"]


def test_the_steps_stand_below_the_axis() -> None:
    drawn = lines(curve(np.arange(101.0)))
    below = drawn[[AXIS in line for line in drawn].index(True) + 1]
    assert below.split() == ["0", "50", "100"]


def test_a_large_step_is_written_short() -> None:
    drawn = lines(curve([1, 2], x=[0, 5e9]))
    assert any(line.split() == ["0", "2G", "4G", "step"] for line in drawn)


def test_nan_breaks_the_line() -> None:
    drawn = plot(curve([1, 1, 1, np.nan, np.nan, np.nan, 1, 1, 1]))
    line = next(row for row in drawn if row.strip())
    assert len(line.split()) == 2


def gapped(*gaps: tuple[float, float], heavy: bool = False) -> Curve:
    """A level line from 0 to 9 and from 50 to 59."""
    steps = np.r_[0:10, 50:60].astype(float)
    return Curve("rank 0", "0", steps, np.ones(20), heavy, gaps)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("gap", "pieces"), [((10.0, 49.0), 2), ((60.0, 70.0), 1)])
def test_a_gap_interrupts_the_line_where_it_lies(
    gap: tuple[float, float], pieces: int, heavy: bool
) -> None:
    drawn = plot(gapped(gap, heavy=heavy))
    assert len(next(row for row in drawn if row.strip()).split()) == pieces


def test_a_gap_at_a_step_that_has_a_point_interrupts_nothing() -> None:
    drawn = plot(gapped((9.0, 9.0), (50.0, 50.0)))
    assert len(next(row for row in drawn if row.strip()).split()) == 1


def test_a_gap_is_marked_and_told() -> None:
    drawn = lines(gapped((10.0, 49.0)))
    axis = next(line for line in drawn if AXIS in line)
    assert 35 <= axis.count("×") <= 41
    assert drawn[-1].strip() == "× records are missing (steps 10 to 49)"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_marked_and_counted(value: float) -> None:
    drawn = lines(curve([1, 2, value, 4]))
    axis = next(line for line in drawn if AXIS in line)
    assert axis.count("!") == 1
    assert drawn[-1].strip() == "! 1 value is NaN or infinite (step 2)"


def test_infinity_does_not_flatten_the_rest() -> None:
    values = [0.0, 1.0, 2.0, np.inf]
    assert any("2" in line.split("┤")[0] for line in lines(curve(values)) if "┤" in line)


def test_nothing_but_nan_is_said_so() -> None:
    assert lines(curve([np.nan] * 3))[1:] == ["  3 values are NaN or infinite, nothing to draw"]


def test_no_points_are_said_so() -> None:
    assert lines()[1:] == ["  no points"]


def test_a_single_point_is_a_mark_with_its_value() -> None:
    drawn = lines(curve([3.25], x=[7]))
    assert "".join(plot(curve([3.25], x=[7]))).strip() == "•"
    assert any(line.startswith("3.25 ┤") for line in drawn)


def test_a_constant_curve_is_a_level_line_with_its_value() -> None:
    drawn = plot(curve([3e-4] * 10))
    assert [set(row.strip()) for row in drawn if row.strip()] == [{"⠉"}]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values",
    [
        [-1.7e308, 1e300, 1.7e308],
        [5e-324, 1e-323],
        [1.0, 1.0 + 2**-52],
        [-0.0, 0.0],
        [1e-9, 2e30],
    ],
)
def test_extreme_values_are_drawn(values: list[float]) -> None:
    assert "".join(plot(curve(values))).strip() != ""


def test_the_mean_is_told_from_the_ranks_without_colour() -> None:
    drawn = plot(curve([0, 0, 0]), curve([2, 2, 2], rank=1), curve([1, 1, 1], heavy=True))
    assert ["━" in row for row in drawn].count(True) == 1


def test_the_right_edge_names_the_ranks_that_end_there() -> None:
    curves = [curve([0, rank // 3], rank=rank) for rank in range(6)]
    drawn = lines(*curves)
    assert (drawn[1].split()[-1], drawn[8].split()[-1]) == ("3-5", "0-2")


def test_the_legend_has_the_last_value_of_every_curve() -> None:
    drawn = "\n".join(lines(curve([1, 0.5]), curve([1, 0.25], rank=1)))
    assert "rank 0 0.5" in drawn
    assert "rank 1 0.25" in drawn


def test_the_legend_of_many_curves_names_the_extreme_ones() -> None:
    drawn = "\n".join(lines(*[curve([0, rank], rank=rank) for rank in range(64)], width=80))
    assert "64 curves, last 0 (rank 0) to 63 (rank 63)" in drawn


def test_a_logarithmic_drawing_makes_exponential_decay_straight() -> None:
    drawn = plot(curve(10.0 ** -np.arange(9.0)), log=True, rows=9, width=60)
    tops = [row.index(row.strip()[0]) for row in drawn]
    steps = np.diff(tops)
    assert steps.max() - steps.min() <= 2


def test_a_logarithmic_drawing_counts_what_is_not_positive() -> None:
    assert lines(curve([1, 10, 0, -1]), log=True, width=80)[-1].strip() == (
        "! 2 values are NaN, infinite or not positive (steps 2 to 3)"
    )
