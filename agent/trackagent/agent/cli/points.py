"""`trackagent tail` and `trackagent export`: the points of a run as lines."""

from __future__ import annotations

import collections
import csv
import dataclasses
import fnmatch
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from trackagent.agent.cli import OK, NothingThere
from trackagent.agent.cli.destination import destination
from trackagent.agent.cli.options import configured, json_option, opened_store
from trackagent.agent.cli.output import (
    gap_text,
    jsonable,
    local,
    number,
    spaced,
    warn_of_damage,
)
from trackagent.agent.config import AgentConfig
from trackagent.agent.shown import visible
from trackagent.client.reductions import WEIGHT_KEY

if TYPE_CHECKING:
    from trackagent.agent.store.contract import Event, ExportBlock, Reader, RunGap

FOLLOW_INTERVAL_S = 0.3
CSV_COLUMNS = ("key", "source", "rank", "attempt", "step", "time_ns", "value")
# Points turned into text at once: bounds the memory of a large block.
SLICE_POINTS = 50_000


@click.command("export")
@configured
@click.argument("run")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "csv"]),
    default="jsonl",
    show_default=True,
    help="One JSON object a line, or comma-separated values with a heading.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, readable=False, path_type=Path),
    metavar="FILE",
    help="Write there instead of to the screen; a FIFO or device is written into.",
)
@click.option("--key", "pattern", default="*", metavar="PATTERN", help="Only keys that match.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Only that attempt's.")
@click.option("--gaps", "of_gaps", is_flag=True, help="Print where points are missing instead.")
@click.option("--samples", is_flag=True, help="Print what was sampled instead of what was logged.")
def export_command(
    config: AgentConfig,
    run: str,
    form: str,
    output: Path | None,
    pattern: str,
    attempt: int | None,
    of_gaps: bool,
    samples: bool,
) -> int:
    """Print every stored point of a run.

    One a line, in the order of storing. RUN is a run id, the beginning of one (at least 4
    digits), a name, or `latest`.

    \b
    Keys and columns: key, source, rank, attempt, step, time_ns, value.
    Values are exact. NaN and infinities are "NaN", "Infinity" and "-Infinity" in
    JSON, nan, inf and -inf in CSV. time_ns: nanoseconds since 1970-01-01 UTC.
    Steps that a later attempt logged again are printed for each attempt; curves
    show the last one's.

    \b
    With --samples: what agents sampled on the run's nodes, of their GPUs and of
    the ranks' processes. Steps are seconds since the run began; what is not of a
    rank has the rank -1 and the attempt 0.

    \b
    With --gaps: source, attempt, reason, first_step, last_step,
    first_time_ns, last_time_ns, records. Without it, a line on stderr says
    whether there are any.

    \b
    Examples:
      trackagent export latest > points.jsonl
      trackagent export latest --gaps --format csv
      trackagent export latest --attempt 1
      trackagent export latest --samples --key 'system/*'
      trackagent export 4f2a --format csv --output points.csv --key 'train/*'
    """
    lines = _jsonl_lines if form == "jsonl" else _csv_lines
    with opened_store(config) as store:
        run_id = store.run(run).run_id
        attempts = store.attempts(run_id)
        if attempt is not None and attempt not in attempts:
            there = ", ".join(map(str, attempts)) or "none"
            raise NothingThere(f"this run has no attempt {attempt}, only {there}")
        gaps = [gap for gap in store.gaps(run_id) if attempt in (None, gap.attempt)]
        # Opened when it is sure that there is something to say: a FIFO's reader would wait for it.
        with destination(output) as out:
            if of_gaps:
                _write_gaps(gaps, form, out)
                return OK
            if not samples:
                _warn_of_gaps(gaps)
            if form == "csv":
                out.write(",".join(CSV_COLUMNS) + "\n")
            for block in store.export(run_id, samples=samples):
                if attempt not in (None, block.attempt):
                    continue
                for text in lines(block, pattern):
                    out.write(text)
        warn_of_damage(store.damage(run_id))
    return OK


def _write_gaps(gaps: Sequence[RunGap], form: str, out: IO[str]) -> None:
    from trackagent.agent.store.contract import RunGap

    rows = [dataclasses.asdict(gap) for gap in gaps]
    if form == "jsonl":
        out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    writer = csv.DictWriter(out, RunGap.__slots__, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _warn_of_gaps(gaps: Sequence[RunGap]) -> None:
    if gaps:
        records = spaced(sum(gap.records for gap in gaps))
        click.echo(
            f"trackagent: warning: {records} records of this run were refused and are missing: "
            "--gaps lists where",
            err=True,
        )


def _jsonl_lines(block: ExportBlock, pattern: str) -> Iterator[str]:
    # Only the numbers differ from line to line, and their repr is JSON already.
    tail = f'"source": {json.dumps(block.source)}, "rank": {block.rank}, "attempt": {block.attempt}'

    def lines(key: str, points: Iterable[tuple[int, int, float]]) -> str:
        head = f'{{"key": {json.dumps(key, ensure_ascii=False)}, {tail}, "step": '
        return "".join(
            f'{head}{step}, "time_ns": {time_ns}, "value": {_json_number(value)}}}\n'
            for step, time_ns, value in points
        )

    return _sliced(block, pattern, lines)


def _json_number(value: float) -> str:
    # Differences of finite numbers are 0; those of NaN and infinities with themselves are NaN.
    return repr(value) if value - value == 0.0 else f'"{jsonable(value)}"'


def _csv_lines(block: ExportBlock, pattern: str) -> Iterator[str]:
    def lines(key: str, points: Iterable[tuple[int, int, float]]) -> str:
        quoted = io.StringIO()
        csv.writer(quoted, lineterminator="").writerow((key, block.source))
        head = f"{quoted.getvalue()},{block.rank},{block.attempt},"
        return "".join(f"{head}{step},{time_ns},{value!r}\n" for step, time_ns, value in points)

    return _sliced(block, pattern, lines)


def _sliced(
    block: ExportBlock,
    pattern: str,
    lines: Callable[[str, Iterable[tuple[int, int, float]]], str],
) -> Iterator[str]:
    for row, key in enumerate(block.keys):
        if not fnmatch.fnmatchcase(key, pattern):
            continue
        for start in range(0, len(block.steps), SLICE_POINTS):
            part = slice(start, start + SLICE_POINTS)
            yield lines(
                key,
                zip(
                    block.steps[part].tolist(),
                    block.times_ns[part].tolist(),
                    block.values[row, part].tolist(),
                    strict=True,
                ),
            )


@click.command("tail")
@configured
@json_option
@click.argument("run", default="latest")
@click.option("--key", "pattern", default="*", metavar="PATTERN", help="Only keys that match.")
@click.option("--samples", is_flag=True, help="Print what was sampled instead of what was logged.")
@click.option("--once", is_flag=True, help="Print what is stored now and end.")
@click.option(
    "--lines",
    "-n",
    "last",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    metavar="N",
    help="How many of the stored lines to begin with.",
)
def tail_command(
    config: AgentConfig,
    as_json: bool,
    run: str,
    pattern: str,
    samples: bool,
    once: bool,
    last: int,
) -> int:
    """Print the points and events of a run as they come.

    Ends when the run has ended. RUN is a run id, the beginning of one (at least 4 digits), a name,
    or `latest` (the default).

    With --samples the points are those of its nodes, their GPUs and the ranks'
    processes; steps are seconds since the run began.

    \b
    Examples:
      trackagent tail
      trackagent tail latest --key 'train/*' -n 100
      trackagent tail --samples --key 'gpu/*'
      trackagent tail 4f2a --once --json

    \b
    JSON, one object a line: {time_ns, source, step, attempt, values {key: value}}
      for points, {time_ns, source, step, level, message, data} for events,
      {time_ns, source, step, attempt, gap {reason, first_step, last_step,
      records}} where records are missing
    """
    show = _entry_json if as_json else _entry_text
    with opened_store(config) as store:
        run_id = store.run(run).run_id
        news = _News(store, run_id, pattern, samples=samples)
        # The status is read first: a run that has ended by then has nothing more to say after this read.
        ended = store.run(run_id).status != "running"
        for entry in collections.deque(news.read(), maxlen=min(last, sys.maxsize)):
            click.echo(show(entry))
        damage = store.damage(run_id)
        warn_of_damage(damage)
        followed = not (ended or once)
        while not (ended or once):
            time.sleep(FOLLOW_INTERVAL_S)
            ended = store.run(run_id).status != "running"
            for entry in news.read():
                click.echo(show(entry))
        if followed:
            warn_of_damage([one for one in store.damage(run_id) if one not in damage])
    return OK


class _News:
    """What a run has got since the last read, in the order of storing: events, gaps, points. samples:
    points that were sampled instead of those that were logged, and no gaps of the latter."""

    def __init__(self, store: Reader, run_id: str, pattern: str, *, samples: bool) -> None:
        self._store = store
        self._run_id = run_id
        self._pattern = pattern
        self._samples = samples
        self._skip: dict[str, int] = {}
        self._event = 0
        # A gap may grow: then it is told again.
        self._gaps: set[RunGap] = set()

    def read(self) -> Iterator[dict[str, Any]]:
        for event in self._store.events(self._run_id, after=self._event):
            self._event = event.id
            yield _event_entry(event)
        for gap in () if self._samples else self._store.gaps(self._run_id):
            if gap not in self._gaps:
                self._gaps.add(gap)
                yield _gap_entry(gap)
        for block in self._store.export(self._run_id, skip=self._skip, samples=self._samples):
            yield from _point_entries(block, self._pattern)


def _event_entry(event: Event) -> dict[str, Any]:
    return {
        "time_ns": event.time_ns,
        "source": event.source,
        "step": event.step,
        "level": event.level,
        "message": event.message,
        "data": event.data,
    }


def _gap_entry(gap: RunGap) -> dict[str, Any]:
    return {
        "time_ns": gap.last_time_ns,
        "source": gap.source,
        "step": None,
        "attempt": gap.attempt,
        "gap": {
            "reason": gap.reason,
            "first_step": gap.first_step,
            "last_step": gap.last_step,
            "records": gap.records,
        },
        "text": gap_text(gap),
    }


def _point_entries(block: ExportBlock, pattern: str) -> Iterator[dict[str, Any]]:
    rows = [row for row, key in enumerate(block.keys) if fnmatch.fnmatchcase(key, pattern)]
    if not rows:
        return
    keys = [block.keys[row] for row in rows]
    steps, times = block.steps.tolist(), block.times_ns.tolist()
    for column, values in enumerate(block.values[rows].T.tolist()):
        yield {
            "time_ns": times[column],
            "source": block.source,
            "step": steps[column],
            "attempt": block.attempt,
            "values": dict(zip(keys, values, strict=True)),
        }


def _entry_json(entry: dict[str, Any]) -> str:
    said = {key: value for key, value in entry.items() if key != "text"}
    return json.dumps(jsonable(said), ensure_ascii=False, allow_nan=False)


def _entry_text(entry: dict[str, Any]) -> str:
    moment = local(entry["time_ns"])
    begin = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}  {visible(entry['source'])}"
    if entry["step"] is not None:
        begin += f"  step {entry['step']}"
    if "values" in entry:
        every = entry["values"].items()
        # A weight alone is what was asked for.
        shown = [(key, value) for key, value in every if key != WEIGHT_KEY] or every
        return f"{begin}  {'  '.join(f'{visible(k)}={number(v)}' for k, v in shown)}"
    if "gap" in entry:
        return f"{begin}  gap: {entry['text']}"
    return f"{begin}  {entry['level']}: {visible(entry['message'])}"
