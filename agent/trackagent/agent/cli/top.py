"""`trackagent top`: the runs, ranks and GPUs of this node on a page that is drawn again and again."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from trackagent.agent.cli import OK, NothingThere
from trackagent.agent.cli.asking import STATUS_TIMEOUT_S, ask_node
from trackagent.agent.cli.options import Seconds, configured, json_option
from trackagent.agent.cli.output import columns, console, print_json
from trackagent.agent.cli.page import page, steps_per_second, throttled
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from trackagent.protos.v1.agent_pb2 import NodeResponse

# Of a shell: ended by signal N.
SIGNALLED = 128


@click.command("top")
@configured
@json_option
@click.option("--once", is_flag=True, help="Print the page as it is now and end.")
@click.option(
    "--interval",
    "interval_s",
    type=Seconds(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(min=0, min_open=True),
    default=STATUS_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for an answer.",
)
def top_command(
    config: AgentConfig, as_json: bool, once: bool, interval_s: float, timeout_s: float
) -> int:
    """Watch the runs, ranks and GPUs of this node, until Ctrl-C.

    Without an agent it waits for one; with --once the exit code is 3 then. Members of a group see
    their own runs.

    \b
    score: how quick a rank is beside the fastest, by the timer in which it is
    slowest; 1: none is faster. step time: median of the latest steps.
    Ranks that are disconnected, slow or stand still come first, and lost GPUs.

    \b
    Examples:
      trackagent top
      trackagent top --once
      trackagent top --once --json | jq '.gpus[].readings.power_watts'

    \b
    JSON keys (--once --json), null where not known: agent_version, node, time_ns,
      readings {key: value} of docs/metrics.md, more_gpus, more_ranks, more_alarms
      (how many are not listed),
      collectors [{name, state, reason, since_ns, sampled_ns}],
      gpus [{gpu, uuid, name, mig_profile, lost, throttled [reason],
      readings {key: value}}],
      runs [{run_id, run_name, experiment, attempt, world_size, steps_per_second,
      loss_key, losses [value], ranks [{rank, local_rank, pid, connected, step,
      still_seconds, step_seconds, score, cpu_percent, rss_bytes}]}],
      alarms [{rule, subject, level, message, run_id}],
      events [{run_id, time_ns, level, source, step, message}]
    """
    if once:
        answer = ask_node(config, timeout_s)
        if as_json:
            print_json(_json(answer))
        else:
            _print_once(answer)
        return OK
    if as_json:
        raise click.UsageError("--json prints one page: give --once too")
    out = console()
    if not out.is_terminal or out.is_dumb_terminal:
        raise click.UsageError("this is no terminal to draw in: give --once")
    return _watch(out, config, interval_s, timeout_s)


def _print_once(answer: NodeResponse) -> None:
    out = console()
    with out.capture() as captured:
        for part in page(answer, columns(), None):
            out.print(part, width=columns() if out.is_terminal else None)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


class _Page:
    """The page in the size that the terminal has when it is drawn."""

    def __init__(self) -> None:
        self.answer: NodeResponse | None = None
        self.note = ""

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        if self.answer is None:
            yield self.note
        else:
            yield from page(self.answer, options.max_width, options.size.height, note=self.note)


def _watch(out: Console, config: AgentConfig, interval_s: float, timeout_s: float) -> NoReturn:
    """Until interrupted."""
    shown = _Page()
    with _ended_in_order(), Live(shown, console=out, screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            try:
                shown.answer, shown.note = ask_node(config, timeout_s), ""
            except NothingThere as error:
                shown.note = f"waiting: {error}"
            except AgentError as error:
                shown.note = str(error)
            live.refresh()
            time.sleep(max(0.0, began + interval_s - time.monotonic()))


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP leave the terminal as it was."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(SIGNALLED + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _json(answer: NodeResponse) -> dict[str, Any]:
    found = _fields(answer)
    for run, said in zip(found["runs"], answer.runs, strict=True):
        run["steps_per_second"] = steps_per_second(said)
        for rank in run["ranks"]:
            del rank["producer_id"]
    for gpu, reported in zip(found["gpus"], answer.gpus, strict=True):
        gpu["throttled"] = throttled(dict(reported.readings))
    return found


def _fields(message: Message) -> dict[str, Any]:
    """Every field of a message, None for what it leaves out."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = dict(sorted(value.items()))
        elif field.message_type is not None:
            found[field.name] = [_fields(one) for one in value]
        elif field.has_presence and not message.HasField(field.name):
            found[field.name] = None
        elif isinstance(value, (str, bytes, int, float)):
            found[field.name] = value
        else:
            found[field.name] = list(value)
    return found
