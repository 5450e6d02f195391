"""`trackagent runs`: the runs in the store, newest first."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from trackagent.agent.cli import OK
from trackagent.agent.cli.options import configured, json_option, opened_store
from trackagent.agent.cli.output import (
    STATUS_STYLES,
    console,
    print_json,
    print_table,
    safe,
    since,
    table,
)
from trackagent.agent.config import AgentConfig

if TYPE_CHECKING:
    from trackagent.agent.store.contract import RunSummary


@click.command("runs")
@configured
@json_option
@click.option("--experiment", metavar="NAME", help="Only runs of this experiment.")
@click.option(
    "--status",
    type=click.Choice(["running", "finished", "failed", "killed"]),
    help="Only runs in this state.",
)
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=20, show_default=True, metavar="N"
)
def runs_command(
    config: AgentConfig, as_json: bool, experiment: str | None, status: str | None, limit: int
) -> int:
    """List runs, newest first.

    \b
    Examples:
      trackagent runs
      trackagent runs --experiment gpt --status failed
      trackagent runs --json | jq '.[].run_id'

    \b
    JSON keys of each run: run_id, name, experiment, status, attempt, world_size,
      start_time_ns, end_time_ns, error, ranks, series, points, records_stored,
      records_logged, lost_records, losses {reason: records}
    """
    with opened_store(config) as store:
        found = store.runs(experiment=experiment, status=status, limit=limit)
        lost = {
            run.run_id: store.losses(run.run_id) for run in found if as_json and run.lost_records
        }
    if as_json:
        every = [(dataclasses.asdict(run), lost.get(run.run_id, {})) for run in found]
        print_json([{**run, "losses": losses} for run, losses in every])
    elif found:
        _print_runs(found)
    else:
        click.echo("no runs" + (" match" if experiment or status else " yet"))
    return OK


def _print_runs(found: list[RunSummary]) -> None:
    rows = table("id", "name", "experiment", "status", ">ranks", "started", ">took", ">lost")
    for run in found:
        rows.add_row(
            run.run_id[:8],
            safe(run.name),
            safe(run.experiment),
            safe(run.status, STATUS_STYLES.get(run.status, "")),
            str(run.ranks),
            f"{since(run.start_time_ns)} ago",
            since(run.start_time_ns, run.end_time_ns),
            safe(str(run.lost_records), "bold red" if run.lost_records else ""),
        )
    print_table(console(), rows)
