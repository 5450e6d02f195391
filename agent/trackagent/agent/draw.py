"""Curves drawn with characters: every rank a line of braille dots, the mean across ranks a heavy line.

Pure: arrays in, a rich Text out. Nothing depends on colour: the labels at the right edge and the legend name
the curves, so that the drawing can be piped. Any number of points, curves and columns is drawn; what cannot
be (NaN, infinities, and in a logarithmic drawing what is not positive) breaks the line, is marked ! on the
axis and counted below; a gap breaks the line too and is marked × there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.text import Text

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MIN_PLOT_COLUMNS = 10
MIN_ROWS = 3
END_LABEL_COLUMNS = 9
# Up to here every curve has its own entry in the legend.
LEGEND_CURVES = 8
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")

# Dots of a braille cell by (row, column), as bits above U+2800.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass(frozen=True, slots=True)
class Curve:
    """Points to be joined in their order. x: (n,) finite and ascending; y: (n,) anything; `short` stands at
    the right edge. heavy: drawn over the others, in another style. gaps: (first x, last x) where points are
    missing; points on both sides are not joined."""

    label: str
    short: str
    x: Floats
    y: Floats
    heavy: bool = False
    gaps: Sequence[tuple[float, float]] = ()

    def joined(self, left: Ints, right: Ints) -> Bools:
        """Whether the points at `left` and at `right`, positions that follow one another among those drawn,
        are neighbours without a gap between."""
        together: Bools = right - left == 1
        for first, last in self.gaps:
            together &= (self.x[left] >= last) | (self.x[right] <= first)
        return together


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to a position between 0 and 1."""

    low: float
    high: float
    log: bool = False

    def place(self, values: Floats) -> Floats:
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        if high <= low:
            return np.full(len(values), 0.5)
        # Halves, so that the distance between the largest numbers of opposite sign does not overflow.
        placed: Floats = (values / 2 - low / 2) / (high / 2 - low / 2)
        return placed


def draw(
    title: str,
    curves: Sequence[Curve],
    *,
    width: int = 80,
    rows: int = 12,
    log: bool = False,
    axis: str = "step",
) -> Text:
    """The curves in at most `width` columns: title, `rows` rows, axis, legend. log: the y axis is
    logarithmic. axis: what stands at the end of the x axis, up to four letters."""
    drawable = [_drawable(curve, log) for curve in curves]
    xs = [curve.x for curve in curves if len(curve.x)]
    ys = [curve.y[good] for curve, good in zip(curves, drawable, strict=True) if good.any()]
    out = Text(no_wrap=True)
    out.append(_fitted(title, width), style="bold")
    if not ys:
        count = sum(len(curve.y) for curve in curves)
        return out.append(
            f"\n  {_undrawn(count, log)}, nothing to draw\n" if count else "\n  no points\n"
        )
    y_scale = _Scale(min(float(y.min()) for y in ys), max(float(y.max()) for y in ys), log)
    x_scale = _Scale(min(float(x[0]) for x in xs), max(float(x[-1]) for x in xs))
    rows = max(MIN_ROWS, rows)
    labels = _tick_rows(y_scale, rows)
    left = max(len(label) for label in labels.values()) + 1
    right = END_LABEL_COLUMNS if sum(not curve.heavy for curve in curves) > 1 else 0
    if width - left - right - 1 < MIN_PLOT_COLUMNS:
        right = 0
    columns = max(MIN_PLOT_COLUMNS, width - left - right - 1)
    cells = _Cells(rows, columns)
    for index, (curve, good) in enumerate(zip(curves, drawable, strict=True)):
        if not curve.heavy:
            spans = _spans(curve, good, x_scale, y_scale, columns * 2, rows * 4)
            cells.dots(spans, _colour(index))
            if len(spans) == 1 and spans[0][1] == spans[0][2]:
                # One dot alone is easily overlooked.
                cells.mark(spans[0][1] // 4, spans[0][0] // 2)
    for curve, good in zip(curves, drawable, strict=True):
        if curve.heavy:
            cells.line(_line(curve, good, x_scale, y_scale, columns, rows))
    ends = _end_labels(curves, drawable, y_scale, rows) if right else {}
    for row in range(rows):
        label = labels.get(row, "")
        out.append(f"\n{label:>{left - 1}} {'┤' if label else '│'}")
        cells.append_row(out, row, full=row in ends)
        if row in ends:
            out.append(f" {ends[row]}", style="dim")
    _append_axis(out, curves, drawable, x_scale, left, columns, axis)
    _append_legend(out, curves, drawable, left, width)
    bad = sum(
        int(len(good) - good.sum())
        for curve, good in zip(curves, drawable, strict=True)
        if not curve.heavy
    )
    if bad:
        steps = np.concatenate(
            [c.x[~good] for c, good in zip(curves, drawable, strict=True) if not c.heavy]
        )
        where = _span_text(float(steps.min()), float(steps.max()))
        note = _fitted(f"! {_undrawn(bad, log)} ({where})", width - left)
        out.append(f"\n{'':{left}}{note}", style="bold red")
    gaps = [gap for curve in curves if not curve.heavy for gap in curve.gaps]
    if gaps:
        where = _span_text(min(first for first, _ in gaps), max(last for _, last in gaps))
        note = _fitted(f"× records are missing ({where})", width - left)
        out.append(f"\n{'':{left}}{note}", style="bold red")
    return out.append("\n")


def _drawable(curve: Curve, log: bool) -> Bools:
    good: Bools = np.isfinite(curve.y)
    if log:
        # NaN compares as false.
        good &= curve.y > 0
    return good


def _undrawn(count: int, log: bool) -> str:
    what = "NaN, infinite or not positive" if log else "NaN or infinite"
    return f"{count} value{' is' if count == 1 else 's are'} {what}"


def _span_text(low: float, high: float) -> str:
    return f"step {low:.0f}" if low == high else f"steps {low:.0f} to {high:.0f}"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


# --- from points to what each column covers ---------------------------------------------------------


def _spans(
    curve: Curve, good: Bools, x_scale: _Scale, y_scale: _Scale, columns: int, rows: int
) -> list[tuple[int, int, int]]:
    """What the line of a curve covers: (column, top row, bottom row), rows from the top, joined without
    holes except where an undrawable point lies between. At most a few spans for each column, for any number
    of points."""
    index = np.flatnonzero(good)
    if not len(index):
        return []
    places = x_scale.place(curve.x[index])
    column = np.clip((places * columns).astype(np.int64), 0, columns - 1)
    row = _row_of(y_scale.place(curve.y[index]), rows)
    starts = np.flatnonzero(np.r_[True, np.diff(column) > 0])
    ends = np.r_[starts[1:], len(index)] - 1
    tops = np.minimum.reduceat(row, starts).tolist()
    bottoms = np.maximum.reduceat(row, starts).tolist()
    joined = curve.joined(index[ends[:-1]], index[starts[1:]]).tolist()
    at = column[starts].tolist()
    first, last = row[starts].tolist(), row[ends].tolist()
    spans = list(zip(at, tops, bottoms, strict=True))
    for i, together in enumerate(joined):
        if together:
            spans += _joint(at[i], last[i], at[i + 1], first[i + 1])
    return spans


def _line(
    curve: Curve, good: Bools, x_scale: _Scale, y_scale: _Scale, columns: int, rows: int
) -> list[int | None]:
    """For each column the row of the average of a curve's points in it, interpolated where a column between
    two points has none, None where nothing is to be drawn."""
    index = np.flatnonzero(good)
    line: list[int | None] = [None] * columns
    if not len(index):
        return line
    column = np.clip((x_scale.place(curve.x[index]) * columns).astype(np.int64), 0, columns - 1)
    places = y_scale.place(curve.y[index])
    starts = np.flatnonzero(np.r_[True, np.diff(column) > 0])
    ends = np.r_[starts[1:], len(index)] - 1
    average = np.add.reduceat(places, starts) / (ends - starts + 1)
    at, row = column[starts].tolist(), _row_of(average, rows).tolist()
    joined = curve.joined(index[ends[:-1]], index[starts[1:]]).tolist()
    for i, (here, y) in enumerate(zip(at, row, strict=True)):
        line[here] = y
        if i and joined[i - 1]:
            between = np.arange(at[i - 1] + 1, here)
            level = np.interp(between, at[i - 1 : i + 1], average[i - 1 : i + 1])
            line[at[i - 1] + 1 : here] = _row_of(level, rows).tolist()
    return line


def _row_of(places: Floats, rows: int) -> npt.NDArray[np.int64]:
    return np.clip(((1 - places) * rows).astype(np.int64), 0, rows - 1)


def _joint(column: int, row: int, to_column: int, to_row: int) -> list[tuple[int, int, int]]:
    """The straight line between two points in different columns; each column's part meets the next one's."""
    width = to_column - column
    spans = []
    before = row
    for step in range(width + 1):
        # Columns change halfway between their centres.
        after = round(row + (to_row - row) * min(1.0, (step + 0.5) / width))
        near = (
            after - (after > before) + (after < before)
            if step < width and after != before
            else after
        )
        spans.append((column + step, min(before, near), max(before, near)))
        before = after
    return spans


class _Cells:
    """The plot: what each character cell shows, and in which style."""

    def __init__(self, rows: int, columns: int) -> None:
        self._dots = np.zeros((rows * 4, columns * 2), dtype=np.bool_)
        self._styles: list[list[str]] = [[""] * columns for _ in range(rows)]
        self._heavy: list[list[str]] = [[""] * columns for _ in range(rows)]

    def dots(self, spans: list[tuple[int, int, int]], style: str) -> None:
        for column, top, bottom in spans:
            self._dots[top : bottom + 1, column] = True
            for row in range(top // 4, bottom // 4 + 1):
                self._styles[row][column // 2] = style

    def line(self, rows: list[int | None]) -> None:
        """rows: for each column where the line is; None breaks it."""
        for column, row in enumerate(rows):
            if row is None:
                continue
            before = rows[column - 1] if column else None
            if before is None or before == row:
                self._heavy[row][column] = "━"
                continue
            top, bottom = min(before, row), max(before, row)
            for between in range(top + 1, bottom):
                self._heavy[between][column] = "┃"
            self._heavy[before][column] = "┓" if before < row else "┛"
            self._heavy[row][column] = "┗" if before < row else "┏"

    def mark(self, row: int, column: int) -> None:
        self._heavy[row][column] = "•"

    def append_row(self, out: Text, row: int, *, full: bool) -> None:
        """full: with the blanks at the end."""
        dots = self._dots[row * 4 : row * 4 + 4]
        used = [i for i, cell in enumerate(self._styles[row]) if cell or self._heavy[row][i]]
        end = len(self._styles[row]) if full else max(used, default=-1) + 1
        for column, style in enumerate(self._styles[row][:end]):
            if heavy := self._heavy[row][column]:
                out.append(heavy, style="bold")
                continue
            pair = dots[:, column * 2 : column * 2 + 2]
            bits = sum(
                bit for y, pairs in enumerate(_DOTS) for x, bit in enumerate(pairs) if pair[y, x]
            )
            out.append(chr(0x2800 + bits) if bits else " ", style=style)


# --- axes and words ---------------------------------------------------------------------------------


def _tick_rows(scale: _Scale, rows: int) -> dict[int, str]:
    """Row → its label."""
    ticks = _log_ticks(scale) if scale.log else _ticks(scale.low, scale.high, max(2, rows // 3))
    placed = _row_of(scale.place(np.array(ticks)), rows).tolist()
    return dict(zip(placed, _tick_labels(ticks), strict=True))


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    step = _round_step(low, high, count)
    if not step:
        return [low] if low == high else [low, high]
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)] or [low]


def _round_step(low: float, high: float, count: int) -> float:
    """1, 2 or 5 times a power of ten; 0 where low and high cannot be told apart by it."""
    rough = high / count - low / count
    if rough <= max(abs(low), abs(high)) * 1e-14:
        return 0.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * m for m in (1, 2, 5) if power * m >= rough), power * 10)
    return step if math.isfinite(step) else 0.0


def _log_ticks(scale: _Scale) -> list[float]:
    low, high = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    every = max(1, (high - low) // 4)
    for mantissas in ((1,), (1, 2, 5), tuple(range(1, 10))):
        ticks = [m * 10.0**e for e in range(low, high + 1, every) for m in mantissas]
        inside = [tick for tick in ticks if scale.low <= tick <= scale.high]
        if len(inside) >= 2:
            return inside
    return _ticks(scale.low, scale.high, 3)


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many digits as tell them apart."""
    ticks = [tick + 0.0 for tick in ticks]  # -0.0 becomes 0.0
    labels: list[str] = []
    for digits in range(3, 17):
        labels = [f"{tick:.{digits}g}" for tick in ticks]
        close = all(
            math.isclose(float(t), v, rel_tol=1e-6, abs_tol=0.0)
            for t, v in zip(labels, ticks, strict=True)
        )
        if len(set(labels)) == len(ticks) and (close or digits >= 6):
            return labels
    return labels


def _step_label(step: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(step) >= size:
            return f"{step / size:.6g}{unit}"
    return f"{step:.0f}"


def _append_axis(
    out: Text,
    curves: Sequence[Curve],
    drawable: Sequence[Bools],
    scale: _Scale,
    left: int,
    columns: int,
    name: str,
) -> None:
    line, words = ["─"] * columns, [" "] * (columns + left + 1)
    ticks = [
        tick for tick in _ticks(scale.low, scale.high, max(2, columns // 14)) if tick == round(tick)
    ]
    free = 0
    for tick, place in zip(ticks, scale.place(np.array(ticks)).tolist(), strict=True):
        column = min(columns - 1, int(place * columns))
        label = _step_label(tick)
        start = min(max(left + 1 + column - len(label) // 2, 0), len(words) - len(label))
        if start < free:
            continue
        line[column] = "┬"
        words[start : start + len(label)] = label
        free = start + len(label) + 2
    if len(words) - free >= len(name):
        words[-len(name) :] = name
    for curve in curves:
        if curve.heavy:
            continue
        for gap in curve.gaps:
            first, last = (scale.place(np.clip(gap, scale.low, scale.high)) * columns).tolist()
            for column in range(int(first), min(columns - 1, int(last)) + 1):
                line[column] = "×"
    for curve, good in zip(curves, drawable, strict=True):
        if not curve.heavy:
            for place in np.unique(
                (scale.place(curve.x[~good]) * columns).astype(np.int64)
            ).tolist():
                line[min(columns - 1, place)] = "!"
    out.append(f"\n{'':{left}}└")
    for mark in line:
        out.append(mark, style="bold red" if mark in "!×" else "")
    out.append("\n" + "".join(words).rstrip())


def _end_labels(
    curves: Sequence[Curve], drawable: Sequence[Bools], scale: _Scale, rows: int
) -> dict[int, str]:
    """Row → names of the curves that end there; ranks that follow one another are drawn together."""
    names: dict[int, list[str]] = {}
    for curve, good in zip(curves, drawable, strict=True):
        if not curve.heavy and good.any():
            row = int(_row_of(scale.place(curve.y[good][-1:]), rows)[0])
            names.setdefault(row, []).append(curve.short)
    return {row: _fitted(_compressed(found), END_LABEL_COLUMNS - 1) for row, found in names.items()}


def _compressed(names: list[str]) -> str:
    """0,1,2,5 as 0-2,5; other names as they are."""
    parts: list[list[str]] = []
    for name in names:
        if (
            parts
            and name.isdecimal()
            and parts[-1][-1].isdecimal()
            and int(name) == int(parts[-1][-1]) + 1
        ):
            parts[-1].append(name)
        else:
            parts.append([name])
    return ",".join(part[0] if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _append_legend(
    out: Text, curves: Sequence[Curve], drawable: Sequence[Bools], left: int, width: int
) -> None:
    """Each curve's last value; of many curves the lowest and the highest."""
    entries = [
        (f"━ {curve.label} {curve.y[-1]:.5g}", "bold")
        for curve in curves
        if curve.heavy and len(curve.y)
    ]
    thin = [(c, i) for i, c in enumerate(curves) if not c.heavy and len(c.y)]
    if len(thin) <= LEGEND_CURVES:
        entries += [(f"⠶ {c.label} {c.y[-1]:.5g}", _colour(i)) for c, i in thin]
    else:
        final = [(float(c.y[drawable[i]][-1]), c.label) for c, i in thin if drawable[i].any()]
        (low, low_name), (high, high_name) = min(final), max(final)
        entries.append(
            (f"⠶ {len(thin)} curves, last {low:.5g} ({low_name}) to {high:.5g} ({high_name})", "")
        )
    used = width
    for entry, style in entries:
        text = _fitted(entry, width - left)
        if used + 2 + len(text) > width:
            out.append(f"\n{'':{left}}")
            used = left
        else:
            out.append("  ")
            used += 2
        out.append(text, style=style)
        used += len(text)


def _fitted(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
