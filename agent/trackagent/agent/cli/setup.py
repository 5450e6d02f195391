"""`trackagent doctor` and `trackagent config`: whether and how this node is set up."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from trackagent.agent.cli import ERROR, OK, NothingThere, version
from trackagent.agent.cli.asking import ask_status
from trackagent.agent.cli.options import agent_flags, configured, json_option
from trackagent.agent.cli.output import console, print_json, print_table, safe, table
from trackagent.agent.config import AgentConfig

if TYPE_CHECKING:
    from trackagent.protos.v1.agent_pb2 import StatusResponse

_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


@click.command("doctor")
@configured
@json_option
def doctor_command(config: AgentConfig, as_json: bool) -> int:
    """Look for what would keep trackagent from working on this node.

    Exit code 1 if a check fails; warnings leave it at 0. Changes nothing.

    \b
    Examples:
      trackagent doctor
      trackagent doctor --json | jq '.[] | select(.status != "ok")'

    \b
    JSON: [{name, status: "ok" | "warn" | "fail", found, advice}]
    """
    # Not at the top: it looks at every library that others import.
    from trackagent.agent.doctor import examine

    checks = examine(config, own_version=version(), ask=_answer)
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        rows = table("", "check", "found")
        for check in checks:
            mark, style = _MARKS[check.status]
            found = safe(check.found)
            if check.advice:
                found.append(f"\n→ {check.advice}", style)
            rows.add_row(safe(mark, style), check.name, found)
        print_table(console(), rows)
    return ERROR if any(check.status == "fail" for check in checks) else OK


def _answer(config: AgentConfig) -> StatusResponse | None:
    try:
        return ask_status(config)
    except NothingThere:
        return None


@click.command("config")
@configured
@agent_flags
@json_option
@click.pass_obj
def config_command(where: dict[str, Any], config: AgentConfig, as_json: bool) -> int:
    """Show the configuration in effect and where each value comes from.

    A flag beats the environment (TRACKAGENT_...), which beats the configuration file.

    \b
    Examples:
      trackagent config
      TRACKAGENT_LOG_LEVEL=debug trackagent config --config agent.toml

    \b
    JSON: {name: {value, from}}
    """
    origins = where["origins"]
    values = {
        name: None if value is None else value if isinstance(value, (int, float)) else str(value)
        for name, value in dataclasses.asdict(config).items()
    }
    if config.hook_url:
        from trackagent.agent.health.webhook import shown_url

        values["hook_url"] = f"{shown_url(config.hook_url)}/…"
    if as_json:
        print_json(
            {name: {"value": value, "from": origins[name]} for name, value in values.items()}
        )
        return OK
    rows = table("setting", "value", "from")
    for name, value in values.items():
        rows.add_row(name, safe("-" if value is None else str(value)), safe(origins[name]))
    print_table(console(), rows)
    return OK
