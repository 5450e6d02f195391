"""What deploy/ and its document say to the agent: every flag and variable is one that it knows."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import click
import pytest

from tests.deploy.manifests import ROOT, containers, every_object
from trackagent.agent.cli import main
from trackagent.agent.config import AgentConfig, variable
from trackagent.client.config import ClientConfig
from trackagent.client.identity import RUN_ID_VARIABLES

DEPLOY = ROOT / "deploy"
DOCUMENT = ROOT / "docs" / "deploy.md"
FILES = sorted(
    path
    for path in DEPLOY.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".dockerignore") and path.name != "token"
)
KNOWN = {
    *(variable(field.name) for field in fields(AgentConfig)),
    *(f"TRACKAGENT_{field.name.upper()}" for field in fields(ClientConfig)),
    *(name for name in RUN_ID_VARIABLES if name.startswith("TRACKAGENT_")),
    *("TRACKAGENT_ATTEMPT", "TRACKAGENT_CONFIG", "TRACKAGENT_NODE"),
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[list[str]]:
    """Every `trackagent COMMAND …` in scripts, units and documents: its words, up to what it runs."""
    known = main.list_commands(click.Context(main))
    joined = re.sub(r"\\\n\s*", "", text)
    # With a path before it or not; not as the last word of another command's arguments.
    matches = re.findall(r"(?<![-\w.=])(?:/\S*/)?trackagent ([a-z-]+\b[^`#|\n]*)", joined)
    found = [[word.strip("\"',.:") for word in match.split()] for match in matches]
    return [
        words[: words.index("--")] if "--" in words else words
        for words in found
        if words[0] in known
    ]


def in_manifests() -> list[list[str]]:
    """The arguments of `trackagent` in containers and probes."""
    found = []
    for one in containers(every_object()):
        if one.runs_trackagent and "command" not in one.body:
            found.append([*one.body["args"]])
        for name, value in one.body.items():
            if name.endswith("Probe"):
                program, *arguments = value["exec"]["command"]
                assert program == "trackagent"
                found.append(arguments)
    return found


def flags(name: str) -> set[str]:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return {flag for parameter in command.params for flag in (*parameter.opts, "--help")}


@pytest.mark.parametrize("path", [*FILES, DOCUMENT], ids=relative)
def test_a_variable_is_one_that_is_read(path: Path) -> None:
    named = set(re.findall(r"TRACKAGENT_[A-Z_]+", path.read_text()))
    assert named - KNOWN == set()


@pytest.mark.parametrize("path", [*FILES, DOCUMENT], ids=relative)
def test_a_flag_is_one_that_its_command_takes(path: Path) -> None:
    for name, *words in commands(path.read_text()):
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given - flags(name) == set()


def test_the_commands_of_containers_are_there() -> None:
    assert {tuple(one) for one in in_manifests()} == {("start",), ("status",)}


def test_the_commands_that_are_looked_at_are_these() -> None:
    """So that none is skipped silently."""
    seen = {
        (path.name, words[0])
        for path in FILES
        for words in commands(path.read_text())
        if path.suffix != ".yaml"
    }
    assert seen == {
        ("prolog.sh", "start"),
        ("train.sbatch", "run"),
        ("train.sbatch", "show"),
        ("trackagent.service", "start"),
    }


def test_a_flag_that_no_command_takes_would_be_seen() -> None:
    (words,) = commands("ExecStart=/opt/trackagent/bin/trackagent start --grup trackagent\n")
    assert words == ["start", "--grup", "trackagent"]
    assert "--grup" not in flags("start")
