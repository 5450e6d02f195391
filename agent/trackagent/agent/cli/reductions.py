"""`trackagent reduction`: a key across ranks, step by step; and what `show` lists of such keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from trackagent.agent.cli import OK
from trackagent.agent.cli.options import configured, json_option, opened_store
from trackagent.agent.cli.output import (
    columns,
    console,
    counted,
    number,
    print_json,
    print_table,
    safe,
    spaced,
    table,
)
from trackagent.agent.config import AgentConfig
from trackagent.agent.shown import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from trackagent.agent.draw import Curve
    from trackagent.agent.store.contract import Reduction, ReductionInfo

SHOWN_KEYS = 30
SHOWN_STEPS = 20
_COLUMNS = (
    "time_ns",
    "count",
    "nans",
    "world_size",
    "weight",
    "sum",
    "mean",
    "std",
    "min",
    "max",
    "min_rank",
    "max_rank",
)


@click.command("reduction")
@configured
@json_option
@click.argument("run")
@click.argument("key")
@click.option(
    "--over",
    default="all",
    show_default=True,
    metavar="RANKS",
    help="Which ranks: all, 'node NAME', or a group such as tp=0.",
)
@click.option(
    "--last",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Print the last N steps.  [default: {SHOWN_STEPS}, all with --json]",
)
@click.option("--no-curve", is_flag=True, help="Draw nothing.")
def reduction_command(
    config: AgentConfig,
    as_json: bool,
    run: str,
    key: str,
    over: str,
    last: int | None,
    no_curve: bool,
) -> int:
    """Print a key across ranks, step by step.

    How many ranks have reported of those that there are, mean, standard deviation, and the
    least and the greatest value with the ranks that hold them. It is right at any moment: ranks
    that come later are added to their step. Means are weighted by client.log(..., weight=n). Of
    a step that several attempts logged, the last one's values count. RUN is a run id, the
    beginning of one (at least 4 digits), a name, or `latest`.

    \b
    Examples:
      trackagent reduction latest train/loss
      trackagent reduction latest train/loss --over 'node a17' --last 100
      trackagent reduction 4f2a train/loss --over tp=0
      trackagent reduction latest train/loss --json | jq '.steps[-1].max_rank'

    \b
    JSON keys: run_id, key, over, reduce, steps [{step, time_ns, count, nans,
      world_size, weight, sum, mean, std, min, max, min_rank, max_rank}].
      count: values that are numbers; nans: values that are not; world_size:
      the ranks that there are to report; rank -1: no value is a number.
    """
    with opened_store(config) as store:
        run_id = store.run(run).run_id
        found = store.reduction(run_id, key, over)
    if as_json:
        steps = _rows(found, last or len(found.steps))
        head = {"run_id": run_id, "key": key, "over": over, "reduce": found.reduce}
        print_json({**head, "steps": steps})
        return OK
    out = console()
    ranks = "all ranks" if over == "all" else f"ranks of {over}"
    out.print(safe(f"{key} over {ranks}", "bold"))
    hidden = len(found.steps) - (last or SHOWN_STEPS)
    if hidden > 0:
        out.print(f"{counted(hidden, 'earlier step')} left out (--last N shows more)")
    print_table(out, _steps_table(found, _rows(found, last or SHOWN_STEPS)))
    if not no_curve and len(found.steps) > 1:
        _draw(out, found)
    return OK


def print_reductions(out: Console, found: Sequence[ReductionInfo], world_size: int) -> None:
    """What can be looked at across ranks, where there are several."""
    if world_size < 2 or not found:
        return
    out.print("\nreductions", style="bold")
    rows = table("  key", "shown", ">last step", "ranks that reported it")
    for one in found[:SHOWN_KEYS]:
        complete = one.reported >= one.world_size
        reported = f"{spaced(one.reported)} of {spaced(one.world_size)}"
        rows.add_row(
            safe(f"  {one.key}"),
            one.reduce,
            str(one.last_step),
            safe(reported, "" if complete else "yellow"),
        )
    print_table(out, rows)
    if len(found) > SHOWN_KEYS:
        out.print(f"  and {len(found) - SHOWN_KEYS} more keys (--json lists them all)")


def _rows(found: Reduction, last: int) -> list[dict[str, Any]]:
    """The last steps as JSON has them."""
    part = slice(max(0, len(found.steps) - last), None)
    arrays = [found.steps, found.times_ns, *(getattr(found, name) for name in _COLUMNS[1:])]
    names = ("step", *_COLUMNS)
    lists = [array[part].tolist() for array in arrays]
    return [dict(zip(names, row, strict=True)) for row in zip(*lists, strict=True)]


def _steps_table(found: Reduction, steps: list[dict[str, Any]]) -> Any:
    shown = found.reduce if found.reduce in ("sum", "min", "max") else "mean"
    figures = [shown, *(name for name in ("mean", "std", "min", "max") if name != shown)]
    rows = table(">step", "ranks", *(f">{name}" for name in figures))
    for step in steps:
        there = step["count"] + step["nans"]
        ranks = f"{spaced(there)} of {spaced(step['world_size'])}"
        if step["nans"]:
            ranks += f", {step['nans']} NaN"
        rows.add_row(
            str(step["step"]),
            safe(ranks, "" if there >= step["world_size"] and not step["nans"] else "yellow"),
            *(_figure(name, step) for name in figures),
        )
    return rows


def _figure(name: str, step: dict[str, Any]) -> str:
    text = number(step[name])
    held = step.get(f"{name}_rank", -1)
    return f"{text} (rank {held})" if held >= 0 else text


def _draw(out: Console, found: Reduction) -> None:
    from trackagent.agent.draw import draw

    out.print()
    out.print(draw(visible(found.key), reduction_curves(found), width=columns()), end="")


def reduction_curves(found: Reduction) -> list[Curve]:
    """What is shown first as the heavy one, between the least and the greatest."""
    from trackagent.agent.cli.curves import thinned
    from trackagent.agent.draw import Curve

    shown = found.reduce if found.reduce in ("sum", "min", "max") else "mean"
    names = [shown] if shown == "sum" else list(dict.fromkeys(["min", "max", shown]))
    curves = []
    for name in names:
        x, y = thinned(found.steps.astype(float), getattr(found, name))
        curves.append(Curve(name, name, x, y, heavy=name == shown))
    return curves
