"""`trackagent forward`: runs of this node's store, delivered to a hub."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from trackagent.agent.addresses import hub_address
from trackagent.agent.cli import OK
from trackagent.agent.cli.options import configured, json_option, opened_store
from trackagent.agent.cli.output import counted, print_json
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import ConfigError
from trackagent.agent.shown import visible

if TYPE_CHECKING:
    from trackagent.agent.sinks.forward import ForwardSink
    from trackagent.agent.store.contract import Reader, RunSummary


@click.command("forward")
@configured
@json_option
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--to", "hub", required=True, metavar="HOST:PORT", help="The hub.")
@click.option("--token-file", metavar="FILE", help="The cluster's token; the hub has it too.")
@click.option("--tls-ca", metavar="FILE", help="The cluster's CA, instead of a token.")
@click.option("--tls-cert", metavar="FILE", help="This node's certificate by it.")
@click.option("--tls-key", metavar="FILE", help="Its key.")
def forward_command(config: AgentConfig, as_json: bool, runs: tuple[str, ...], hub: str) -> int:
    """Deliver runs of this node's store to a hub: those of a job whose rank 0 named none, or all.

    What the hub has already is not sent again, so the command may be repeated, and a run that goes on may be
    forwarded as it does. Nothing is deleted here. What was sampled of the node stays. A RUN is an id, the
    beginning of one, a name, or "latest"; without any, every run is delivered.

    \b
    Examples:
      trackagent forward --to hub:7717 --token-file ~/.trackagent-token
      trackagent forward latest --to hub:7717 --tls-ca ca.pem --tls-cert me.pem \\
        --tls-key me.key

    \b
    JSON keys of each run: run_id, name, batches and points that were sent now
    """
    from trackagent.agent.sinks.forward import upstream_sink

    config = _delivering_to(config, hub)
    sink = upstream_sink(config, config.node)
    sent = []
    try:
        with opened_store(config) as store:
            for run in _chosen(store, runs):
                sent.append(_forwarded(store, run, sink))
                if not as_json:
                    _print(run, sent[-1], config.store)
    finally:
        sink.close()
    if as_json:
        print_json(sent)
    elif not sent:
        click.echo("no runs yet")
    return OK


def _delivering_to(config: AgentConfig, hub: str) -> AgentConfig:
    """ConfigError in the words of this command's flags, of which none is --store."""
    try:
        hub_address(hub)
    except ValueError as error:
        raise ConfigError(f"--to is {hub!r:.300}: {error}") from None
    if not config.has_credentials:
        raise ConfigError(
            f"--to {hub} alone does not tell that hub from another, and this node from a stranger: add "
            "--token-file FILE, or --tls-ca, --tls-cert and --tls-key"
        )
    return replace(config, store=hub)


def _chosen(store: Reader, names: tuple[str, ...]) -> list[RunSummary]:
    if names:
        return list({run.run_id: run for run in map(store.run, names)}.values())
    return store.runs(limit=1_000_000)[::-1]


def _forwarded(store: Reader, run: RunSummary, sink: ForwardSink) -> dict[str, Any]:
    """Sends what the hub does not have, and says how much that was."""
    batches = points = 0
    for batch in store.copies(run.run_id, sink.last_accepted):
        sink.deliver(batch)
        batches += 1
        reducing = {info.producer_id for info in batch.producers if info.reduced}
        points += sum(part.values.size for part in batch.points if part.producer_id not in reducing)
    return {"run_id": run.run_id, "name": run.name, "batches": batches, "points": points}


def _print(run: RunSummary, sent: dict[str, Any], hub: str) -> None:
    points = counted(sent["points"], "point")
    click.echo(f"{run.run_id[:8]} {visible(run.name)}: {points} to {hub}")
