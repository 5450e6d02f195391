"""What `trackagent top` draws: a NodeResponse in so many rows and columns.

Pure. Each kind of thing has a heading and rows; where the rows do not suffice, kinds share them, and a line
says how many more there are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trackagent.agent.cli.output import (
    LEVEL_STYLES,
    byte_count,
    clock,
    duration,
    local,
    number,
)
from trackagent.agent.shown import visible

if TYPE_CHECKING:
    from trackagent.protos.v1.agent_pb2 import (
        Alarm,
        GpuState,
        NodeResponse,
        RankState,
        RunEvent,
        RunState,
    )

BARS = "▁▂▃▄▅▆▇█"
# A value that is not finite.
NO_BAR = "×"
MIN_COLUMNS = 40
# Of what is said where nobody's rows are limited.
MANY_ROWS = 64
# More than a terminal has rows.
MOST_RANKS = 200
NAME_COLUMNS = 18
SPARK_COLUMNS = (8, 32)
# A rank that stands still for less is on its way.
STILL_S = 10.0
# As the straggler rule has it by default.
SLOW_SCORE = 0.75
HOT_CELSIUS = 85.0
HIGH_PERCENT = 92.0
# A sample that is older is marked.
OLD_S = 20.0
# Of one.
ALARM_LINES = 3
INDENT = "    "
# What keeps clocks down without being trouble.
HARMLESS = ("idle", "applications_clocks", "sync_boost", "display_clocks")

Row = list[Text]

# rich wraps text for a console.
_MEASURING = Console(width=80, color_system=None)


class _Section:
    """Things of one kind: headings (> is right-aligned), and rows, those that must be seen first."""

    def __init__(self, headings: Sequence[str], rows: Sequence[Row], what: str, more: int) -> None:
        self._headings = headings
        self._rows = rows
        self._what = what
        self._more = more

    @property
    def wanted(self) -> int:
        """Lines below the heading."""
        return sum(map(_height, self._rows)) + bool(self._more)

    def shown(self, room: int) -> list[Table | Text]:
        """The heading, and below it `room` lines at most."""
        count = len(self._rows)
        if self.wanted > room:
            below, count = 0, 0
            for row in self._rows:
                below += _height(row)
                if below > room - 1:
                    break
                count += 1
        grid = Table.grid(padding=(0, 2, 0, 0))
        for heading in self._headings:
            right = heading.startswith(">")
            grid.add_column(justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        grid.add_row(*(Text(heading.lstrip(">"), "bold") for heading in self._headings))
        for row in self._rows[:count]:
            grid.add_row(*row)
        more = self._more + len(self._rows) - count
        return [grid, Text(f"and {more} more {self._what}", "dim")] if more else [grid]


def _height(row: Row) -> int:
    return max(cell.plain.count("\n") + 1 for cell in row)


def page(
    answer: NodeResponse, columns: int, rows: int | None, *, note: str = ""
) -> list[Table | Text]:
    """Lines and tables from top to bottom, at most `rows` lines of at most `columns` columns. rows None: as
    many as it takes, MANY_ROWS of each kind. note: a line above, such as why this is not news."""
    columns = max(MIN_COLUMNS, columns)
    head = [_fitted(line, columns) for line in _head(answer, note)]
    sections = [
        one
        for one in (
            _runs(answer, columns),
            _ranks(answer),
            _gpus(answer),
            _alarms(answer, columns),
            _events(answer, columns),
        )
        if one.wanted
    ]
    if rows is None:
        shares = [min(one.wanted, MANY_ROWS) for one in sections]
        airy = True
    else:
        room = rows - len(head) - len(sections)
        shares = shared(room, [one.wanted for one in sections])
        airy = room - sum(shares) >= len(sections)
    lines: list[Table | Text] = [*head]
    for section, room in zip(sections, shares, strict=True):
        if room:
            lines.extend([Text("")] * airy + section.shown(room))
    return lines


def shared(room: int, wanted: Sequence[int]) -> list[int]:
    """`room` lines given out one by one to those who want more, from the first on."""
    given = [0] * len(wanted)
    while room > 0 and given != list(wanted):
        for at, most in enumerate(wanted):
            if given[at] < most and room > 0:
                given[at] += 1
                room -= 1
    return given


def sparkline(values: Sequence[float], columns: int) -> str:
    """The values as bars, the lowest at the bottom; where there are more than `columns`, means of some in a
    row. NO_BAR: one of them is not finite."""
    groups = min(columns, len(values))
    cuts = [len(values) * at // groups for at in range(groups + 1)] if groups else [0]
    # Each divided first, since the sum of finite numbers may not be one.
    means = [sum(one / (end - at) for one in values[at:end]) for at, end in pairwise(cuts)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # Halves, since the difference of two finite numbers may not be one.
    span = high / 2 - low / 2

    def bar(mean: float) -> str:
        if not math.isfinite(mean):
            return NO_BAR
        place = (mean / 2 - low / 2) / span if span else 0.0
        return BARS[min(len(BARS) - 1, int(place * len(BARS)))]

    return "".join(map(bar, means))


def steps_per_second(run: RunState) -> float | None:
    """By the median of its ranks; None where none is known."""
    times = [one.step_seconds for one in run.ranks if one.step_seconds > 0]
    return 1 / statistics.median(times) if times else None


def name_of(run: RunState) -> str:
    """For people."""
    return run.run_name or run.run_id[:8]


# --- head


def _head(answer: NodeResponse, note: str) -> Iterable[Text]:
    yield Text.assemble(
        (f"node {visible(answer.node)}", "bold"),
        f"  {clock(answer.time_ns)}  agent {visible(answer.agent_version)}",
    )
    if note:
        yield Text(visible(note), "bold red")
    node, container = _node_line(answer), _container_line(answer)
    if node.plain:
        yield node
    if container.plain:
        yield container
    for one in answer.collectors:
        if one.state == "failing":
            yield Text(f"{visible(one.name)}: failing: {visible(one.reason)}", "yellow")
        elif one.name == "gpu" and one.state == "off" and not answer.gpus:
            yield Text(f"no GPUs: {visible(one.reason)}", "dim")
    if not answer.collectors:
        yield Text("nothing is sampled here (collect = none)", "dim")
    if not answer.runs:
        yield Text("no runs", "dim")


def _node_line(answer: NodeResponse) -> Text:
    said = dict(answer.readings)
    line = Text()
    if (cpu := said.get("system/cpu/percent")) is not None:
        line.append(f"cpu {cpu:.0f} %", _alarm(cpu, HIGH_PERCENT))
        if (core := said.get("system/cpu/max_core_percent")) is not None:
            line.append(f" (max core {core:.0f} %)")
    total, used = (said.get(f"system/memory/{name}_bytes") for name in ("total", "used"))
    if total and used is not None:
        percent = 100 * used / total
        line.append("  memory " if line.plain else "memory ")
        line.append(
            f"{used / 2**30:.1f}/{total / 2**30:.1f} GiB ({percent:.0f} %)",
            _alarm(percent, HIGH_PERCENT),
        )
    loads = [said.get(f"system/load_{minutes}m") for minutes in (1, 5, 15)]
    if None not in loads:
        line.append(f"  load {' '.join(f'{load:.2f}' for load in loads)}")
    sampled_ns = max(
        (one.sampled_ns for one in answer.collectors if one.name == "system"), default=0
    )
    if line.plain and answer.time_ns - sampled_ns > OLD_S * 1e9:
        line.append(f"  {duration((answer.time_ns - sampled_ns) / 1e9)} ago", "yellow")
    return line


def _container_line(answer: NodeResponse) -> Text:
    """What the agent's control group may use, where that is limited."""
    said = dict(answer.readings)
    parts = []
    cores, cpu = said.get("cgroup/cpu/limit_cores"), said.get("cgroup/cpu/percent")
    if cores and cpu is not None:
        parts.append(f"cpu {cpu / 100:.1f} of {cores:g} cores")
    limit, used = (said.get(f"cgroup/memory/{name}_bytes") for name in ("limit", "working_set"))
    if limit and used is not None:
        parts.append(f"memory {byte_count(used)} of {byte_count(limit)}")
    return Text(f"container {'  '.join(parts)}" if parts else "")


# --- what there is


def _runs(answer: NodeResponse, columns: int) -> _Section:
    low, high = SPARK_COLUMNS
    spark = min(high, max(low, columns - 76 + low))
    rows = []
    for run in answer.runs:
        rate = steps_per_second(run)
        steps = [rank.step for rank in run.ranks if rank.HasField("step")]
        last = run.losses[-1] if run.losses else None
        bad = last is not None and not math.isfinite(last)
        rows.append(
            [
                _name(name_of(run)),
                Text(str(run.attempt)),
                Text(f"{len(run.ranks)}/{run.world_size}"),
                Text(str(max(steps)) if steps else "-"),
                Text("-" if rate is None else f"{rate:.3g}"),
                _name(run.loss_key, 14),
                Text("" if last is None else number(last), "red" if bad else ""),
                Text(sparkline(run.losses, spark), "cyan"),
            ]
        )
    headings = ["run", ">try", ">ranks", ">step", ">steps/s", "metric", ">last", ""]
    return _Section(headings, rows, "runs", 0)


def _ranks(answer: NodeResponse) -> _Section:
    found = [(run, rank) for run in answer.runs for rank in run.ranks]
    # Those that are wrong first; else in order of runs and ranks.
    found.sort(key=lambda one: _badness(one[1]))
    rows = []
    for run, rank in found[:MOST_RANKS]:
        score = rank.score if rank.HasField("score") else None
        rows.append(
            [
                Text(str(rank.rank)),
                _name(name_of(run)),
                Text(str(rank.step) if rank.HasField("step") else "-"),
                Text(_seconds(rank.step_seconds) if rank.HasField("step_seconds") else "-"),
                Text(
                    "-" if score is None else f"{score:.2f}",
                    "yellow" if score is not None and score < SLOW_SCORE else "",
                ),
                Text(f"{rank.cpu_percent:.0f}" if rank.HasField("cpu_percent") else "-"),
                Text(byte_count(rank.rss_bytes) if rank.HasField("rss_bytes") else "-"),
                _rank_note(rank),
            ]
        )
    headings = [">rank", "run", ">step", ">step time", ">score", ">cpu %", ">memory", ""]
    return _Section(headings, rows, "ranks", answer.more_ranks + max(0, len(found) - MOST_RANKS))


def _badness(rank: RankState) -> tuple[bool, bool, bool]:
    slow = rank.HasField("score") and rank.score < SLOW_SCORE
    return rank.connected, not slow, not _is_still(rank)


def _is_still(rank: RankState) -> bool:
    return rank.still_seconds > max(STILL_S, 2 * rank.step_seconds)


def _rank_note(rank: RankState) -> Text:
    if not rank.connected:
        return Text("disconnected", "red")
    if _is_still(rank):
        return Text(f"still {duration(rank.still_seconds)}", "yellow")
    return Text("")


def _gpus(answer: NodeResponse) -> _Section:
    rows = [_gpu_row(gpu) for gpu in sorted(answer.gpus, key=lambda gpu: not gpu.lost)]
    headings = ["gpu", "name", ">util", ">memory", ">power", ">temp", "throttled"]
    return _Section(headings, rows, "GPUs", answer.more_gpus)


def _gpu_row(gpu: GpuState) -> Row:
    said = dict(gpu.readings)
    name = f"{gpu.name} {gpu.mig_profile}".strip()
    if gpu.lost:
        lost = Text(f"lost: {visible(gpu.lost)}", "bold red")
        lost.truncate(40, overflow="ellipsis")
        return [_name(gpu.gpu, 6), _name(name), *[Text("-")] * 4, lost]
    total, used = said.get("memory_total_bytes"), said.get("memory_used_bytes")
    watts, limit = said.get("power_watts"), said.get("power_limit_watts")
    celsius = said.get("temperature_celsius")
    util = said.get("utilization_percent")
    memory = "-" if used is None else f"{used / 2**30:.1f}"
    if used is not None and total:
        memory += f"/{total / 2**30:.0f} GiB"
    power = "-" if watts is None else f"{watts:.0f}"
    if watts is not None:
        power += " W" if limit is None else f"/{limit:.0f} W"
    full = 100 * used / total if used is not None and total else 0.0
    return [
        _name(gpu.gpu, 6),
        _name(name),
        Text("-" if util is None else f"{util:.0f} %"),
        Text(memory, _alarm(full, HIGH_PERCENT)),
        Text(power),
        Text("-" if celsius is None else f"{celsius:.0f} °C", _alarm(celsius or 0.0, HOT_CELSIUS)),
        Text(", ".join(throttled(said)), "yellow"),
    ]


def throttled(readings: dict[str, float]) -> list[str]:
    """What keeps the clocks of a busy GPU down now."""
    return [
        visible(name).replace("_", " ")
        for key, value in sorted(readings.items())
        if (name := key.partition("throttle/")[2]) and value and name not in HARMLESS
    ]


def _alarms(answer: NodeResponse, columns: int) -> _Section:
    rows = [[_folded(_alarm_text(one, answer), columns)] for one in reversed(answer.alarms)]
    return _Section(["wrong now"], rows, "alarms", answer.more_alarms)


def _alarm_text(alarm: Alarm, answer: NodeResponse) -> Text:
    names = {run.run_id: name_of(run) for run in answer.runs}
    whose = f"{visible(names.get(alarm.run_id, alarm.run_id[:8]))}: " if alarm.run_id else ""
    return Text.assemble(
        (visible(alarm.level), LEVEL_STYLES.get(alarm.level, "")),
        f"  {whose}{visible(alarm.message)}",
    )


def _events(answer: NodeResponse, columns: int) -> _Section:
    names = {run.run_id: name_of(run) for run in answer.runs}
    rows = [[_fitted(_event_text(one, names), columns)] for one in reversed(answer.events)]
    return _Section(["events"], rows, "events", 0)


def _event_text(event: RunEvent, names: dict[str, str]) -> Text:
    name = visible(names.get(event.run_id, event.run_id[:8]))
    step = f" step {event.step}" if event.HasField("step") else ""
    return Text.assemble(
        f"{local(event.time_ns):%H:%M:%S} ",
        (visible(event.level), LEVEL_STYLES.get(event.level, "")),
        f"  {name} {visible(event.source)}{step}: {visible(event.message)}",
    )


# --- pieces


def _name(text: str, columns: int = NAME_COLUMNS) -> Text:
    return _fitted(Text(visible(text)), columns)


def _fitted(text: Text, columns: int) -> Text:
    """Cut to so many columns."""
    text.truncate(columns, overflow="ellipsis")
    text.no_wrap = True
    return text


def _folded(text: Text, columns: int) -> Text:
    """In ALARM_LINES lines at most."""
    lines = text.wrap(_MEASURING, columns - len(INDENT), no_wrap=False, overflow="fold")
    if len(lines) > ALARM_LINES:
        last = lines[ALARM_LINES - 1]
        last.rstrip()
        last.truncate(columns - len(INDENT) - 1)
        last.append("…")
    shown = Text(f"\n{INDENT}").join(lines[:ALARM_LINES])
    shown.no_wrap = True
    return shown


def _alarm(value: float, limit: float) -> str:
    return "yellow" if value >= limit else ""


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
