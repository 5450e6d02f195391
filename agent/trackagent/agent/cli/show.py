"""`trackagent show`: one run, with its curves drawn in the terminal."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from trackagent.agent.cli import OK, NothingThere, samples
from trackagent.agent.cli.options import configured, json_option, opened_store
from trackagent.agent.cli.output import (
    LEVEL_STYLES,
    STATUS_STYLES,
    clock,
    columns,
    console,
    counted,
    gap_text,
    number,
    print_json,
    print_table,
    safe,
    since,
    table,
    warn_of_damage,
)
from trackagent.agent.cli.reductions import print_reductions, reduction_curves
from trackagent.agent.config import AgentConfig
from trackagent.agent.shown import visible
from trackagent.client.reductions import DEFINITION, WEIGHT_KEY

if TYPE_CHECKING:
    from rich.console import Console

    from trackagent.agent.store.contract import Event, Reader, RunGap, RunSummary, SeriesInfo

SHOWN_EVENTS = 10
SHOWN_GAPS = 10
SHOWN_KEYS = 30
DRAWN_KEYS = 3
# What people look at first, as parts of keys.
_FIRST = ("loss", "perplexity", "accuracy", "acc", "reward", "grad_norm", "lr")


@click.command("show")
@configured
@json_option
@click.argument("run", default="latest")
@click.option(
    "--key",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Draw the keys that match, such as 'train/*'; may be given again.  [default: a few]",
)
@click.option("--samples", "all_samples", is_flag=True, help="List everything that was sampled.")
@click.option("--log", is_flag=True, help="Draw with a logarithmic y axis.")
@click.option("--no-curves", is_flag=True, help="Draw nothing.")
@click.option(
    "--rows",
    type=click.IntRange(min=3, max=200),
    default=12,
    show_default=True,
    metavar="N",
    help="Height of a drawing.",
)
def show_command(
    config: AgentConfig,
    as_json: bool,
    run: str,
    patterns: tuple[str, ...],
    all_samples: bool,
    log: bool,
    no_curves: bool,
    rows: int,
) -> int:
    """Show a run and draw its curves.

    Facts, params, tags, events, losses and series come first. RUN is a run id, the beginning
    of one (at least 4 digits), a name, or `latest` (the default). Every rank is a curve; the
    heavy line is the mean of the ranks that logged a step. Where records were refused, lines
    are interrupted. Reductions are keys that `trackagent reduction` shows across ranks, and how
    many of these have reported the last step. What agents sampled on the run's nodes, of their
    GPUs and of the ranks' processes comes last, over the seconds since the run began.

    \b
    Examples:
      trackagent show
      trackagent show 4f2a --key 'train/*' --log
      trackagent show --samples --key 'system/cpu/*' --key 'gpu/0/*'
      trackagent show latest --json | jq .lost_records

    \b
    JSON keys: those of `trackagent runs --json`, and params, tags,
      losses {reason: records}, events [{id, time_ns, level, source, step,
      message, data}], gaps [{source, attempt, reason, first_step, last_step,
      first_time_ns, last_time_ns, records}], series [{key, source, points,
      first_step, last_step, last_value}], reductions [{key, reduce,
      first_step, last_step, reported, world_size, reduced}], samples [the same
      as series of what was sampled, steps in seconds], damage [what of the
      points can no longer be read]
    """
    with opened_store(config) as store:
        summary = store.run(run)
        damage = store.damage(summary.run_id)
        warn_of_damage(damage)
        if as_json:
            print_json({**_run_json(store, summary), "damage": damage})
            return OK
        series = store.series_list(summary.run_id)
        sampled = samples.grouped(store.samples_list(summary.run_id))
        reductions = store.reductions_list(summary.run_id)
        by_key = _by_key(series)
        keys = sorted({*by_key, *(one.key for one in reductions)})
        if not patterns:
            # No series of the user's, though kept as one.
            keys = [key for key in keys if key != WEIGHT_KEY]
        drawn = [] if no_curves else _chosen(keys, patterns)
        beside = {} if no_curves else samples.drawn(sampled, patterns)
        if patterns and not no_curves and not drawn and not beside:
            raise NothingThere(f"no key of this run matches {' or '.join(patterns)}")
        out = console()
        _print_facts(out, summary, store.losses(summary.run_id))
        _print_settings(out, "params", store.params(summary.run_id))
        tags = store.tags(summary.run_id)
        # What they say is in the list of reductions.
        _print_settings(
            out, "tags", {k: v for k, v in tags.items() if not k.startswith(DEFINITION)}
        )
        _print_events(out, store.events(summary.run_id))
        gaps = store.gaps(summary.run_id)
        _print_gaps(out, gaps)
        _print_series(out, [one for one in series if one.key != WEIGHT_KEY])
        print_reductions(out, reductions, summary.world_size)
        samples.print_samples(out, sampled, every=all_samples)
        # Of these, the curves of single ranks have holes, and their mean would be another.
        reduced = {one.key for one in reductions if one.reduced}
        chosen = {key: None if key in reduced else by_key[key] for key in drawn}
        _print_curves(out, store, summary.run_id, chosen, gaps, rows=rows, log=log)
        _print_curves(out, store, summary.run_id, beside, (), rows=rows, log=log, axis="s")
        hidden = len(drawn) < len(keys) or len(beside) < len(sampled)
        if hidden and not patterns and not no_curves:
            count = f"{len(drawn) + len(beside)} of {len(keys) + len(sampled)}"
            out.print(f"\n{count} keys drawn; choose with --key PATTERN")
    return OK


def _run_json(store: Reader, summary: RunSummary) -> dict[str, Any]:
    run_id = summary.run_id
    return {
        **dataclasses.asdict(summary),
        "params": store.params(run_id),
        "tags": store.tags(run_id),
        "losses": store.losses(run_id),
        "events": [dataclasses.asdict(event) for event in store.events(run_id)],
        "gaps": [dataclasses.asdict(gap) for gap in store.gaps(run_id)],
        "series": [dataclasses.asdict(one) for one in store.series_list(run_id)],
        "reductions": [dataclasses.asdict(one) for one in store.reductions_list(run_id)],
        "samples": [dataclasses.asdict(one) for one in store.samples_list(run_id)],
    }


def _print_facts(out: Console, run: RunSummary, losses: dict[str, int]) -> None:
    title = safe(run.name, "bold")
    title.append("  ")
    title.append(run.status, STATUS_STYLES.get(run.status, ""))
    out.print(title)
    facts = table("", "")
    facts.show_header = False
    facts.add_row("run id", run.run_id)
    facts.add_row("experiment", safe(run.experiment))
    took = f"{since(run.start_time_ns, run.end_time_ns)}"
    facts.add_row(
        "started", f"{clock(run.start_time_ns)}, {took}{'' if run.end_time_ns else ' ago'}"
    )
    facts.add_row("ranks", f"{run.ranks} of {run.world_size}, attempt {run.attempt}")
    if run.error:
        facts.add_row("error", safe(run.error, "red"))
    logged = f", {run.records_logged} logged"
    if run.records_logged is None:
        running = run.status == "running"
        logged = f"; {'ranks count theirs when they end' if running else 'a rank ended without its count'}"
    style = "yellow" if run.records_logged not in (None, run.records_stored) else ""
    facts.add_row("records", safe(f"{run.records_stored} stored{logged}", style))
    why = ", ".join(f"{reason} {count}" for reason, count in sorted(losses.items()))
    lost = counted(run.lost_records, "record") + (f": {why}" if why else "")
    facts.add_row("lost", safe(lost, "bold red" if run.lost_records else ""))
    facts.add_row("points", f"{run.points} in {run.series} series")
    print_table(out, facts)


def _print_settings(out: Console, title: str, settings: dict[str, str]) -> None:
    if not settings:
        return
    out.print(f"\n{title}", style="bold")
    rows = table("", "")
    rows.show_header = False
    for key, value in sorted(settings.items()):
        rows.add_row(safe(f"  {key}"), safe(value))
    print_table(out, rows)


def _print_events(out: Console, events: Sequence[Event]) -> None:
    if not events:
        return
    hidden = len(events) - SHOWN_EVENTS
    out.print(
        "\nevents" + (f" (the last {SHOWN_EVENTS} of {len(events)})" if hidden > 0 else ""),
        style="bold",
    )
    rows = table("", "", "", "")
    rows.show_header = False
    for event in events[-SHOWN_EVENTS:]:
        where = event.source if event.step is None else f"{event.source} step {event.step}"
        rows.add_row(
            f"  {clock(event.time_ns)}",
            safe(event.level, LEVEL_STYLES.get(event.level, "")),
            safe(where),
            safe(f"{event.message} {json.dumps(event.data)}" if event.data else event.message),
        )
    print_table(out, rows)


def _print_gaps(out: Console, gaps: Sequence[RunGap]) -> None:
    if not gaps:
        return
    hidden = len(gaps) - SHOWN_GAPS
    which = f" (the largest {SHOWN_GAPS} of {len(gaps)}, --json lists them all)"
    out.print("\ngaps" + (which if hidden > 0 else ""), style="bold")
    rows = table("", "", "")
    rows.show_header = False
    shown = sorted(gaps, key=lambda gap: gap.records)[-SHOWN_GAPS:]
    for gap in sorted(shown, key=lambda gap: gap.first_time_ns):
        rows.add_row(
            f"  {clock(gap.first_time_ns)}", safe(gap.source), safe(gap_text(gap), "bold red")
        )
    print_table(out, rows)


def _print_series(out: Console, series: Sequence[SeriesInfo]) -> None:
    """One row a key: a job of many ranks has more series than anyone reads."""
    if not series:
        return
    out.print("\nseries", style="bold")
    by_key = _by_key(series)
    rows = table("  key", ">sources", ">points", ">first step", ">last step", "last value")
    for key, found in list(by_key.items())[:SHOWN_KEYS]:
        last = [one.last_value for one in found]
        # Compared as text: NaN is equal to nothing, not even to itself.
        ends = sorted({number(value) for value in (min(last), max(last))}, key=float)
        rows.add_row(
            safe(f"  {key}"),
            str(len(found)),
            str(sum(one.points for one in found)),
            str(min(one.first_step for one in found)),
            str(max(one.last_step for one in found)),
            " to ".join(ends),
        )
    print_table(out, rows)
    if len(by_key) > SHOWN_KEYS:
        out.print(f"  and {len(by_key) - SHOWN_KEYS} more keys (--json lists them all)")


def _print_curves(
    out: Console,
    store: Reader,
    run_id: str,
    by_key: Mapping[str, list[SeriesInfo] | None],
    gaps: Sequence[RunGap],
    *,
    rows: int,
    log: bool,
    axis: str = "step",
) -> None:
    """None in the place of a key's series: its reduction over all ranks is drawn."""
    # Not at the top: `show --json` does without.
    from trackagent.agent.cli.curves import read_curves
    from trackagent.agent.draw import draw

    for key, series in by_key.items():
        if series is None:
            curves = reduction_curves(store.reduction(run_id, key))
        else:
            curves = read_curves(store, run_id, series, gaps)
        out.print()
        drawing = draw(visible(key), curves, width=columns(), rows=rows, log=log, axis=axis)
        out.print(drawing, end="")


def _by_key(series: Sequence[SeriesInfo]) -> dict[str, list[SeriesInfo]]:
    found: dict[str, list[SeriesInfo]] = {}
    for one in series:
        found.setdefault(one.key, []).append(one)
    return found


def _chosen(keys: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The keys that match a pattern; without patterns, the few that people look at first."""
    if patterns:
        return [key for key in keys if any(fnmatch.fnmatchcase(key, p) for p in patterns)]

    def place(key: str) -> int:
        return next((i for i, part in enumerate(_FIRST) if part in key.lower()), len(_FIRST))

    return sorted(keys, key=place)[:DRAWN_KEYS]
