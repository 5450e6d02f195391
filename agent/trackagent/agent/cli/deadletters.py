"""`trackagent dead-letters`: what a sink has rejected, and what becomes of it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import click

from trackagent.agent.cli import ERROR, OK, USAGE, NothingThere
from trackagent.agent.cli.asking import lock_holder
from trackagent.agent.cli.options import Seconds, configured, is_there, json_option
from trackagent.agent.cli.output import (
    byte_count,
    clock,
    console,
    counted,
    number,
    print_json,
    print_table,
    safe,
    table,
)
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError
from trackagent.agent.shown import visible

if TYPE_CHECKING:
    from trackagent.agent.deadletters import DeadLetter
    from trackagent.agent.store.contract import Writer

RETRY_TIMEOUT_S = 10.0
SHOWN_RECORDS = 20
_POLL_S = 0.05


@click.group("dead-letters", invoke_without_command=True)
@click.pass_context
def dead_letters_command(context: click.Context) -> int | None:
    """What a sink has rejected: look at it, deliver it again, or throw it away.

    A batch of records that a sink can never take is kept as a dead letter, with the reason, and what
    is behind it flows on. `list` and `show` work without an agent.

    \b
    Examples:
      trackagent dead-letters list
      trackagent dead-letters show 4f2a09c1d3e5-17
      trackagent dead-letters retry --all
    """
    if context.invoked_subcommand is not None:
        return None
    click.echo(context.get_help(), err=True)
    return USAGE


@dead_letters_command.command("list")
@configured
@json_option
def list_command(config: AgentConfig, as_json: bool) -> int:
    """The dead letters of all sinks, the oldest first.

    \b
    Examples:
      trackagent dead-letters list
      trackagent dead-letters list --json | jq '.[].id'

    \b
    JSON keys: id, sink, time_ns (of the last rejection), times (rejected),
      run_id, attempt, rank, node, bytes, records, reason, retry (whether it is
      to be delivered again)
    """
    letters = _found(config)
    if as_json:
        print_json([_json(letter) for letter in letters])
        return OK
    out = console()
    if not letters:
        out.print("no dead letters")
        return OK
    rows = table("id", "sink", "rejected", "run", ">rank", ">records", ">size", ">times", "reason")
    for letter in letters:
        who = letter.producer
        rows.add_row(
            safe(letter.id),
            safe(letter.sink),
            clock(letter.time_ns),
            safe(who.run_name or who.run_id[:8]),
            str(who.rank),
            str(letter.records),
            byte_count(letter.size),
            str(letter.times),
            safe(("to be delivered again; " if letter.marked else "") + letter.reason),
        )
    print_table(out, rows)
    return OK


@dead_letters_command.command("show")
@configured
@json_option
@click.argument("id_", metavar="ID")
@click.option(
    "--records",
    "most",
    type=click.IntRange(min=0),
    default=SHOWN_RECORDS,
    show_default=True,
    metavar="N",
    help="How many of the records to print; --json prints all.",
)
def show_command(config: AgentConfig, as_json: bool, id_: str, most: int) -> int:
    """One dead letter, its reason and its records.

    ID is an id that `list` shows, or the beginning of one.

    \b
    Examples:
      trackagent dead-letters show 4f2a09c1d3e5-17
      trackagent dead-letters show 4f2a --json | jq .records

    \b
    JSON keys: those of `list`, but records [{kind, step, time_ns, and
      values {key: value} or data}], and unreadable [{first_byte, end, reason}]
    """
    letter = _one(config, id_)
    records, unreadable = _content(letter)
    if as_json:
        print_json({**_json(letter), "records": records, "unreadable": unreadable})
        return OK
    out = console()
    who = letter.producer
    facts = table("", "")
    facts.show_header = False
    facts.add_row("id", safe(letter.id))
    facts.add_row("sink", safe(letter.sink))
    times = counted(letter.times, "time")
    facts.add_row("rejected", f"{clock(letter.time_ns)}, {times}")
    facts.add_row("reason", safe(letter.reason, "bold red"))
    facts.add_row("run", safe(f"{who.run_id} {who.run_name}".strip()))
    facts.add_row("logged by", safe(f"{who.source}, attempt {who.attempt}, node {who.node}"))
    facts.add_row("records", f"{letter.records}, {byte_count(letter.size)}")
    facts.add_row("kept in", safe(str(letter.folder)))
    print_table(out, facts)
    out.print()
    for one in records[:most]:
        step = "" if one["step"] is None else f"  step {one['step']}"
        out.print(safe(f"{one['kind']}{step}  {_said(one)}"))
    if len(records) > most:
        out.print(f"and {len(records) - most} more (--json prints all)")
    for part in unreadable:
        out.print(
            safe(
                f"bytes {part['first_byte']} to {part['end']} are unreadable: {part['reason']}",
                "red",
            )
        )
    out.print()
    if letter.marked:
        out.print(safe(f"it is to be delivered again: {_when(config)}"))
    else:
        out.print(safe(f"to deliver it again: trackagent dead-letters retry {letter.id}"))
    return OK


@dead_letters_command.command("retry")
@configured
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All of them.")
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(min=0),
    default=RETRY_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for what comes of it.",
)
def retry_command(config: AgentConfig, ids: tuple[str, ...], every: bool, timeout_s: float) -> int:
    """Deliver dead letters again.

    The agent does it, to the sink that rejected them: at once where one runs, else when it next
    starts. A sink that has taken a letter does not take it twice. What is rejected again stays
    listed; exit code 1 then.

    \b
    Examples:
      trackagent dead-letters retry 4f2a09c1d3e5-17
      trackagent dead-letters retry --all
    """
    from trackagent.agent import deadletters

    letters = _chosen(config, ids, every)
    for letter in letters:
        deadletters.mark(letter)
    if not letters:
        click.echo("no dead letters")
        return OK
    if lock_holder(config) is None:
        what = counted(len(letters), "dead letter")
        click.echo(f"{what} to be delivered again: {_when(config)}")
        return OK
    deadline = time.monotonic() + timeout_s
    waiting = letters
    while waiting and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        waiting = [letter for letter in waiting if letter.marked]
    left = {letter.id: letter for letter in _found(config)}
    rejected = [left[one.id] for one in letters if one not in waiting and one.id in left]
    delivered = len(letters) - len(waiting) - len(rejected)
    click.echo(f"{counted(delivered, 'dead letter')} delivered")
    for letter in rejected:
        click.echo(f"{letter.id} is rejected again: {visible(letter.reason)}", err=True)
    if waiting:
        click.echo(
            f"{counted(len(waiting), 'dead letter')} not yet delivered: the agent goes on trying "
            "(see `trackagent status`)",
            err=True,
        )
    return ERROR if rejected or waiting else OK


@dead_letters_command.command("discard")
@configured
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def discard_command(config: AgentConfig, ids: tuple[str, ...], every: bool, yes: bool) -> int:
    """Throw dead letters away.

    Their records are lost, and their run counts them so.

    \b
    Examples:
      trackagent dead-letters discard 4f2a09c1d3e5-17
      trackagent dead-letters discard --all --yes
    """
    from trackagent.agent import deadletters
    from trackagent.agent.store import StoreError, open_writer

    letters = _chosen(config, ids, every)
    records = counted(sum(letter.records for letter in letters), "record")
    what = f"{counted(len(letters), 'dead letter')} with {records}"
    if letters and not yes:
        click.confirm(f"Throw {what} away?", abort=True)
    if letters:
        try:
            # An agent may have the store open: only the agent itself may replace it.
            with contextlib.closing(open_writer(config.store_path, repair=False)) as writer:
                for letter in letters:
                    _count_as_lost(writer, letter)
                    deadletters.discard(letter)
        except StoreError as error:
            raise AgentError(f"cannot count as lost what is thrown away: {error}") from error
    click.echo(f"{what} thrown away")
    return OK


def _count_as_lost(writer: Writer, letter: DeadLetter) -> None:
    """Once, however often it is tried: by an id that follows from the letter's."""
    from trackagent.agent.store.contract import Batch, BatchId, Loss, Rejected

    origin = f"{letter.origin}/{letter.sink}/discarded"
    loss = Loss(letter.producer.producer_id, "dead letters thrown away", letter.records, more=True)
    try:
        writer.write(
            Batch(
                id=BatchId(origin, letter.number, letter.number),
                producers=[letter.producer],
                losses=[loss],
            )
        )
    except Rejected as error:
        click.echo(f"trackagent: warning: {visible(str(error))}: not counted", err=True)


def _found(config: AgentConfig) -> list[DeadLetter]:
    """All that can be read; a line on stderr for each other one."""
    from trackagent.agent import deadletters

    if not is_there(config.dead_letters_path):
        return []
    for problem in deadletters.unreadable(config.dead_letters_path):
        click.echo(f"trackagent: warning: {visible(problem)}", err=True)
    return deadletters.found(config.dead_letters_path)


def _one(config: AgentConfig, id_: str) -> DeadLetter:
    found = _found(config)
    matching = [letter for letter in found if letter.id == id_] or [
        letter for letter in found if letter.id.startswith(id_)
    ]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(f"{letter.id} ({letter.sink})" for letter in matching[:5])
        raise NothingThere(f"{id_!r} may be any of these dead letters: {names}")
    raise NothingThere(f"no dead letter {id_!r}: see `trackagent dead-letters list`")


def _chosen(config: AgentConfig, ids: tuple[str, ...], every: bool) -> list[DeadLetter]:
    if bool(ids) == every:
        raise click.UsageError("give ids of dead letters, or --all")
    return _found(config) if every else [_one(config, id_) for id_ in ids]


def _when(config: AgentConfig) -> str:
    holder = lock_holder(config)
    return "no agent runs, `trackagent start` does it" if holder is None else f"by pid {holder.pid}"


def _json(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "sink": letter.sink,
        "time_ns": letter.time_ns,
        "times": letter.times,
        "run_id": letter.producer.run_id,
        "attempt": letter.producer.attempt,
        "rank": letter.producer.rank,
        "node": letter.producer.node,
        "bytes": letter.size,
        "records": letter.records,
        "reason": letter.reason,
        "retry": letter.marked,
    }


def _content(letter: DeadLetter) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The letter's records, and the parts that are none."""
    from trackagent.client import record
    from trackagent.client.record import NO_STEP, Kind

    data = letter.journal_bytes()
    scan = record.scan(data)
    unreadable = [
        {"first_byte": part.start, "end": part.end, "reason": part.reason} for part in scan.damage
    ]
    records: list[dict[str, Any]] = []
    for offset in scan.offsets:
        try:
            found = record.decode(data, offset)
        except ValueError as error:
            unreadable.append({"first_byte": offset, "end": offset, "reason": str(error)})
            continue
        if found.kind == Kind.SCHEMA:
            continue
        one: dict[str, Any] = {
            "kind": found.kind.name.lower(),
            "step": None if found.step == NO_STEP else found.step,
            "time_ns": found.time_ns,
        }
        if found.kind in (Kind.METRICS, Kind.NAMED):
            keys = found.keys or letter.schemas.get(found.schema_id, ())
            if len(keys) != len(found.values):
                keys = tuple(f"value {at}" for at in range(len(found.values)))
            one["values"] = dict(zip(keys, found.values, strict=True))
        else:
            one["data"] = dict(found.data or {})
        records.append(one)
    return records, unreadable


def _said(one: dict[str, Any]) -> str:
    if "values" in one:
        return "  ".join(f"{key}={number(value)}" for key, value in one["values"].items())
    return "  ".join(f"{key}={value}" for key, value in one["data"].items())
