"""The program as a whole, `config` and `doctor`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trackagent.agent.cli import COMMANDS, main, version

LETTERS = ("list", "show", "retry", "discard")
JSON_COMMANDS = ("status", "runs", "show", "tail", "doctor", "config")


def invoke(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner(env=environ).invoke(main, list(arguments))


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return ["--dir", str(tmp_path / "dir"), "--state", str(tmp_path / "state")]


def test_the_version_is_the_distribution_s() -> None:
    assert invoke("--version").stdout == f"trackagent {version()}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_examples(name: str) -> None:
    assert f"Examples:\n    trackagent {name}" in invoke(name, "--help").stdout


@pytest.mark.parametrize("name", LETTERS)
def test_the_help_of_every_command_about_dead_letters_has_examples(name: str) -> None:
    text = invoke("dead-letters", name, "--help").stdout
    assert f"Examples:\n    trackagent dead-letters {name}" in text


@pytest.mark.parametrize("name", JSON_COMMANDS)
def test_the_help_of_every_command_with_json_states_its_keys(name: str) -> None:
    text = invoke(name, "--help").stdout
    assert "--json" in text
    assert "\n  JSON" in text


def test_the_help_fits_in_80_columns() -> None:
    every = [[], *([name] for name in COMMANDS), *(["dead-letters", name] for name in LETTERS)]
    texts = [invoke(*name, "--help").stdout for name in every]
    assert [line for text in texts for line in text.splitlines() if len(line) > 80] == []


def test_the_help_of_the_program_imports_neither_grpc_nor_numpy() -> None:
    script = (
        "import sys\n"
        "from trackagent.agent.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "print({'grpc', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["runs", "--limit", "none"], "'none' is not a valid integer range"),
        (["export"], "Missing argument 'RUN'"),
        (["run"], "Missing argument 'COMMAND...'"),
        (["config", "--max-streams", "none"], "max_streams is 'none': give a whole number"),
        (["runs", "--config", "/nonexistent"], "/nonexistent: no such file"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert result.stderr.startswith("trackagent: ")
    assert message in result.stderr


def test_a_wrong_variable_is_wrong_use() -> None:
    result = invoke("config", environ={"TRACKAGENT_LOG_LEVEL": "loud"})
    assert (result.exit_code, result.stderr) == (
        2,
        "trackagent: log_level is 'loud': give debug, info, warning, error "
        "(from environment TRACKAGENT_LOG_LEVEL)\n",
    )


# --- config


def test_config_shows_where_a_value_comes_from(folders: list[str]) -> None:
    shown = invoke("config", *folders, environ={"TRACKAGENT_MAX_STREAMS": "9"}).stdout
    assert ["max_streams", "9", "environment", "TRACKAGENT_MAX_STREAMS"] in [
        line.split() for line in shown.splitlines()
    ]


def test_config_as_json_has_typed_values(folders: list[str]) -> None:
    shown = json.loads(invoke("config", *folders, "--max-streams", "9", "--json").stdout)
    assert shown["max_streams"] == {"value": 9, "from": "flag --max-streams"}
    assert shown["group"] == {"value": None, "from": "default"}


# --- doctor


def test_a_healthy_node_is_exit_code_0(folders: list[str]) -> None:
    result = invoke("doctor", *folders)
    assert (result.exit_code, "FAIL" in result.stdout) == (0, False)


def test_a_node_that_cannot_work_is_exit_code_1(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    result = invoke("doctor", *folders)
    assert (result.exit_code, "FAIL" in result.stdout) == (1, True)


def test_doctor_as_json_has_the_checks(folders: list[str]) -> None:
    checks = json.loads(invoke("doctor", *folders, "--json").stdout)
    assert {frozenset(check) for check in checks} == {
        frozenset(("name", "status", "found", "advice"))
    }
