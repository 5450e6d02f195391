"""How the commands print: JSON, tables, and text from training processes made safe for a terminal."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trackagent.agent.shown import visible

if TYPE_CHECKING:
    from trackagent.agent.store.contract import RunGap

PIPED_COLUMNS = 80
WARNED_DAMAGE = 3
STATUS_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "killed": "red"}
LEVEL_STYLES = {"warning": "yellow", "error": "red"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - called while a BrokenPipeError is handled, which the program answers


def console() -> Console:
    """Where people read. Piped output has no colours, and lines as long as they need to be."""
    if sys.stdout.isatty():
        return _Console(highlight=False, markup=False)
    return _Console(highlight=False, markup=False, width=10_000, color_system=None)


def columns() -> int:
    """Columns to draw in."""
    return (
        shutil.get_terminal_size((PIPED_COLUMNS, 24)).columns
        if sys.stdout.isatty()
        else PIPED_COLUMNS
    )


def table(*headings: str) -> Table:
    """A table without lines; a heading that begins with > is right-aligned."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        right = heading.startswith(">")
        result.add_column(
            heading.lstrip(">"), justify="right" if right else "left", overflow="fold"
        )
    return result


def print_table(out: Console, rows: Table) -> None:
    """Without the blanks that fill the last column where the output is piped."""
    if out.is_terminal:
        out.print(rows)
        return
    with out.capture() as captured:
        out.print(rows)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def safe(text: str, style: str = "") -> Text:
    """Text that a training process chose: control characters are shown, not obeyed."""
    return Text(visible(text), style=style)


def warn_of_damage(damage: Sequence[str]) -> None:
    """One line on stderr when points of a run can no longer be read, else nothing."""
    if not damage:
        return
    more = len(damage) - WARNED_DAMAGE
    named = "; ".join(damage[:WARNED_DAMAGE])
    rest = f"; and {more} more (trackagent show --json lists them all)" if more > 0 else ""
    click.echo(
        f"trackagent: warning: the store is damaged, left out are {visible(named)}{rest}", err=True
    )


def print_json(value: Any) -> None:
    """One JSON document. NaN and infinities become the strings "NaN", "Infinity" and "-Infinity"."""
    click.echo(json.dumps(jsonable(value), ensure_ascii=False, indent=2, allow_nan=False))


def jsonable(value: Any) -> Any:
    """`value` with the floats that JSON has no word for as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def number(value: float) -> str:
    """A value in at most 5 significant digits."""
    return f"{value:.5g}"


def clock(time_ns: int) -> str:
    """Local date and time."""
    return local(time_ns).strftime("%Y-%m-%d %H:%M:%S")


def local(time_ns: int) -> datetime:
    return datetime.fromtimestamp(time_ns / 1e9, tz=timezone.utc).astimezone()


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    whole = max(0, int(seconds))
    for unit, name, part, part_name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m")):
        if whole >= unit:
            return f"{whole // unit}{name} {whole % unit // part}{part_name}"
    return f"{whole // 60}m {whole % 60}s" if whole >= 60 else f"{whole}s"


def counted(count: int, what: str, many: str = "") -> str:
    """1 record, 2 records; `many` where that is not `what` with an s."""
    return f"{count} {what if count == 1 else many or what + 's'}"


def spaced(count: int) -> str:
    """12 340: thousands are set apart."""
    return f"{count:,}".replace(",", " ")


def gap_text(gap: RunGap) -> str:
    """What a gap says, in a line."""
    steps = f"steps {gap.first_step} to {gap.last_step}"
    where = f"step {gap.first_step}" if gap.first_step == gap.last_step else steps
    were = "record was" if gap.records == 1 else "records were"
    reason = visible(gap.reason)
    return f"{spaced(gap.records)} {were} refused at {where}: {reason}"


def byte_count(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def since(start_ns: int, end_ns: int | None = None) -> str:
    """Time from `start_ns` to `end_ns`, or to now."""
    return duration(((time.time_ns() if end_ns is None else end_ns) - start_ns) / 1e9)
