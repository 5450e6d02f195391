"""`trackagent start`, `status` and `stop`: the agent of a folder."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import click

from trackagent.agent.cli import ERROR, OK
from trackagent.agent.cli.asking import (
    STATUS_TIMEOUT_S,
    Holder,
    ask_status,
    lock_holder,
    state_holder,
)
from trackagent.agent.cli.options import Seconds, agent_flags, configured, json_option
from trackagent.agent.cli.output import (
    byte_count,
    clock,
    console,
    counted,
    print_json,
    print_table,
    safe,
    since,
    table,
)
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError
from trackagent.agent.processes import holds
from trackagent.agent.shown import LogFormatter, visible

if TYPE_CHECKING:
    from rich.text import Text

    from trackagent.protos.v1.agent_pb2 import StatusResponse

STOP_GRACE_S = 10.0
STOP_POLL_S = 0.02


@click.command("start")
@configured
@agent_flags
def start_command(config: AgentConfig) -> int:
    """Run the agent of this node, until SIGTERM, Ctrl-C or the terminal's end.

    \b
    Examples:
      trackagent start
      trackagent start --dir /dev/shm/ml --state /var/lib/trackagent --group ml
      trackagent start --listen :7717
      trackagent start --store hub:7717 --token-file /etc/trackagent/token
    """
    # Imported here: the daemon pulls in everything, and only this command runs it.
    from trackagent.agent.daemon import serve

    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s trackagent %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    return serve(config)


@click.command("status")
@configured
@json_option
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(min=0, min_open=True),
    default=STATUS_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the answer.",
)
def status_command(config: AgentConfig, as_json: bool, timeout_s: float) -> int:
    """What the agent of this node is doing. Exit code 3 when none runs.

    \b
    Examples:
      trackagent status
      trackagent status --json | jq .lost_records

    \b
    JSON keys: agent_version, pid, start_time_ns, directory, state_directory,
      listen, pin (where other nodes may deliver, and who this hub is), store,
      spool {batches, bytes, received_bytes, max_bytes},
      lost_records {reason: records}, in all runs of the store, and
      lost_since_start, or lost_unknown: why the store does not say,
      quarantine {items, bytes, max_bytes, deleted (at the cap, ever)},
      sinks [{name, state, batches_behind, rejected, error, dead_letters,
      dead_letter_bytes}],
      producers [{run_id, attempt, rank, node, pid, experiment, run_name,
      forked, state, committed_bytes}]
    """
    answer = ask_status(config, timeout_s)
    if as_json:
        print_json(_status_json(answer))
    else:
        _print_status(answer)
    return OK


def _status_json(answer: StatusResponse) -> dict[str, Any]:
    return {
        "agent_version": answer.agent_version,
        "pid": answer.pid,
        "start_time_ns": answer.start_time_ns,
        "directory": answer.directory,
        "state_directory": answer.state_directory,
        "listen": answer.listen,
        # Of the hub; `pid` is the process.
        "pin": answer.pin,
        "store": answer.store,
        "spool": {
            "batches": answer.spool.batches,
            "bytes": answer.spool.bytes,
            "received_bytes": answer.spool.received_bytes,
            "max_bytes": answer.spool.max_bytes,
        },
        "lost_records": dict(answer.lost_records),
        "lost_since_start": answer.lost_since_start,
        "lost_unknown": answer.lost_unknown,
        "quarantine": {
            "items": answer.quarantine.items,
            "bytes": answer.quarantine.bytes,
            "max_bytes": answer.quarantine.max_bytes,
            "deleted": answer.quarantine.deleted,
        },
        "sinks": [
            {
                "name": sink.name,
                "state": sink.state,
                "batches_behind": sink.batches_behind,
                "rejected": sink.rejected,
                "error": sink.error,
                "dead_letters": sink.dead_letters,
                "dead_letter_bytes": sink.dead_letter_bytes,
            }
            for sink in answer.sinks
        ],
        "producers": [
            {
                "run_id": one.producer.run_id,
                "attempt": one.producer.attempt,
                "rank": one.producer.rank,
                "node": one.producer.node,
                "pid": one.producer.pid,
                "experiment": one.producer.experiment,
                "run_name": one.producer.run_name,
                "forked": one.producer.forked,
                "state": one.state,
                "committed_bytes": one.committed_bytes,
            }
            for one in answer.producers
        ],
    }


def _print_status(answer: StatusResponse) -> None:
    out = console()
    out.print(
        f"agent {visible(answer.agent_version)}, pid {answer.pid}, "
        f"running for {since(answer.start_time_ns)} (since {clock(answer.start_time_ns)})"
    )
    facts = table("", "")
    facts.show_header = False
    facts.add_row("folder", safe(answer.directory))
    facts.add_row("state", safe(answer.state_directory))
    if answer.listen:
        facts.add_row("hub", safe(f"other nodes may deliver at {answer.listen} (pin {answer.pin})"))
    if answer.store:
        facts.add_row("store", safe(f"everything is delivered to {answer.store}"))
    spool = answer.spool
    facts.add_row(
        "spool",
        f"{counted(spool.batches, 'batch', 'batches')}, {byte_count(spool.bytes)} of "
        f"{byte_count(spool.max_bytes)} waiting; {byte_count(spool.received_bytes)} received",
    )
    facts.add_row("lost", _lost(answer))
    aside = answer.quarantine
    facts.add_row(
        "aside",
        safe(
            f"{counted(aside.items, 'damaged file')}, {byte_count(aside.bytes)} of "
            f"{byte_count(aside.max_bytes)}; {aside.deleted} deleted",
            _alarm(aside.items + aside.deleted),
        ),
    )
    print_table(out, facts)
    out.print()
    sinks = table("sink", "state", ">batches behind", ">rejected", ">dead letters", "last error")
    for sink in answer.sinks:
        sinks.add_row(
            safe(sink.name),
            safe(sink.state, "" if sink.state in ("idle", "delivering") else "red"),
            str(sink.batches_behind),
            safe(str(sink.rejected), _alarm(sink.rejected)),
            safe(_kept(sink.dead_letters, sink.dead_letter_bytes), _alarm(sink.dead_letters)),
            safe(sink.error),
        )
    if answer.sinks:
        print_table(out, sinks)
    else:
        out.print("no sinks")
    out.print()
    producers = table("run", ">attempt", ">rank", "node", ">pid", "state", ">committed")
    for one in answer.producers:
        who = one.producer
        producers.add_row(
            safe(who.run_name or who.run_id[:8]),
            str(who.attempt),
            f"{who.rank} (forked)" if who.forked else str(who.rank),
            safe(who.node),
            str(who.pid),
            safe(one.state),
            byte_count(one.committed_bytes),
        )
    if answer.producers:
        print_table(out, producers)
    else:
        out.print("no ranks connected")


def _lost(answer: StatusResponse) -> Text:
    """What all runs of the store have lost, by reason."""
    if answer.lost_unknown:
        return safe(f"not known: {answer.lost_unknown}", "yellow")
    lost = sum(answer.lost_records.values())
    if not lost:
        return safe("0 records")
    reasons = ", ".join(f"{why} {n}" for why, n in sorted(answer.lost_records.items()))
    new = answer.lost_since_start
    return safe(f"{counted(lost, 'record')}: {reasons} ({new} since this start)", _alarm(lost))


def _kept(letters: int, size: int) -> str:
    return f"{letters} ({byte_count(size)})" if letters else "0"


def _alarm(count: int) -> str:
    return "bold red" if count else ""


@click.command("stop")
@configured
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(min=0),
    metavar="SECONDS",
    help="How long to wait for its end.  [default: drain_timeout_s + 10, and linger_s with --listen]",
)
def stop_command(config: AgentConfig, timeout_s: float | None) -> int:
    """Stop the agent of this node and wait for its end.

    It delivers first; what it cannot deliver waits in its spool. Done, too, where no agent runs.

    \b
    Examples:
      trackagent stop
      trackagent stop --timeout 60
    """
    wait_s = config.stopping_s + STOP_GRACE_S if timeout_s is None else timeout_s
    deadline = time.monotonic() + wait_s
    holder = lock_holder(config)
    while holder is not None and not holder.pid and time.monotonic() < deadline:
        # It has just taken the lock and not yet written who it is.
        time.sleep(STOP_POLL_S)
        holder = lock_holder(config)
    if holder is None:
        click.echo(f"no agent runs for {config.directory}")
        other = state_holder(config)
        if other is not None and other.directory:
            click.echo(
                f"{config.state_directory} is used by the agent of {other.directory} (pid {other.pid}): "
                f"trackagent stop --dir {other.directory}"
            )
        return OK
    if not holder.pid:
        raise AgentError(f"{config.lock_path} is locked but does not say by whom")
    _terminate(config, holder)
    while lock_holder(config) is not None:
        if time.monotonic() >= deadline:
            click.echo(
                f"trackagent: the agent (pid {holder.pid}) has not ended within {wait_s:g} s; it goes "
                "on delivering and ends by itself",
                err=True,
            )
            return ERROR
        time.sleep(STOP_POLL_S)
    click.echo(f"the agent (pid {holder.pid}) has stopped")
    return OK


def _terminate(config: AgentConfig, holder: Holder) -> None:
    """SIGTERM to the holder of the lock, after making sure that its pid means that process here."""
    try:
        if not holds(holder.pid, holder.path):
            if lock_holder(config) is None:
                return
            raise AgentError(
                f"the agent of {config.directory} is process {holder.pid} of another container: stop it there"
            )
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise AgentError(
            f"may not stop the agent (pid {holder.pid}): it is another user's"
        ) from None
